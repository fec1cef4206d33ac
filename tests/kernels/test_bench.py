"""The benchmark and tuning scripts: what is counted, who takes part, what is written; no figure is looked at."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.grouped_matmul import expert_mlp, grouped_matmul
from scripts import bench_kernels, bench_layer
from scripts._bench import inputs
from scripts._bench.cases import ROUTINGS, SHAPES, Case, Shape, draw_group_sizes, floor_of, parse_shape
from scripts._bench.inputs import exact_sample, make_layers, make_variants
from scripts._bench.report import check_error, write_json
from scripts._bench.sides import all_sides, jax_turn
from scripts._bench.timing import take_turns
from tests.support import processes

SMALL = Shape(experts=6, per_token=2, width=32, expert_width=16)


def case_of(operation="up", tokens=5, routing="uniform", dtype="float32", shape=SMALL):
    return Case("small", shape, operation, tokens, routing, dtype)


# --- cases


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tokens", [1, 32, 4096])
def test_group_sizes_sum_to_the_rows(routing, shape, tokens):
    sizes = draw_group_sizes(routing, shape, tokens, np.random.default_rng(0))
    assert sizes.dtype == np.int32
    assert sizes.shape == (shape.experts,)
    assert sizes.sum() == tokens * shape.per_token
    # A token goes to an expert once, but for the routing that has only one.
    assert routing == "one" or sizes.max() <= tokens


def test_routings_are_what_they_are_called():
    shape, rng = SHAPES["qwen3-30b-a3b"], np.random.default_rng(0)
    sizes = {routing: np.sort(draw_group_sizes(routing, shape, 4096, rng))[::-1] for routing in ROUTINGS}
    mean = 4096 * 8 / 128
    assert sizes["uniform"][0] < 1.4 * mean
    assert sizes["zipf"][0] > 8 * mean
    assert np.count_nonzero(sizes["one"]) == 1
    assert np.count_nonzero(sizes["half"]) == 64


def test_floor_of_published_shapes():
    """Mixtral with 4096 tokens is bound by arithmetic, Qwen3-30B with one by reading the experts of that token."""
    flops_per_second, bytes_per_second = 989e12, 3.35e12
    large = floor_of(case_of("mlp", 4096, shape=SHAPES["mixtral-8x7b"]), touched=8, itemsize=2)
    assert large.flops == 2 * 4096 * 2 * 3 * 4096 * 14336
    assert large.seconds(flops_per_second, bytes_per_second) == pytest.approx(2918e-6, rel=1e-3)
    small = floor_of(case_of("mlp", 1, shape=SHAPES["qwen3-30b-a3b"]), touched=8, itemsize=2)
    assert small.nbytes == 2 * (8 * 3 * 2048 * 768 + 8 * 2 * 2048)
    assert small.seconds(flops_per_second, bytes_per_second) == pytest.approx(23e-6, rel=0.03)


def test_floor_of_both_products_and_of_the_whole():
    D, F, R, touched = 32, 16, 10, 4
    floors = {name: floor_of(case_of(name), touched, 4) for name in ("up", "down", "mlp")}
    assert floors["up"].nbytes == 4 * (touched * 2 * F * D + R * (D + 2 * F))
    assert floors["down"].nbytes == 4 * (touched * D * F + R * (F + D))
    assert floors["mlp"].nbytes == 4 * (touched * 3 * D * F + R * 2 * D)
    assert floors["mlp"].flops == floors["up"].flops + floors["down"].flops == 2 * R * 3 * D * F


def test_shapes_by_name_and_by_number():
    assert parse_shape("gpt-oss-20b") == ("gpt-oss-20b", Shape(32, 4, 2880, 2880))
    assert parse_shape("128,8,512,384") == ("128,8,512,384", Shape(128, 8, 512, 384))
    assert Shape(8, 2, 4096, 14336).scaled(100) == Shape(8, 2, 40, 136)
    for wrong in ("gpt", "1,2,3", "1,2,3,0"):
        with pytest.raises(ValueError, match=rf"a shape is one of mixtral-8x7b.*got '{wrong}'"):
            parse_shape(wrong)


# --- timing


def test_every_side_has_a_turn_a_round_until_its_budget_is_used_up():
    now, order = [0.0], []

    def side(name, seconds):
        def work():
            order.append(name)
            now[0] += seconds

        return work

    taken = take_turns(
        {"quick": side("quick", 1.0), "slow": side("slow", 5.0)},
        rounds=3,
        budget_s=4.0,
        clock=lambda: now[0],
        pause=lambda seconds: now.__setitem__(0, now[0] + 100),
    )
    assert order == ["quick", "slow", "quick", "quick"]
    assert taken == {"quick": [1.0, 1.0, 1.0], "slow": [5.0]}


# --- inputs and sides


@pytest.mark.covering(most=3)
@pytest.mark.parametrize("operation", ["up", "down", "mlp"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_sample_is_the_operation_in_float64(operation, routing):
    case = case_of(operation, routing=routing)
    layers = make_layers(SMALL, "float32", jax.devices()[0])
    variant = make_variants(case, layers)[0]
    sample = exact_sample(case, variant)
    layer, rows = variant.layer, variant.rows
    if operation == "mlp":
        out = expert_mlp(rows, layer.up.reshape(6, 2, 16, 32), layer.down, variant.group_sizes)
    else:
        out = grouped_matmul(rows, *layer.matrices(operation), variant.group_sizes)
    assert sample.error(np.asarray(out)[sample.rows]) < 1e-6
    assert sample.error(np.asarray(out)[sample.rows] * 1.01) == pytest.approx(0.01, rel=1e-3)
    assert math.isnan(sample.error(np.full(sample.exact.shape, np.nan)))


def test_variants_differ_and_are_the_same_for_all_who_ask():
    case, layers = case_of(), make_layers(SMALL, "float32", jax.devices()[0])
    assert len({id(layer.up) for layer in layers}) == inputs.VARIANTS
    first, again = make_variants(case, layers), make_variants(case, layers)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.group_sizes, b.group_sizes)
        np.testing.assert_array_equal(a.host_sizes, a.group_sizes)
    assert len({variant.rows.sum().item() for variant in first}) == len(first)


def test_matrices_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(inputs, "free_memory", lambda device: 10_000)
    with pytest.raises(MemoryError, match="one layer takes 0.0 GB.*use --scale"):
        make_layers(SMALL, "float32", jax.devices()[0])


def test_a_program_that_needs_too_much_memory_is_refused(monkeypatch):
    case = case_of()
    variants = make_variants(case, make_layers(SMALL, "float32", jax.devices()[0]))
    side = next(side for side in all_sides() if side.name == "xla_ragged_dot")
    monkeypatch.setattr("scripts._bench.sides.free_memory", lambda device: 100)
    with pytest.raises(MemoryError, match="needs 0.0 GB beside its inputs"):
        side.prepare(case, variants)


def test_a_turn_on_a_gpu_is_one_program_of_all_calls(monkeypatch):
    monkeypatch.setattr("scripts._bench.sides.free_memory", lambda device: 10**9)
    calls = [(jnp.full(3, float(number)), jnp.ones(3)) for number in range(4)]
    traced = []

    def add(a, b):
        traced.append(a)
        return a + b

    turn = jax_turn(add, calls, SimpleNamespace(platform="gpu"))
    assert len(traced) == 1  # compiled as one function, for all of the calls
    np.testing.assert_array_equal(turn(), np.ones(3))


@pytest.mark.parity
@pytest.mark.parametrize("operation", ["up", "down", "mlp"])
@pytest.mark.parametrize("routing", ["uniform", "half"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_multiplies_the_same(operation, routing, dtype):
    pytest.importorskip("torch", reason="needs torch: scripts/test --parity")
    case = case_of(operation, routing=routing, dtype=dtype)
    variants = make_variants(case, make_layers(SMALL, dtype, jax.devices()[0]))
    sample = exact_sample(case, variants[0])
    for name in ("torch_grouped_mm", "torch_mm_loop"):
        side = next(side for side in all_sides() if side.name == name)
        error = sample.error(inputs.to_float64(side.prepare(case, variants)(), sample.rows))
        assert error < (1e-6 if dtype == "float32" else 1e-2)


# --- the scripts


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the scripts set for their process."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


JAX_SIDES = ["portable", "xla_ragged_dot", "lax_in_out"]


@pytest.mark.full
def test_bench_kernels_times_or_gives_a_reason(tmp_path, capsys):
    written, drawn = tmp_path / "kernels.json", tmp_path / "kernels.png"
    options = ["--quick", "--rounds", "2", "--tokens", "3", "--routings", "uniform", "one", "--json", str(written)]
    bench_kernels.main([*options, "--roofline", str(drawn), "--backends", *JAX_SIDES, "triton"])
    report = json.loads(written.read_text())
    assert report["machine"]["platform"] == "cpu"
    assert report["machine"]["versions"]["jax"] == jax.__version__
    assert len(report["cases"]) == 3 * 2
    for case in report["cases"]:
        timed = [side for side in case["sides"] if "seconds" in side]
        (refused,) = (side for side in case["sides"] if side not in timed)
        assert [side["side"] for side in timed] == JAX_SIDES
        assert refused["side"] == "triton"
        for side in timed:
            assert len(side["turns"]) == 2
            assert side["error"] < 1e-2
            assert side["of_floor"] == pytest.approx(case["floor_seconds"] / side["seconds"])
        assert "NVIDIA GPUs" in refused["refused"]
    assert drawn.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "quick, mlp, bfloat16" in shown
    assert shown.count("refused: triton: ") == 3


@pytest.mark.full
def test_bench_layer_times_or_gives_a_reason(tmp_path, capsys):
    written = tmp_path / "layer.json"
    options = ["--quick", "--mesh", "tp=2,ep=4", "--dispatch", "all_to_all", "ragged_all_to_all", "--rounds", "1"]
    bench_layer.main([*options, "--kernels", "portable", "--dtype", "float32", "--json", str(written)])
    (case,) = json.loads(written.read_text())["cases"]
    timed, refused, torch = case["sides"]
    assert timed["side"] == "tp=2,ep=4 all_to_all portable"
    assert timed["difference"] < 1e-5
    assert timed["tokens_per_second"] == pytest.approx(case["tokens"] / timed["seconds"])
    assert "cannot run on cpu" in refused["refused"]
    # With torch installed it is timed and gives the same; without, it says what is missing.
    assert torch.get("difference", 0) < 1e-5
    assert torch.get("refused", "is not installed").endswith("is not installed")
    assert "times transformers" in capsys.readouterr().out


@pytest.mark.full
def test_a_batch_that_the_mesh_does_not_divide_is_timed_too(capsys):
    options = ["--quick", "--mesh", "ep=8", "ep=3", "--dispatch", "auto", "--kernels", "portable", "--rounds", "1"]
    bench_layer.main(options)
    assert "ep=3 auto portable" in capsys.readouterr().out


@pytest.mark.full
def test_bench_layer_starts_the_devices_it_needs():
    """In a process of its own, where the compiler for GPUs may be installed, and no GPU is to be seen."""
    script = Path(bench_layer.__file__)
    options = [
        "--quick",
        "--mesh",
        "ep=2",
        "--dispatch",
        "auto",
        "--kernels",
        "portable",
        "--tokens",
        "1",
        "--rounds",
        "1",
    ]
    environ = processes.environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script, *options], env=environ, capture_output=True, text=True, check=False)
    assert "ep=2 auto portable" in done.stdout, done.stderr


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, monkeypatch):
    written, measure = tmp_path / "kernels.json", bench_kernels.measure

    def interrupted(case, *others):
        if case.operation == "down":
            raise KeyboardInterrupt
        return measure(case, *others)

    monkeypatch.setattr(bench_kernels, "measure", interrupted)
    options = ["--quick", "--rounds", "1", "--tokens", "3", "--routings", "one", "--backends", "portable"]
    with pytest.raises(KeyboardInterrupt):
        bench_kernels.main([*options, "--operations", "up", "down", "--json", str(written)])
    (case,) = json.loads(written.read_text())["cases"]
    assert case["operation"] == "up"


def test_a_result_that_is_wrong_has_no_time():
    assert check_error(0.01, "bfloat16") == 0.01
    for error in (math.nan, math.inf):
        with pytest.raises(ArithmeticError, match="the result is not finite"):
            check_error(error, "bfloat16")
    with pytest.raises(ArithmeticError, match="the result is wrong: 0.01 of its norm, where 0.0039 is allowed"):
        check_error(0.01, "float32")


@pytest.mark.parametrize(
    ("script", "option", "value", "message"),
    [
        (bench_kernels, "--shapes", "mixtral", "a shape is one of mixtral-8x7b, .*; got 'mixtral'"),
        (bench_kernels, "--shapes", "8,2,0,64", "experts,per token,width,expert width; got '8,2,0,64'"),
        (bench_layer, "--tokens", "0", "an integer of at least 1; got '0'"),
        (bench_layer, "--mesh", "ep", "a mesh is written dp=1,tp=2,ep=4"),
        (bench_kernels, "--json", "/no/such/folder/x.json", "a file in a folder that exists; got '/no/such/folder"),
        (bench_kernels, "--roofline", "x.bmp", "ends in .png, .pdf or .svg; got 'x.bmp'"),
    ],
)
def test_options_are_refused_before_anything_is_measured(script, option, value, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main([option, value])
    assert re.search(message, capsys.readouterr().err)


def test_write_json_is_all_or_nothing(tmp_path):
    file = tmp_path / "out.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]

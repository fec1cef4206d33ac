"""What "auto" takes: the first kernel that a trial found right, in a process that may crash, hang or print anything."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.grouped_matmul import (
    QuantizedStack,
    backends,
    choose_backend,
    expert_mlp,
    hold_trials,
    tile_table,
    verdicts,
)
from jaxmoe.kernels.grouped_matmul.backends import Backend
from jaxmoe.kernels.grouped_matmul.choose import has_own_gradient
from jaxmoe.kernels.grouped_matmul.gradient import with_pullback
from jaxmoe.kernels.grouped_matmul.trial import MANY, WIDE, WIDE_GRADIENT, try_work
from jaxmoe.kernels.grouped_matmul.work import MatrixKind, Outcome, Work
from tests.support import runs

UP, DOWN = MatrixKind((2, 24, 64), "bfloat16"), MatrixKind((64, 24), "bfloat16")
MLP = Work("bfloat16", (UP, DOWN), biases=True, activation="silu")
PRODUCT = Work("float16", (MatrixKind((24, 64), "float16"),))


def packed(form, block, scales, *shape, **more):
    return MatrixKind(shape, form, block, scales, **more)


FP8 = packed("float8_e4m3fn", (32, 32), "float32", 2, 32, 64), packed("float8_e4m3fn", (32, 32), "float32", 64, 32)
WORKS = {
    "plain": MLP,
    "float32": Work("float32", (MatrixKind((24, 64), "float32"),)),
    "fp8": Work("bfloat16", FP8, activation="silu"),
    "fp8 by fp8": Work("bfloat16", FP8, activation="silu", activations="fp8_block"),
    "fp8 by fp8, powers of two": Work("bfloat16", FP8, activation="silu", activations="fp8_block_e8m0"),
    "static": Work("bfloat16", FP8, activation="silu", activations="fp8_static"),
    "int8 by int8": Work("bfloat16", (packed("int8", (1, 64), "float32", 24, 64),), activations="int8_token"),
    "int4": Work("bfloat16", (packed("int4", (1, 32), "bfloat16", 24, 64, zero_points=True),)),
    "mxfp4": Work(
        "bfloat16",
        (packed("mxfp4", (1, 32), "uint8", 2, 32, 64), packed("mxfp4", (1, 32), "uint8", 64, 32)),
        biases=True,
        activation="clamped_swiglu",
        limit=7.0,
    ),
    "nvfp4": Work("bfloat16", (packed("nvfp4", (1, 16), "float8_e4m3fn", 32, 64, matrix_scales=()),)),
}


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_the_portable_backend_is_right(work):
    assert Work.from_json(work.to_json()) == work
    outcome = try_work(work, "portable", repeats=2)
    assert outcome.verdict == "right", outcome
    assert "2 calls gave the same bits" in outcome.detail


class Faulty:
    """A backend as `reference`, but for one thing."""

    def __init__(self, fault):
        self.fault, self.calls = fault, 0

    def grouped_matmul(self, lhs_RK, rhs_GNK, group_sizes_G, *, out_dtype, device_kind=None):
        if self.fault == "refuses":
            raise NotImplementedError("it multiplies no float16")
        out = backends.BACKENDS["reference"].load().grouped_matmul(lhs_RK, rhs_GNK, group_sizes_G, out_dtype=out_dtype)
        if self.fault == "one number" and len(lhs_RK) > 8:
            out = out.at[3, 5].add(2)
        if self.fault == "unowned rows":
            out = out.at[-1, 0].set(1)
        if self.fault == "NaN":
            out = out.at[0, 0].set(jnp.nan)
        if self.fault == "last bit":
            noise = jax.pure_callback(self.noise, jax.ShapeDtypeStruct((), jnp.float32))
            out = out.at[0, 0].multiply(1 + noise.astype(out.dtype))
        return out

    def noise(self):
        self.calls += 1
        return np.float32(2.0**-10 * (self.calls % 2))


@pytest.mark.parametrize(
    ("fault", "verdict", "detail"),
    [
        ("one number", "wrong", "256 rows, result in float16: a row is off by"),
        ("unowned rows", "wrong", "a row that no group owns, or a group without rows, is not zeros"),
        ("NaN", "wrong", "a result is not finite"),
        ("last bit", "wrong", "of 4 calls gave other bits than the first"),
        ("refuses", "refused", "it multiplies no float16"),
    ],
)
def test_what_is_wrong_is_found(fault, verdict, detail, monkeypatch):
    faulty = SimpleNamespace(formats=frozenset(), activations=frozenset(), load=lambda: Faulty(fault))
    monkeypatch.setitem(backends.BACKENDS, "faulty", faulty)
    outcome = try_work(PRODUCT, "faulty", repeats=4)
    assert (outcome.verdict, detail in outcome.detail) == (verdict, True), outcome


def test_rows_that_stand_many_times_are_held_to_one_result(monkeypatch):
    """So that a trial has tiles enough for every block of a GPU, and few rows to compute in float64."""
    works = ((MLP, WIDE), (WORKS["static"], WIDE), (MLP.of_gradient, WIDE_GRADIENT))
    for work, case in works if runs.full else works[:1]:
        outcome = try_work(work, "portable", repeats=2, cases=(case,))
        assert outcome.verdict == "right", outcome
    faulty = SimpleNamespace(formats=frozenset(), activations=frozenset(), load=lambda: Faulty("one number"))
    monkeypatch.setitem(backends.BACKENDS, "faulty", faulty)
    outcome = try_work(PRODUCT, "faulty", repeats=2, cases=(WIDE,))
    assert outcome.verdict == "wrong"
    assert outcome.detail.startswith("2048 rows, result in float16: a row is off by")


def test_an_index_that_a_kernel_takes_wrongly_is_found(monkeypatch):
    """A layer gives rows by an index, so a trial has to, where a backend gathers rows itself."""
    oracle = backends.BACKENDS["reference"].load()

    def expert_mlp(x, *arguments, index_R=None, **options):
        return oracle.expert_mlp(x if index_R is None else x[jnp.sort(index_R)], *arguments, **options)

    gathering = dataclasses.replace(backends.BACKENDS["portable"], gathers=True)
    monkeypatch.setattr(backends.Backend, "load", lambda self: SimpleNamespace(expert_mlp=expert_mlp))
    monkeypatch.setitem(backends.BACKENDS, "portable", gathering)
    outcome = try_work(MLP, "portable", repeats=2)
    assert outcome.verdict == "wrong"
    assert "rows by an index, result in float32: a row is off" in outcome.detail


@pytest.mark.parametrize("work", [dataclasses.replace(MLP, activation="clamped_swiglu", limit=0.7), PRODUCT])
def test_a_gradient_that_is_right_is_found_to_be(work):
    outcome = try_work(work.of_gradient, "portable", repeats=2)
    assert outcome.verdict == "right", outcome
    assert outcome.detail.startswith("gradients are off by")


class FaultyGradient:
    """A backend as `reference`, but for one thing in its gradient."""

    def __init__(self, fault):
        self.fault = fault

    def missing_gradient(self, rows, *stacks, device_kind=None):
        return "it has none for float16" if self.fault == "none" else ""

    def grouped_matmul(self, lhs_RK, rhs_GNK, group_sizes_G, *, out_dtype, device_kind=None):
        def forward(arrays, sizes):
            return backends.BACKENDS["reference"].load().grouped_matmul(*arrays, sizes, out_dtype=out_dtype)

        def pullback(arrays, sizes, dy):
            dx, dw = jax.vjp(lambda *arrays: forward(arrays, sizes), *arrays)[1](dy)
            if self.fault == "one number":
                dw = dw.at[2, 3, 5].add(4 * jnp.max(jnp.abs(dw[2])))
            if self.fault == "an empty group":
                dw = dw.at[1, 0, 0].set(1)
            return (dx.at[-1].set(1), dw) if self.fault == "unowned rows" else (dx, dw)

        return with_pullback(pullback, forward, (lhs_RK, rhs_GNK), group_sizes_G)


@pytest.mark.parametrize(
    ("fault", "verdict", "detail"),
    [
        ("one number", "wrong", "gradient of 256 rows: a row is off by"),
        ("an empty group", "wrong", "a group without rows, is not zeros"),
        ("unowned rows", "wrong", "a row that no group owns"),
        ("none", "refused", "it has none for float16"),
        ("nothing", "right", "gradients are off by"),
    ],
)
def test_a_gradient_that_is_wrong_is_found(fault, verdict, detail, monkeypatch):
    faulty = SimpleNamespace(formats=frozenset(), activations=frozenset(), load=lambda: FaultyGradient(fault))
    monkeypatch.setitem(backends.BACKENDS, "faulty", faulty)
    outcome = try_work(PRODUCT.of_gradient, "faulty", repeats=2, cases=(MANY,))
    assert (outcome.verdict, detail in outcome.detail) == (verdict, True), outcome


def test_work_is_told_from_arrays():
    rng = np.random.default_rng(0)
    for kind in {kind for work in WORKS.values() for kind in work.matrices}:
        stack = kind.random(rng, 3)
        if isinstance(stack, QuantizedStack):
            stack.check()
        assert MatrixKind.of(stack) == kind


# --- processes

CHILD = """
import json, os, signal, sys, time
kind = sys.argv[1]
print("a greeting")
for number, line in enumerate(sys.stdin):
    rows = json.loads(line)["rows"]
    if rows == "bfloat16" and kind != "well":
        if kind == "hangs":
            time.sleep(100)
        if kind == "crashes":
            sys.stderr.write("CUDA error: an illegal instruction\\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGABRT)
        if kind == "prints garbage":
            print('{"verdict": ')
            print("[1, 2]")
            sys.exit(3)
    print(json.dumps({"verdict": "right", "detail": os.environ["CUDA_VISIBLE_DEVICES"]}), flush=True)
"""
DEVICE = SimpleNamespace(
    device_kind="NVIDIA H100 80GB HBM3",
    platform="gpu",
    compute_capability="9.0",
    local_hardware_id=1,
    client=SimpleNamespace(platform_version="cuda 13"),
)


def run_child(kind, works, tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(verdicts, "START_SECONDS", 12 if kind == "hangs" else 60)
    monkeypatch.setattr(verdicts, "WORK_SECONDS", 0)
    return verdicts.run_in_processes(kind, works, DEVICE, command=[sys.executable, str(script)])


def test_trials_run_on_the_device_that_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert run_child("well", [MLP, PRODUCT], tmp_path, monkeypatch) == [Outcome("right", "6")] * 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert run_child("well", [MLP], tmp_path, monkeypatch) == [Outcome("right", "1")]


@pytest.mark.parametrize(
    ("kind", "verdict", "detail"),
    [
        ("crashes", "crashed", "exit status -6: CUDA error: an illegal instruction"),
        ("hangs", "hung", "no result after 12 s"),
        ("prints garbage", "crashed", "exit status 3: nothing on stderr"),
    ],
)
def test_a_trial_that_does_not_end_well_loses_only_itself(kind, verdict, detail, tmp_path, monkeypatch):
    first, second, third = run_child(kind, [PRODUCT, MLP, PRODUCT], tmp_path, monkeypatch)
    assert (first.verdict, third.verdict) == ("right", "right")
    assert second == Outcome(verdict, detail)


def test_a_process_that_does_not_start_says_nothing_of_the_kernel():
    command = [sys.executable, "-c", "raise ImportError('no jax here')"]
    outcomes = verdicts.run_in_processes("triton", [MLP, PRODUCT], DEVICE, command=command)
    assert outcomes == [Outcome("untested", "the trial did not start: ImportError: no jax here")] * 2


def test_the_trial_as_a_program():
    """The real one, on the CPU: what it prints is read."""
    cpu = SimpleNamespace(**vars(DEVICE) | {"local_hardware_id": 0})
    (outcome, refused) = verdicts.run_in_processes(
        "portable", [PRODUCT, dataclasses.replace(PRODUCT, rows="nonsense")], cpu
    )
    assert outcome.verdict == "right", outcome
    assert refused.verdict == "crashed"
    assert "TypeError" in refused.detail


# --- what is remembered, and what is taken of it


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A mesh of one GPU, as far as verdicts look at it; nothing known of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(verdicts, "is_present", lambda device: True)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(backends, "missing_libdevice", str)
    tile_table._read.cache_clear()
    yield SimpleNamespace(devices=np.array([DEVICE]), local_devices=[DEVICE], is_multi_process=False)
    tile_table._read.cache_clear()


class Runs:
    """A run of trials that gives what it was told, of gradients "right" unless told, and notes what it was asked."""

    def __init__(self, *, gradients="right", **said):
        self.said, self.gradients, self.asked, self.asked_gradients = said, gradients, [], []

    def __call__(self, backend, works, device):
        self.asked += [(backend, work) for work in works if not work.gradient]
        self.asked_gradients += [(backend, work) for work in works if work.gradient]
        said = self.said.get(backend, "right")
        return [Outcome(self.gradients if work.gradient else said, "as told") for work in works]


def mlp_arrays():
    """Rows, matrices and sizes of `MLP`, and its biases by name."""
    arrays = [jnp.ones(shape, jnp.bfloat16) for shape in ((8, 64), (2, *UP.shape), (2, *DOWN.shape))]
    biases = {"b_gate_up_p2F": jnp.zeros((2, 2, 24)), "b_down_pD": jnp.zeros((2, 64))}
    return [*arrays, jnp.array([3, 5], jnp.int32)], biases


def taken(work=MLP, **options):
    return choose_backend(work, DEVICE.device_kind, **options)


def test_the_first_that_is_right_is_taken(gpu):
    assert taken() == ("portable", "it runs everywhere, and no other was tried here")
    run = Runs()
    hold_trials(gpu, [MLP, MLP, PRODUCT], run=run)
    assert run.asked == [("mosaic_gpu", MLP), ("mosaic_gpu", PRODUCT)]
    assert taken() == ("mosaic_gpu", "right in a trial on this GPU")


@pytest.mark.parametrize("verdict", ["wrong", "refused", "crashed", "hung", "untested"])
def test_what_is_not_right_is_passed_by(gpu, verdict):
    run = Runs(mosaic_gpu=verdict)
    hold_trials(gpu, [MLP], run=run)
    assert [name for name, _ in run.asked] == ["mosaic_gpu", "triton"]
    told = "refused: as told" if verdict == "refused" else verdict
    assert taken() == ("triton", f"right in a trial on this GPU; mosaic_gpu {told}")


def test_its_gradient_is_tried_with_it(gpu):
    """Where it may have kernels for that: not for packed matrices, nor for rows of float16."""
    run = Runs()
    hold_trials(gpu, [MLP, PRODUCT, WORKS["mxfp4"]], run=run)
    assert run.asked_gradients == [("mosaic_gpu", MLP.of_gradient)]
    assert has_own_gradient("mosaic_gpu", MLP, DEVICE.device_kind)
    assert "gradient" not in taken().why


@pytest.mark.parametrize("verdict", ["wrong", "refused", "crashed", "hung", "untested"])
def test_a_gradient_that_is_not_right_is_the_portable_one_and_says_so(gpu, verdict, monkeypatch):
    assert has_own_gradient("mosaic_gpu", MLP, DEVICE.device_kind)  # named, and not tried
    hold_trials(gpu, [MLP], run=Runs(gradients=verdict))
    assert not has_own_gradient("mosaic_gpu", MLP, DEVICE.device_kind)
    why = f"its gradient is the portable one, for its own is {verdict}: as told"
    assert taken() == ("mosaic_gpu", f"right in a trial on this GPU; {why}")
    # And it is asked for as that.
    seen = []
    run = lambda *args, **options: seen.append(options["portable_gradient"])  # noqa: E731
    module = SimpleNamespace(expert_mlp=run, grouped_matmul=run)
    monkeypatch.setattr(backends.GPUBackend, "load", lambda self: module)
    arrays, biases = mlp_arrays()
    for backend in ("auto", "mosaic_gpu"):
        expert_mlp(*arrays, **biases, backend=backend, device_kind=DEVICE.device_kind)
    assert seen == [True, True]


def test_a_kernel_that_does_not_compile_here_is_not_tried(gpu, monkeypatch):
    monkeypatch.setattr(backends, "missing_libdevice", lambda: "no libdevice: install it")
    run = Runs()
    hold_trials(gpu, [MLP], run=run)
    assert [name for name, _ in run.asked] == ["triton"]
    assert taken().why == "right in a trial on this GPU; mosaic_gpu refused: no libdevice: install it"
    # It may be there for the next process, which asks no file.
    assert ("mosaic_gpu", MLP) not in verdicts.read_verdicts(verdicts.verdict_file(DEVICE))


def test_nothing_right_leaves_the_portable_one_and_says_why(gpu):
    hold_trials(gpu, [MLP], run=Runs(mosaic_gpu="hung", triton="wrong"))
    assert taken() == ("portable", "mosaic_gpu hung: as told; triton wrong: as told")


def test_ragged_dot_is_tried_where_xla_fuses_it(gpu, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_experimental_use_ragged_dot_fusion=true")
    hold_trials(gpu, [MLP], run=Runs(mosaic_gpu="hung", triton="wrong"))
    assert taken().backend == "xla_ragged_dot"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_experimental_use_ragged_dot_fusion=false")
    assert verdicts.candidates(DEVICE) == ("mosaic_gpu", "triton")


def test_packed_matrices_are_not_tried_with_what_takes_none(gpu):
    run = Runs(mosaic_gpu="wrong")
    hold_trials(gpu, [WORKS["mxfp4"]], run=run)
    assert [name for name, _ in run.asked] == ["mosaic_gpu"]
    assert "triton refused: it takes no matrices packed as mxfp4" in taken(WORKS["mxfp4"]).why


def test_every_process_goes_by_the_verdicts_of_the_first(gpu, monkeypatch):
    said, told = [], []
    gpu.is_multi_process = True
    monkeypatch.setattr(verdicts.distributed, "check_same", told.append)
    monkeypatch.setattr(verdicts.distributed, "broadcast", lambda values: said.append(values) or values)
    hold_trials(gpu, [MLP, PRODUCT], run=Runs(mosaic_gpu="wrong"))
    theirs = verdicts._known[DEVICE.device_kind]
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(verdicts.distributed, "is_first", lambda: False)
    monkeypatch.setattr(verdicts.distributed, "broadcast", lambda values: said.pop(0))
    hold_trials(gpu, [MLP, PRODUCT], run=None)
    assert verdicts._known[DEVICE.device_kind] == theirs
    assert len(theirs) == 5  # and one of the gradient
    assert told[0] == told[1]


def test_verdicts_are_found_out_once(gpu, monkeypatch):
    hold_trials(gpu, [MLP], run=Runs(mosaic_gpu="crashed", triton="untested"))
    again = Runs()
    hold_trials(gpu, [MLP], run=again)
    assert again.asked == []
    # The next process: what a trial said is in the cache, and one that was not held is held.
    monkeypatch.setattr(verdicts, "_known", {})
    hold_trials(gpu, [MLP], run=again)
    assert again.asked == [("triton", MLP)]
    assert taken().backend == "triton"
    # Other sources, driver or versions: all anew.
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(verdicts, "sources_digest", lambda: "others")
    hold_trials(gpu, [MLP], run=again)
    assert again.asked[1:] == [("mosaic_gpu", MLP)]


def test_a_cache_that_cannot_be_read_or_written_is_no_obstacle(gpu, monkeypatch):
    file = verdicts.verdict_file(DEVICE)
    file.parent.mkdir(parents=True)
    file.write_text("{")
    hold_trials(gpu, [MLP], run=Runs())
    assert json.loads(file.read_text())["verdicts"][0]["verdict"] == "right"
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    hold_trials(gpu, [MLP], run=Runs())
    assert taken().backend == "mosaic_gpu"


def measured(kernel, N, K, out_dtype, seconds):
    key = {"kernel": kernel, "dtype": "bfloat16", "out_dtype": out_dtype, "K": K, "N": N, "row_class": 4}
    return key | {"tiles": {}, "seconds": seconds}


def test_what_was_measured_to_be_faster_goes_first(gpu):
    entries = [measured("triton.gate_up", 48, 64, "bfloat16", 1e-5), measured("triton", 64, 24, "float32", 1e-5)]
    tile_table.write_table({"device": DEVICE.device_kind, "entries": entries}, tile_table.user_tables())
    run = Runs()
    hold_trials(gpu, [MLP], run=run)
    assert [name for name, _ in run.asked] == ["mosaic_gpu", "triton"]
    assert taken(rows_per_group=3) == ("triton", "20 us were measured, and it is right here")
    assert taken(rows_per_group=5).backend == taken().backend == "mosaic_gpu"


def test_measured_or_not_what_is_wrong_is_not_taken(gpu):
    entries = [measured("triton.gate_up", 48, 64, "bfloat16", 1e-5), measured("triton", 64, 24, "float32", 1e-5)]
    tile_table.write_table({"device": DEVICE.device_kind, "entries": entries}, tile_table.user_tables())
    hold_trials(gpu, [MLP], run=Runs(triton="wrong"))
    assert taken(rows_per_group=3).backend == "mosaic_gpu"


def test_auto_of_the_products_asks_for_it(gpu, monkeypatch):
    """With biases and a kind of device; what runs is what was found right."""
    arrays, biases = mlp_arrays()
    hold_trials(gpu, [MLP], run=Runs())
    seen = []
    monkeypatch.setitem(backends.GPU_BACKENDS, "mosaic_gpu", Backend(module="tests.kernels.test_verdicts"))
    monkeypatch.setattr(
        backends.Backend, "load", lambda self: SimpleNamespace(expert_mlp=lambda *a, **k: seen.append(self))
    )
    expert_mlp(*arrays, **biases, device_kind=DEVICE.device_kind)
    expert_mlp(*arrays, device_kind=DEVICE.device_kind)
    assert [each.module.rpartition(".")[2] for each in seen] == ["test_verdicts", "portable"]

"""Measured rates and times stand in place of modeled ones, for exactly what they are of, and say where they are from."""

import json
from pathlib import Path

import pytest

from jaxmoe.checkpoint.mapping import abstract_model
from jaxmoe.cli import main
from jaxmoe.hardware import GPUS
from jaxmoe.models import get_family
from jaxmoe.planning import read_measured, search_meshes, step_time, sweep
from jaxmoe.planning.measured import RATES, TERMS
from tests.support.published import QWEN3_30B

ROOT = Path(__file__).resolve().parents[2]

H100 = GPUS["h100"]
RAW = QWEN3_30B | {"num_hidden_layers": 2, "torch_dtype": "bfloat16"}
CONFIG = get_family("qwen3_moe").read_config(RAW)
ABOUT = {"device": H100.name, "versions": {"jax": "0.11.2"}}
EXPERTS = {"term": "experts", "slots": 16, "width": 2048, "expert_width": 768, "dtype": "bfloat16"}
PART = {"term": "part", "phase": "decode", "model_type": "qwen3_moe", "layers": 2, "width": 2048, "dtype": "bfloat16"}
PART |= {"packed": False, "mesh": {"ep": 8}, "expert_axes": ["ep"], "length": 4096}


def write(path, *, name="own.json", **fields):
    (path / name).write_text(json.dumps(ABOUT | fields))
    return path / name


def decode(*files, batch_size=64, mesh=None, **options):
    model = abstract_model(CONFIG, sizes={"dp": 1, "tp": 1, "ep": 8} | (mesh or {}), dtype="bfloat16")
    measured = read_measured(files, H100)
    return step_time(model, "decode", batch_size=batch_size, length=4096, gpu=H100, measured=measured, **options)


def session(*lines, device=H100.name):
    """Lines of a session, as `scripts/gpu_session` writes them."""
    about = {"job": "machine", "kind": "machine", **ABOUT, "device": device, "platform": "gpu", "driver": "580.1"}
    return "".join(json.dumps(line) + "\n" for line in ({"job": "x", "status": "done", "why": ""}, about, *lines))


def speed(tokens, seconds, **more):
    shape = {"experts": 16, "per_token": 8, "width": 2048, "expert_width": 768, "dtype": "bfloat16"}
    line = {"kind": "speed", "shape": "q", "routing": "uniform", "side": "portable", "tuned": False, "fusion": False}
    return line | shape | {"tokens": tokens, "seconds": seconds} | more


def test_rates_take_the_place_of_the_published(tmp_path) -> None:
    rates = {"memory_bandwidth": H100.memory_bandwidth / 2, "within": H100.links.within / 2, "latency": 0}
    plain, ours = decode(mesh={"tp": 8, "ep": 1}), decode(write(tmp_path, rates=rates), mesh={"tp": 8, "ep": 1})
    assert (ours.dense, ours.cache) == (pytest.approx(2 * plain.dense), pytest.approx(2 * plain.cache))
    per_sum = 5 * H100.links.latency  # embedding, attention of two layers, logits; no other layer is dense
    assert ours.sums == pytest.approx(2 * (plain.sums - per_sum + H100.links.latency))
    assert set(ours.sources.values()) == {"modeled"}
    faster = decode(write(tmp_path, name="flops.json", rates={"flops": 1e9}))
    assert faster.dense > 100 * plain.dense


def test_a_time_is_taken_for_exactly_its_term_and_interpolated_between_counts(tmp_path) -> None:
    terms = [EXPERTS | {"rows": rows, "seconds": seconds} for rows, seconds in ((32, 1.0), (96, 3.0))]
    file = write(tmp_path, terms=terms)
    # 8 choices of so many tokens over 8 devices are as many rows.
    for batch_size, seconds in ((32, 1.0), (64, 2.0), (96, 3.0), (80, 2.5)):
        step = decode(file, batch_size=batch_size)
        assert step.experts == pytest.approx(2 * seconds)
        assert step.sources["experts"] == f"measured, {file}"
        assert {source for name, source in step.sources.items() if name != "experts"} == {"modeled"}
    assert decode(file, batch_size=48, skew=2.0).experts == pytest.approx(2 * 3.0)
    # Beyond what was measured, on devices that hold another part, and for packed or wider numbers, it is modeled.
    for options in ({"batch_size": 31}, {"batch_size": 97}, {"mesh": {"ep": 4}}, {"mesh": {"tp": 8, "ep": 1}}):
        assert decode(file, **options) == decode(**options)
    other = write(tmp_path, name="other.json", terms=[term | {"dtype": "float32"} for term in terms])
    assert decode(other) == decode()


def test_collectives_within_a_node_and_whole_parts_are_taken(tmp_path) -> None:
    one_sum = {"term": "collective", "op": "all-reduce", "devices": 8}
    file = write(tmp_path, terms=[one_sum | {"bytes": nbytes, "seconds": 1.0} for nbytes in (1e3, 1e9)])
    mesh = {"tp": 8, "ep": 1}
    step = decode(file, mesh=mesh)
    assert step.sums == pytest.approx(3, rel=1e-3)  # the logits are gathered
    assert step.sources["sums"] == step.sources["exchange"] == f"measured in part, {file}"
    assert decode(file, mesh=mesh, devices_per_node=4) == decode(mesh=mesh, devices_per_node=4)
    for part in ("dense", "experts", "cache", "exchange", "sums"):
        file = write(tmp_path, terms=[PART | {"part": part, "batch_size": 64, "seconds": 7.0}])
        step = decode(file)
        assert step.terms()[part] == 7.0
        assert step.sources[part] == f"measured, {file}"
        assert decode(file, batch_size=63) == decode(batch_size=63)


def test_a_session_gives_rates_collectives_and_the_fastest_kernel(tmp_path) -> None:
    lines = [
        {"kind": "ceilings", "flops_per_second": 7e14, "bytes_per_second": 3e12},
        {"kind": "rates", "memory_bandwidth": 2.9e12, "within": 3e11, "latency": 2e-5, "file": "f"},
        {"kind": "exchange", "collective": "all_reduce", "bytes": 4096, "seconds": 1e-5, "devices": 8},
        speed(8, 5.0),
        speed(8, 4.0, side="triton"),
        speed(8, 1.0, side="torch_grouped_mm"),
        speed(8, 1.0, routing="one"),
        speed(8, 1.0, side="xla_ragged_dot", fusion=True),
        {"kind": "speed_refused", "left_out": "no room"},
    ]
    (tmp_path / "results.jsonl").write_text(session(*lines) + '{"kind": "spe')
    found = read_measured(tmp_path, H100)
    device = found.device(H100)
    assert (device.memory_bandwidth, device.flops, device.links.within, device.links.latency) == (
        3e12,
        7e14,
        3e11,
        2e-5,
    )
    assert device.links.between == H100.links.between
    same = {name: EXPERTS[name] for name in ("slots", "width", "expert_width", "dtype")}
    assert found.seconds("experts", 64, **same).seconds == 4.0
    assert found.seconds("collective", 4096, op="all-reduce", devices=8).seconds == 1e-5
    [line] = found.describe(H100)
    assert f"{tmp_path / 'results.jsonl'}, measured on {H100.name}, jax 0.11.2, driver 580.1: " in line
    assert "memory_bandwidth 3e+12 (published 3.35e+12)" in line
    assert "1 times of experts, 1 times of collective" in line


def test_a_file_of_rates_that_auto_goes_by_is_read_too(tmp_path) -> None:
    from jaxmoe.dispatch.rates import write_rates
    from jaxmoe.hardware import Links

    links = Links(within=3e11, between=3e11, latency=2e-5)
    file = write_rates(
        H100.name, 8, memory_bandwidth=3e12, links=links, machine={"date": "2026-01-31"}, folder=tmp_path
    )
    found = read_measured(file, H100)
    assert found.device(H100).links.within == 3e11
    assert found.device(H100).links.between == H100.links.between
    assert f"{H100.name}, 8 devices, unknown versions, date 2026-01-31" in found.describe(H100)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (session(device="cpu"), "was measured on 'cpu', and the plan is for 'NVIDIA H100 80GB HBM3'"),
        (json.dumps(ABOUT | {"device": "h200"}), "was measured on 'h200'"),
        (json.dumps({"rates": {}}), r"no measurements that a plan can read \('device'\)"),
        ("seconds: 3", "no measurements that a plan can read"),
        (json.dumps({"kind": "ceilings"}), "no line tells the machine"),
        (json.dumps(ABOUT | {"times": []}), "fields are device, .*; got times"),
        (json.dumps(ABOUT | {"rates": {"speed": 1}}), "rates are memory_bandwidth, .*; got 'speed'"),
        (json.dumps(ABOUT | {"rates": {"flops": -1}}), "flops is a finite number above 0; got -1"),
        (json.dumps(ABOUT | {"terms": [{"term": "dense"}]}), "terms are experts, collective, part; got 'dense'"),
        (json.dumps(ABOUT | {"terms": [EXPERTS]}), "a term has the fields term, slots, .*, rows, seconds; got"),
        (json.dumps(ABOUT | {"terms": [EXPERTS | {"rows": 1, "seconds": 0}]}), "seconds is a finite number above 0"),
        (
            json.dumps(ABOUT | {"terms": [PART | {"part": "rest", "batch_size": 1, "seconds": 1}]}),
            "part is one of dense,",
        ),
        (
            json.dumps(ABOUT | {"terms": [PART | {"part": "sums", "mesh": {"pp": 2}, "batch_size": 1, "seconds": 1}]}),
            "axes of a mesh are dp, tp, ep; got pp",
        ),
        (
            json.dumps(ABOUT | {"terms": [EXPERTS | {"slots": "16", "rows": 1, "seconds": 1}]}),
            "slots of experts is of the kind int; got '16'",
        ),
        (
            json.dumps(ABOUT | {"terms": [EXPERTS | {"rows": 1, "seconds": seconds} for seconds in (1, 2)]}),
            "the time of experts 16, 2048, 768, bfloat16 at 1 is 1 in .* and 2 in",
        ),
    ],
)
def test_what_is_no_measurement_of_the_device_is_refused(tmp_path, text, message) -> None:
    (tmp_path / "wrong").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_measured(tmp_path / "wrong", H100)


def test_the_page_has_such_a_file(tmp_path) -> None:
    page = (ROOT / "docs" / "how_to" / "choose_a_mesh.md").read_text()
    (tmp_path / "page.json").write_text(page.partition("```json\n")[2].partition("```")[0])
    found = read_measured(tmp_path / "page.json", H100)
    assert set(found.rates) == set(RATES)
    assert {term for term, *_ in found.times} == set(TERMS)


def test_two_files_agree(tmp_path) -> None:
    one = write(tmp_path, name="one.json", rates={"flops": 7e14})
    same = write(tmp_path, name="same.json", rates={"flops": 7e14, "within": 3e11})
    other = write(tmp_path, name="other.json", rates={"flops": 6e14})
    assert read_measured([one, same], H100).device(H100).links.within == 3e11
    with pytest.raises(
        ValueError, match=r"measurements agree: flops is 7e\+14 in .*one.json and 6e\+14 in .*other.json"
    ):
        read_measured([one, other], H100)
    with pytest.raises(FileNotFoundError):
        read_measured(tmp_path / "none.json", H100)


def test_searches_sweeps_and_the_command_say_what_is_measured(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    file = write(
        tmp_path, terms=[PART | {"part": part, "batch_size": 64, "seconds": 1e-9} for part in ("dense", "cache")]
    )
    modeled = search_meshes(tmp_path, 8, device="h100", batch_size=64)
    found = search_meshes(tmp_path, 8, device="h100", batch_size=64, measured=file)
    # What its attention and its head take by the model keeps it from the first place.
    assert str(modeled.choices[0]) != str(found.choices[0]) == "dp=1,tp=1,ep=8, experts over ep"
    assert f"cache 0% (measured, {file})" in found.explain()[1]
    assert "(modeled)" in found.explain()[1]
    assert found.explain()[-1] == f"{file}, measured on {H100.name}, jax 0.11.2: 2 times of part"
    [point] = sweep(tmp_path, ep=8, device="h100", batch_sizes=[64], lengths=[4096], measured=[file])
    assert point.decode.cache == 1e-9
    options = ["plan", str(tmp_path), "--device", "h100", "--measured", str(file)]
    assert main([*options, "--devices", "8", "--batch-size", "64"]) == 0
    assert f"measured,{file}" in "".join(capsys.readouterr().out.split())
    assert main([*options, "--mesh", "ep=8", "--batch-size", "64", "--sweep", "batch"]) == 0
    assert "2 times of part" in " ".join(capsys.readouterr().out.split())
    assert main([*options, "--mesh", "ep=8"]) == 1
    assert (
        "--measured is for modeled times: give --devices, --sweep or a comparison of placements with it"
        in capsys.readouterr().err
    )

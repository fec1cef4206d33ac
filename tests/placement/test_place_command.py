"""``jaxmoe place``, as a person types it."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from jaxmoe import ExpertPlacement, RoutingTrace
from jaxmoe.cli import place as command
from jaxmoe.placement import placements_from_json, placements_to_json
from jaxmoe.placement.synthetic import synthetic_trace
from tests.support.goldens import GOLDENS

RECORDER = Path(__file__).parent.parent / "checkpoint" / "data" / "torch_recorder.pt"
DEMO = Path(__file__).parents[2] / "demo"
WIDTHS = ["--hidden-size", "64", "--moe-intermediate-size", "32"]


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "trace.npz"
    synthetic_trace(num_experts=16, experts_per_token=2, num_layers=2, num_windows=4, tokens_per_window=64).save(path)
    return str(path)


def place(*words: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    parser.set_defaults(usage_error=parser.error)
    command.run(parser.parse_args(words))


def test_a_table_and_the_best_placement(trace_file, tmp_path, capsys) -> None:
    output = tmp_path / "best.json"
    place(trace_file, "--ep", "4", "--num-slots", "20", "--by", "vllm_balancedness", "-o", str(output), *WIDTHS)
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("strategy")
    assert {line.split()[0] for line in out.splitlines()[1:]} >= {"linear", "eplb", "affinity"}
    assert f"written to {output}" in err
    placements = placements_from_json(output.read_text())
    assert [(p.num_experts, p.ep, p.num_slots) for p in placements] == [(16, 4, 20)] * 2


def test_json_for_machines(trace_file, tmp_path, capsys) -> None:
    now = tmp_path / "now.json"
    now.write_text(placements_to_json([ExpertPlacement.linear(16, 4)] * 2))
    mine = tmp_path / "mine.json"
    mine.write_text(ExpertPlacement.round_robin(16, 4).to_json())
    words = ["--before", str(now), "--include", str(mine), "--strategies", "linear,eplb", "--num-nodes", "2", "--bound"]
    place(trace_file, "--ep", "4", "--json", *words, *WIDTHS)
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert list(result["strategies"]) == [str(mine), "linear", "eplb"]
    assert result["best"] in result["strategies"]
    assert sum(result["strategies"]["linear"]["migration_bytes"].values()) == 0
    assert result["strategies"]["eplb"]["replica_bound"] >= 1


def test_a_config_alone_is_enough(tmp_path, capsys) -> None:
    config = {"model_type": "of_no_family_here", "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 2, "num_hidden_layers": 2}))
    place("--synthetic", "--config", str(tmp_path), "--ep", "2", "--strategies", "linear,eplb")
    assert "2 layers of 8 experts" in capsys.readouterr().err


def test_a_trace_of_vllm(tmp_path, capsys) -> None:
    np.save(tmp_path / "routed.npy", np.random.default_rng(0).integers(0, 8, (64, 2, 2)))
    place(str(tmp_path / "routed.npy"), "--num-experts", "8", "--window", "16", "--ep", "2", *WIDTHS)
    assert "2 layers of 8 experts, 4 windows, 64 tokens" in capsys.readouterr().err


def test_a_trace_of_sglang_with_tokens(capsys) -> None:
    place(str(RECORDER), "--ep", "2", "--strategies", "linear,affinity", *WIDTHS)
    assert "2 layers of 4 experts, 3 windows, 12 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "layers"),
    [("dbrx", 2), ("ernie4_5_moe", 2), ("jamba", 1), ("llama4", 1), ("nemotron_h", 1), ("qwen2_moe", 2), ("gemma4", 2)],
)
def test_every_familys_config_tells_its_sizes(family, layers, capsys) -> None:
    config = GOLDENS / family / "original"
    place("--synthetic", "--config", str(config), "--ep", "2", "--strategies", "linear", "--num-slots", "12")
    experts = 5 if family == "gemma4" else 11
    assert f"{layers} layers of {experts} experts" in capsys.readouterr().err


def test_a_model_without_experts_is_refused(tmp_path) -> None:
    config = json.loads((GOLDENS / "qwen3_moe" / "original" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [0, 1]}))
    with pytest.raises(ValueError, match="a model without experts"):
        place("--synthetic", "--config", str(tmp_path), "--ep", "2")


def test_two_recordings_are_one_after_the_other(trace_file, tmp_path, capsys) -> None:
    for name, half in zip("ab", RoutingTrace.load(trace_file).halves(), strict=True):
        half.save(tmp_path / f"{name}.npz")
    tables = []
    for files in ([trace_file], [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]):
        place(*files, "--ep", "4", *WIDTHS)
        tables.append(capsys.readouterr())
    assert tables[0] == tables[1]


def test_an_expert_map_for_people_and_for_machines(trace_file, tmp_path, capsys) -> None:
    words = [trace_file, "--ep", "4", "--strategies", "eplb", "--num-slots", "20", "--expert-map", "3", *WIDTHS]
    output = tmp_path / "best.json"
    place(*words, "-o", str(output))
    placements = placements_from_json(output.read_text())
    maps = [
        [placement.device_experts(3).index(e) if e in placement.device_experts(3) else -1 for e in range(16)]
        for placement in placements
    ]
    lines = [line for line in capsys.readouterr().out.splitlines() if "rank" in line]
    assert lines == [f"eplb, MoE layer {i}, rank 3: {' '.join(map(str, slots))}" for i, slots in enumerate(maps)]
    place(*words, "--json")
    assert json.loads(capsys.readouterr().out)["expert_map"] == maps


def test_an_expert_location_for_sglang(tmp_path, capsys) -> None:
    """Of three layers the first is dense; the map has a row for it all the same, and can be judged here again."""
    config = {"model_type": "novel", "hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8}
    config |= {"num_experts_per_tok": 2, "num_hidden_layers": 3, "first_k_dense_replace": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    location, output = tmp_path / "location.json", tmp_path / "best.json"
    words = ["--synthetic", "--config", str(tmp_path), "--ep", "2", "--num-slots", "10"]
    place(*words, "--strategies", "eplb", "--expert-location", str(location), "-o", str(output))
    assert f"--init-expert-location {location} --ep-num-redundant-experts 2\n" in capsys.readouterr().err
    rows = json.loads(location.read_text())["physical_to_logical_map"]
    placements = placements_from_json(output.read_text())
    assert rows == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1], *[placement.slot_to_expert.tolist() for placement in placements]]
    place(*words, "--strategies", "eplb", "--include", str(location), "--before", str(location), "--json")
    strategies = json.loads(capsys.readouterr().out)["strategies"]
    judged, made = strategies[str(location)], strategies["eplb"]
    assert judged["layer_max_over_mean"] == made["layer_max_over_mean"]
    assert sum(made["migration_bytes"].values()) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.npz", *WIDTHS], "the trace absent.npz is no file"),
        (["TRACE", "--num-experts", "8", *WIDTHS], "the trace has 16, and --config or --num-experts says 8"),
        (["TRACE", "-o", "absent/best.json", *WIDTHS], "the directory of --output absent/best.json does not exist"),
        (["TRACE", "--device-speeds", "1,0,1,1", *WIDTHS], "device_speeds are finite and above 0"),
        (["TRACE"], "pass --config, or --hidden-size and --moe-intermediate-size"),
        (
            ["TRACE", "--expert-location", "absent/l.json", "--config", str(DEMO)],
            "the directory of --expert-location absent/l.json does not exist",
        ),
        (
            ["--synthetic", "--expert-location", "l.json", "--config", str(DEMO), "--num-slots", "17"],
            "of 20 slots of MoE layer 0, 3 are padding",
        ),
        (["TRACE", "--strategies", "best", *WIDTHS], "placement strategies are .*; got 'best'"),
        (["TRACE", "--by", "beauty", *WIDTHS], "strategies are ranked by"),
        (["TRACE", "--before", "absent.json", *WIDTHS], "the placement file absent.json does not exist"),
        (["TRACE", "--num-nodes", "3", *WIDTHS], "4 devices are no multiple of num_nodes=3"),
        (["--synthetic", *WIDTHS], "--synthetic takes the numbers of experts, choices and layers from --config"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(trace_file, words, message) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        place(*[trace_file if word == "TRACE" else word for word in words], "--ep", "4")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--ep", "4"],
        ["TRACE", "--synthetic", "--ep", "4"],
        ["TRACE", "--ep", "0"],
        ["TRACE", "--ep", "4", "--strategies", ","],
        ["TRACE", "--ep", "2", "--device-slots", "8.5,8"],
        ["TRACE", "--ep", "2", "--expert-map", "2"],
        ["TRACE", "--ep", "2", "--expert-location", "location.json"],
    ],
)
def test_wrong_usage(trace_file, words, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        place(*[trace_file if word == "TRACE" else word for word in words])
    assert stopped.value.code == 2
    assert capsys.readouterr().err

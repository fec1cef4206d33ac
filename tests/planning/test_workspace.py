"""What a step needs beside weights and cache: the estimate against compiled programs, and what has to follow from it."""

import json

import pytest

from jaxmoe.cli import main
from jaxmoe.models import get_family
from jaxmoe.planning import compile_few_layers, plan, search_meshes, sweep
from jaxmoe.planning.few_layers import repetition
from jaxmoe.planning.memory import DISPATCH, TEMPORARIES
from tests.support.families import FAMILIES
from tests.support.meshes import mesh_of
from tests.support.published import DEEPSEEK_V3, DEEPSEEK_V3_FP8, QWEN3_30B

SIZES = {"batch_size": 4, "prompt_length": 96, "max_length": 128}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen")
    (path / "config.json").write_text(json.dumps(QWEN3_30B | {"num_hidden_layers": 2, "torch_dtype": "bfloat16"}))
    return path


def config_of(family: str, layers: int):
    sizes = {"hidden_size": 256, "num_hidden_layers": layers, "vocab_size": 512}
    return get_family(family).read_config({"model_type": family, **FAMILIES[family], **sizes})


@pytest.fixture(scope="module")
def steps():
    """Both steps of four layers, of which one and two are compiled; and of all four."""
    options = {"dtype": "float32", **SIZES}
    return [
        compile_few_layers(config_of("mixtral", 4), mesh_of(1, 2, 2), every_layer=every_layer, **options)
        for every_layer in (False, True)
    ]


@pytest.mark.full
def test_layers_that_are_left_out_are_counted_to_the_byte(steps) -> None:
    few, every = steps
    assert few.keys() == every.keys() == {"prefill", "decode"}
    for name, step in few.items():
        assert (step.layers, step.compiled) == (4, (1, 2))
        assert (every[name].layers, every[name].compiled) == (4, (4,))
        assert step.argument_bytes == every[name].argument_bytes
        assert step.wire_bytes == every[name].wire_bytes


def test_the_fewest_layers_that_repeat_are_found() -> None:
    for kinds, expected in (
        ("aaaa", (0, 1)),
        ("dddmmmm", (3, 1)),
        ("fsfsfs", (0, 2)),
        ("fsfsf", (1, 2)),
        ("dfssfssfss", (1, 3)),
        ("abcd", (3, 1)),
        ("a", (1, 1)),
    ):
        first, period = repetition(kinds)
        assert (first, period) == expected, kinds
        assert (len(kinds) - first) % period == 0


def test_a_plan_a_search_and_a_sweep_count_the_same(qwen) -> None:
    options = {"device": "h100", "batch_size": 32, "max_length": 4096, "prompt_length": 3000}
    planned = plan(qwen, ep=4, **options)
    assert {DISPATCH, TEMPORARIES} < planned.parts.keys()
    assert sum(part[0] for name, part in planned.parts.items() if name in (DISPATCH, TEMPORARIES)) == max(
        planned.step_bytes.values()
    )
    everywhere = max(planned.bytes_per_device.values())
    [choice] = [
        choice
        for choice in search_meshes(qwen, 4, **options).choices
        if (choice.mesh, choice.expert_axes) == (planned.mesh, ("ep",))
    ]
    [point] = sweep(qwen, ep=4, device="h100", batch_sizes=[32], lengths=[4096], prompt_length=3000)
    assert everywhere == choice.bytes_per_device == point.bytes_per_device
    halves = plan(qwen, ep=4, **options | {"prompt_length": None})
    assert halves.prompt_length == 2048
    assert halves.step_bytes["prefill"] < planned.step_bytes["prefill"]
    assert halves.step_bytes["decode"] == planned.step_bytes["decode"]
    assert halves.held_bytes == planned.held_bytes


@pytest.mark.parametrize("prompt_length", [None, 512])
def test_the_largest_batch_and_length_fit_and_one_more_does_not(qwen, prompt_length) -> None:
    options = {"ep": 2, "device": "a100-40gb", "prompt_length": prompt_length}
    planned = plan(qwen, batch_size=700, max_length=2048, **options)
    assert 0 < planned.largest_batch < 4096
    for more, fits in ((0, True), (2, False)):
        assert plan(qwen, batch_size=planned.largest_batch + more, max_length=2048, **options).fits is fits
    assert 512 < planned.largest_length < 40960
    for more, fits in ((0, True), (1, False)):
        assert plan(qwen, batch_size=700, max_length=planned.largest_length + more, **options).fits is fits


def test_a_longer_prompt_needs_more_and_a_packed_model_room_for_an_expert(tmp_path) -> None:
    for name, raw in (("plain", DEEPSEEK_V3), ("packed", DEEPSEEK_V3_FP8)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(raw))
    needed = [plan(tmp_path / "plain", ep=8, prompt_length=length).step_bytes["prefill"] for length in (256, 512, 1024)]
    assert needed == sorted(set(needed))
    plain, packed = (plan(tmp_path / name, ep=8, batch_size=8, prompt_length=512).parts for name in ("plain", "packed"))
    assert plain[DISPATCH][0] == packed[DISPATCH][0]
    # Of float32 numbers instead of bfloat16.
    assert packed[TEMPORARIES][0] - plain[TEMPORARIES][0] == 3 * 7168 * 2048 * 2


def test_what_contradicts_itself_is_refused(qwen, capsys) -> None:
    with pytest.raises(ValueError, match=r"prompt_length is at most max_length \(64\); got 65"):
        plan(qwen, max_length=64, prompt_length=65)
    with pytest.raises(ValueError, match=r"prompt_length is at most max_length \(64\); got 65"):
        sweep(qwen, device="h100", batch_sizes=[1], lengths=[128, 64], prompt_length=65)
    for options, message in (
        (["--compile", "--device", "h100", "--mtp"], "leave --adapter, --mtp and --quantized out"),
        (["--every-layer"], "--every-layer says what --compile compiles"),
        (["--max-length", "64", "--prompt-length", "65"], "prompt_length is at most max_length"),
    ):
        assert main(["plan", str(qwen), *options]) == 1
        assert message in capsys.readouterr().err

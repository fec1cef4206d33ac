"""Layers that are alike are made once for a plan, and counted as often as they are there."""

from pathlib import Path

import numpy as np
import pytest

from jaxmoe.checkpoint.mapping import abstract_model, pack_model
from jaxmoe.hardware import GPUS
from jaxmoe.layers import packings_of, param_specs
from jaxmoe.planning.memory import cache_bytes, weight_parts
from jaxmoe.planning.planned import PlannedCheckpoint
from jaxmoe.planning.roofline import TimeModel
from jaxmoe.planning.workspace import StepMemory
from tests.support.goldens import GOLDENS

CONFIGS = Path(__file__).parents[2] / "docs" / "configs"

CASES = {
    "dense layers first": CONFIGS / "DeepSeek-V3",
    "kinds that alternate": CONFIGS / "gpt-oss-20b",
    "all alike": CONFIGS / "Qwen3-30B-A3B",
    "tensors of its own": GOLDENS / "qwen3_moe" / "original",
}


def made(path, *, keep: bool, mtp: bool = False, **options):
    """The model with every layer made, as a load makes it, and the one that a plan looks at."""
    planned = PlannedCheckpoint.read(path, mtp=mtp)
    options = {"sizes": {"dp": 1, "tp": 2, "ep": 2}, "placement": "linear", "expert_axes": ("ep",)} | options
    whole = abstract_model(planned.config, dtype=np.dtype("float32"), **options)
    if keep:
        pack_model(whole, planned.onto({spec.path: spec for spec in param_specs(whole)}, one_expert=True))
    return whole, planned.model(dtype="float32", keep=keep, **options)


@pytest.mark.parametrize("path", CASES.values(), ids=CASES)
def test_parameters_are_those_of_a_model_with_every_layer(path) -> None:
    whole, planned = made(path, keep=True)
    assert planned.specs == list(param_specs(whole))
    assert planned.packings == packings_of(whole)
    assert len(set(map(id, planned.layers))) < len(planned.layers) == len(whole.layers)


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (CASES["dense layers first"], {"mtp": True, "expert_axes": ("ep", "tp")}),
        (CASES["kinds that alternate"], {"placement": ["linear", "round_robin", "linear"] * 8}),
    ],
)
def test_bytes_and_times_are_those_of_a_model_with_every_layer(path, options) -> None:
    whole, planned = made(path, keep=False, **options)
    of_whole, of_planned = (weight_parts(model) for model in (whole, planned))
    assert list(of_whole) == list(of_planned)
    for part, sizes in of_whole.items():
        np.testing.assert_array_equal(of_planned[part], sizes)
    sizes = {"batch_size": 8, "prompt_length": 512, "max_length": 1024}
    assert StepMemory(planned)(**sizes) == StepMemory(whole)(**sizes)
    np.testing.assert_array_equal(cache_bytes(planned, 8, 1024), cache_bytes(whole, 8, 1024))
    of_whole, of_planned = (TimeModel(model, gpu=GPUS["h100"], devices_per_node=2) for model in (whole, planned))
    for phase in ("prefill", "decode"):
        assert of_planned(phase, batch_size=8, length=512) == of_whole(phase, batch_size=8, length=512)


def test_layers_with_placements_of_their_own_are_kinds_of_their_own() -> None:
    _, planned = made(CASES["kinds that alternate"], keep=False, placement=["linear", "round_robin", "linear"] * 8)
    # Every second layer has a window.
    assert len(set(map(id, planned.layers))) == 4
    assert [placement.slot_to_expert[1] for placement in planned.placements[:3]] == [1, 2, 1]

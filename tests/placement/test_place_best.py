"""`jaxmoe place` writes the placement that it calls the best."""

import json

import numpy as np
import pytest

from jaxmoe.cli import main
from jaxmoe.placement import RoutingTrace, placements_from_json


@pytest.mark.parametrize("strategies", ["linear,eplb", "eplb,linear"])
def test_the_best_placement_is_written(strategies, tmp_path, capsys):
    # Two busy experts side by side: linear puts both on one device.
    ids = np.random.default_rng(0).choice(8, p=[0.4, 0.4, *[0.2 / 6] * 6], size=(256, 2, 1))
    trace = RoutingTrace.from_expert_ids(ids.astype(np.int32), 8)
    trace.save(tmp_path / "trace.npz")
    output = tmp_path / "best.json"
    sizes = ["--ep", "4", "--hidden-size", "64", "--moe-intermediate-size", "32"]
    argv = ["place", str(tmp_path / "trace.npz"), *sizes, "--strategies", strategies, "--by", "max_over_mean"]
    assert main([*argv, "-o", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"] == "eplb"
    for placement in placements_from_json(output.read_text()):
        assert not any({0, 1} <= set(placement.device_experts(device)) for device in range(4))

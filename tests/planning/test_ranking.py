"""Layouts whose times on simulated devices differ clearly are in the same order by the model.

`ranking.json` is what the script wrote, less what it modeled:

    python scripts/check_ranking.py --json ranking.json
"""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxmoe.hardware import Links
from jaxmoe.planning.search import describe_layout, layouts
from scripts._bench.simulated import as_gpu
from scripts.check_ranking import CASES, DEVICES, correlations, modeled_steps, read_config, turned_round

MEASURED = json.loads((Path(__file__).parent / "ranking.json").read_text())
# Of few rows an expert the kernel for CPUs makes tiles of 8 rows or single ones, and the model knows no tiles.
TURNED = {("experts", "decode"): 5}
LAYOUTS = {describe_layout(*layout): layout for layout in layouts(DEVICES)}


@pytest.mark.parametrize("case", MEASURED["cases"], ids=lambda case: case["case"])
def test_clearly_different_layouts_are_in_the_measured_order(case) -> None:
    rates = dict(case["rates"])
    links = Links(**{name: rates.pop(name) for name in ("within", "between", "latency")})
    own, device, config = CASES[case["case"]], as_gpu(**rates, links=links), read_config(case["sizes"])
    assert dataclasses.asdict(own).items() <= case.items(), "the case is another one now: measure it again"
    modeled = {name: modeled_steps(config, *LAYOUTS[name], own, device) for name in case["steps"]["decode"]["measured"]}
    for phase, step in case["steps"].items():
        seconds = {name: both[phase].seconds for name, both in modeled.items()}
        turned, clear = turned_round(step["measured"], seconds, 1.5)
        assert len(turned) <= TURNED.get((case["case"], phase), 0)
        if clear >= 50:
            assert correlations(step["measured"], seconds)["spearman"] > 0.8

"""A model fits where its fullest device has room, and the command says so."""

import json

import numpy as np
import pytest

from jaxmoe.cli import main
from jaxmoe.planning.memory import Plan
from tests.support.families import FAMILIES


@pytest.mark.parametrize(("capacity", "fits"), [(4, False), (5, True), (None, None)])
def test_the_fullest_device_decides(capacity, fits):
    plan = Plan(
        model_type="mixtral",
        mesh={"dp": 1, "tp": 1, "ep": 3},
        dtype="float32",
        batch_size=1,
        max_length=1,
        prompt_length=1,
        parts={"routed experts": np.array([1.0, 3.0, 1.0]), "other": np.array([1.0, 2.0, 2.0])},
        device=None,
        capacity=capacity,
        parameters=1,
        active_parameters=1,
    )
    assert plan.bytes_per_device == {0: 2, 1: 5, 2: 3}
    assert plan.fits is fits


@pytest.mark.parametrize(
    ("layers", "verdict", "asks_more_of_jax"),
    [(2, "fits in the 42.3 GB", False), (65, "fits in the 42.3 GB", True), (200, "does not fit in the 42.3 GB", False)],
)
def test_the_command_says_whether_it_fits(layers, verdict, asks_more_of_jax, tmp_path, capsys):
    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **FAMILIES["mixtral"], **sizes}))
    assert main(["plan", str(tmp_path), "--device", "a100-40gb"]) == 0
    out = capsys.readouterr().out
    assert f"\n{verdict}" in out
    assert ("the 31.7 GB that JAX takes of it by itself" in " ".join(out.split())) is asks_more_of_jax

"""Layers and files of which there are more than ten: 10 comes after 9, and not after 1."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmoe.checkpoint.inspection.summary import summarize
from jaxmoe.cli import main


def write(directory: Path, layers: Iterable[int]) -> Path:
    """Fused experts in some layers of a family that is not known, in the order of their names."""
    directory.mkdir()
    config = {"model_type": "not_known", "hidden_size": 4, "moe_intermediate_size": 3, "num_hidden_layers": 12}
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"gate_up_proj": (2, 6, 4), "down_proj": (2, 4, 3)}
    tensors = {
        f"model.layers.{layer}.mlp.experts.{name}": np.zeros(shape, np.float32)
        for layer in layers
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("layers", "told"), [(range(12), "0-11"), ([0, 2, 3, 4, 7, 9, 10], "0, 2-4, 7, 9-10"), ([11], "11")]
)
def test_layers_are_told_in_their_order(layers, told, tmp_path, capsys):
    path = write(tmp_path / "model", layers)
    assert summarize(path).layouts == {"fused": list(layers)}
    assert main(["inspect", str(path)]) == 0
    assert f"fused in layers {told} " in f"{capsys.readouterr().out} ".replace("\n", " ")

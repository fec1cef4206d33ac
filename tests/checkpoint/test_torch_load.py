"""A checkpoint of ``.bin`` files loads like the same one in safetensors, byte range by byte range."""

import json
import shutil
from pathlib import Path

import pytest

import jaxmoe
from jaxmoe import make_mesh
from tests.support.goldens import GOLDENS
from tests.support.saved import assert_same_parameters


def convert(source: Path, target: Path) -> None:
    """Write the checkpoint as .bin files with an index, every other matrix of them transposed in memory."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    shutil.copy(source / "config.json", target)
    weight_map = {}
    for number, file in enumerate(sorted(source.glob("*.safetensors"))):
        state = load_file(file)
        for name in list(state)[::2]:
            state[name] = state[name].mT.contiguous().mT if state[name].ndim > 1 else state[name]
        name = f"pytorch_model-{number}.bin"
        torch.save(state, target / name)
        weight_map |= dict.fromkeys(state, name)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("golden", ["qwen3_moe/original", "mixtral/fused"])
def test_bin_files_load_like_safetensors(tmp_path: Path, golden: str) -> None:
    convert(GOLDENS / golden, tmp_path)
    mesh = make_mesh(1, 2, 4)
    expected = jaxmoe.load(GOLDENS / golden, mesh=mesh, progress=False)
    model = jaxmoe.load(tmp_path, mesh=mesh, progress=False)
    assert_same_parameters(model, expected)
    assert model.load_report.bytes_read == model.load_report.bytes_needed == expected.load_report.bytes_needed

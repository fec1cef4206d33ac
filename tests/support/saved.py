"""Checkpoints compared tensor by tensor."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxmoe.checkpoint import open_checkpoint
from jaxmoe.checkpoint.boxes import whole
from jaxmoe.checkpoint.formats import open_files, read_tensor
from jaxmoe.checkpoint.saving.values import ModelValues
from jaxmoe.layers import packings_of, param_specs, params_by_path, unpacked_specs
from jaxmoe.models import Decoder
from tests.support.families import FAMILIES
from tests.support.goldens import GOLDENS

# Families with the forms in which transformers saves them.
SOURCES = [path for path in sorted(GOLDENS.glob("*/*")) if path.parent.name in FAMILIES and path.is_dir()]


def read_all(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint."""
    checkpoint = open_checkpoint(directory)
    with open_files(checkpoint.files) as descriptors:
        return {
            name: read_tensor(descriptors, tensor, whole(tensor.shape))[0]
            for name, tensor in checkpoint.tensors.items()
        }


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    assert_equal_tensors(read_all(ours), read_all(theirs))


def name_in_transformers(published: str) -> str:
    """The name that transformers gives a tensor of DeepSeek-V4 when it writes the checkpoint as it was published."""
    others = {
        "embed.weight": "model.embed_tokens.weight",
        "head.weight": "head.weight",
        "norm.weight": "model.norm.weight",
    }
    name = others.get(published, f"model.{published.replace('hc_head_', 'hc_head.hc_')}")
    # Every norm goes back to the short name that it has for the compressors' norms.
    return name.replace(".attn.kv_norm.", ".attn.norm.")


def assert_equal_tensors(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].tobytes() == value.tobytes(), name


def assert_same_parameters(ours: Decoder, theirs: Decoder) -> None:
    """Bit for bit; what the models compute of them is XLA's."""
    expected = params_by_path(theirs)
    for path, param in params_by_path(ours).items():
        found, other = np.asarray(param[...]), np.asarray(expected[path][...])
        assert found.dtype == other.dtype, path
        assert found.tobytes() == other.tobytes(), path


def held_values(model) -> dict[str, np.ndarray]:
    """All parameters of a model, those that are packed decoded."""
    packings = packings_of(model)
    source = ModelValues({path: param.get_value() for path, param in params_by_path(model).items()}, packings)
    specs = unpacked_specs(param_specs(model), packings, model.dtype)
    return {spec.path: source.read(spec.path, tuple((0, size) for size in spec.shape)) for spec in specs}

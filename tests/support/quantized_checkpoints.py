"""Tiny checkpoints in quantized formats, each beside a plain one with the values that it decodes to."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxmoe.checkpoint.mapping import abstract_specs, written_blocks, written_form
from jaxmoe.models import find_family
from tests.support.goldens import GOLDENS
from tests.support.quantized import example_of

WIDTHS = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64}
LINEAR = r".*\.(?:experts\.\d+|self_attn|shared_experts)\.[a-z0-9_]+(?:\.|_proj\.)?weight"
STACKS = r".*\.experts\.(?:gate_up|down)_proj"


def write_pair(
    directory: Path, family: str, form: str, block: Mapping[str, Any], widths: Mapping[str, int] = WIDTHS
) -> tuple[Path, Path, int]:
    """A quantized checkpoint, one with its values, and the number of quantized weights."""
    config = json.loads((GOLDENS / family / "original" / "config.json").read_text())
    config |= {key: size for key, size in widths.items() if key in config}
    found, config = find_family(config)
    model = found.read_config(config)
    rng = np.random.default_rng(0)
    stored, plain, count = {}, {}, 0
    for tensor in written_blocks(abstract_specs(model), found, written_form(found, "per_expert")):
        name, shape = tensor.tensor, tensor.tensor_shape
        if name is None or name in plain:
            continue
        if re.fullmatch(STACKS if form == "mxfp4" else LINEAR, name) and shape[-1] % 32 == 0 and shape[-2] % 32 == 0:
            example = example_of(form, name, shape, rng)
            stored |= example.arrays
            plain[name] = np.ascontiguousarray(example.values)
            count += 1
        else:
            stored[name] = plain[name] = rng.normal(size=shape).astype(np.float32)
    paths = directory / "quantized", directory / "plain"
    for path, tensors, more in ((paths[0], stored, {"quantization_config": block}), (paths[1], plain, {})):
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**config, **more}))
        save_file(tensors, path / "model.safetensors")
    return *paths, count

"""A checkpoint whose weights are not here, by its config.json: sizes, parameters, formats, and bytes of the usual form."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint.formats import SAFETENSORS, find_size, is_stored
from jaxmoe.checkpoint.inspection.grouping import GROUPS, group_of
from jaxmoe.checkpoint.inspection.holding import describe_holding
from jaxmoe.checkpoint.mapping import abstract_specs, count_parameters, expected_checkpoint
from jaxmoe.config import DecoderConfig, MoEConfig, read_json
from jaxmoe.models import Family
from jaxmoe.quant import read_quantization

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def has_weights(path: Path) -> bool:
    """Whether there is any weight at a path that is no directory with a config.json alone, and its index perhaps."""
    if path.is_dir() and (path / "config.json").is_file():
        return is_stored(path) or any(file.suffix in _WEIGHTS for file in path.iterdir())
    return True


def facts_of_config(
    directory: Path,
    config: Mapping[str, Any],
    family: Family | None,
    text_config: Mapping[str, Any],
    *,
    mtp: bool = False,
) -> dict[str, Any]:
    """Fields of a `CheckpointSummary` that a config.json fills without weights.

    Args:
        directory: directory of the checkpoint.
        config: contents of config.json.
        family: family of the model; None where it is not known.
        text_config: part of the config that the family reads.
        mtp: whether layers for multi-token prediction are a part of the model.
    """
    index = read_json(directory / SAFETENSORS.index)
    files = index.get("weight_map")
    facts: dict[str, Any] = {
        "files": len(set(files.values())) if isinstance(files, dict) else 0,
        "problems": (),
        "layers": find_size(config, "layers"),
        "moe_layers": None,
        "experts": find_size(config, "experts"),
        "experts_per_token": find_size(config, "experts_per_token"),
        "parameters": None,
        "active_parameters": None,
        "bytes": 0,
        "groups": {},
        "formats": {},
        "held": (),
    }
    if family is not None:
        try:
            facts |= _of_family(directory, *family.read(text_config, mtp=mtp))
        except ValueError as error:
            facts["problems"] = (str(error),)
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return facts | ({"bytes": size} if type(size) is int and size > 0 else {})


def _of_family(directory: Path, family: Family, model: DecoderConfig) -> dict[str, Any]:
    moes = [layer.feed_forward for layer in model.layers if isinstance(layer.feed_forward, MoEConfig)]
    parameters, active = count_parameters(model)
    facts: dict[str, Any] = {
        "layers": len(model.layers),
        "moe_layers": len(moes),
        "experts": max((moe.num_experts for moe in moes), default=None),
        "experts_per_token": max((moe.num_experts_per_tok for moe in moes), default=None),
        "parameters": parameters,
        "active_parameters": active,
    }
    try:
        quantization = read_quantization(directory)
    except ValueError as error:
        return {**facts, "problems": (str(error),)}
    mapped = expected_checkpoint(abstract_specs(model), family, model, quantization, directory, one_expert=True)
    groups = {group: {"tensors": 0, "parameters": 0, "bytes": 0} for group in GROUPS}
    formats: dict[str, Counter[str]] = defaultdict(Counter)
    for name, shape in {name: block.tensor_shape for name, block in mapped.used_blocks()}.items():
        group, tensor = group_of(name), mapped.checkpoint.tensors[name]
        count = mapped.copies.get(name, 1)
        sizes = {"tensors": count, "parameters": count * math.prod(shape), "bytes": count * tensor.nbytes}
        groups[group] = {key: value + sizes[key] for key, value in groups[group].items()}
        formats[group][tensor.form] += sizes["bytes"]
    return {
        **facts,
        "bytes": sum(sizes["bytes"] for sizes in groups.values()),
        "groups": {group: sizes for group, sizes in groups.items() if sizes["tensors"]},
        "formats": {group: dict(sizes) for group, sizes in formats.items()},
        "held": describe_holding(model, mapped),
    }

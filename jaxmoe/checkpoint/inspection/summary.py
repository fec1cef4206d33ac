"""The summary of a checkpoint, from its headers and its config.json alone."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from jaxmoe.checkpoint.errors import CheckpointError, Problems
from jaxmoe.checkpoint.formats import (
    DecodedTensor,
    decode_checkpoint,
    find_size,
    is_stored,
    open_checkpoint,
    read_stored,
)
from jaxmoe.checkpoint.inspection.config_only import facts_of_config, has_weights
from jaxmoe.checkpoint.inspection.counting import (
    MoESizes,
    Shapes,
    bytes_by_dtype,
    bytes_by_format,
    count_active,
    find_layouts,
    group_sizes,
    hides_experts,
    stored_shapes,
)
from jaxmoe.checkpoint.inspection.declared import describe_quantization
from jaxmoe.checkpoint.inspection.grouping import quantized_base
from jaxmoe.checkpoint.inspection.holding import describe_holding
from jaxmoe.checkpoint.mapping import FamilyCheckpoint, Unused, abstract_specs, layer_index
from jaxmoe.config import STORED, DecoderConfig, directory_of, find_checkpoint, read_json
from jaxmoe.models import FAMILIES, WRAPPERS, Family, find_family


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSummary:
    """A checkpoint at a glance; None stands for what could not be found out.

    Attributes:
        path: the directory or file.
        weights: whether there are weights; without, parameters and bytes are what config.json makes of its family, in the
            form of one tensor per expert, or what an index says.
        files: its files of weights, or those of its index.
        model_type: model type as config.json has it.
        known: whether jaxmoe has that family.
        problems: reasons for `jaxmoe.load` to refuse it, as far as config.json and headers tell; missing weights are none.
        layers: decoder layers.
        moe_layers: those with routed experts.
        experts: routed experts of a layer; the largest number where layers differ.
        experts_per_token: experts of a layer that a token goes to.
        layouts: {layout of the routed experts: the layers that have it}.
        dtypes: {element type as safetensors names it: bytes}.
        quantization: {"method": ..., "from": the file that says so, ...the setting's own entries}; None without.
        parameters: numbers in the model, scales of quantized weights and ignored tensors not counted.
        active_parameters: those that one token meets: all but the routed experts that it does not go to. The embedding
            is counted whole, as is usual.
        bytes: size of tensor data.
        groups: {group: {"tensors", "parameters", "bytes"}}, those that are there.
        ignored: {rule: tensors that it covers}, rules of the family, and of the multimodal model that it is the text
            part of. Tensors of the text part are called as in the text model alone.
        uncovered: tensors that fill no parameter and no rule ignores; None for an unknown family.
        formats: {group: {quantized format, or "plain": bytes}} of a known family.
        held: sentences on the forms in which `jaxmoe.load` keeps quantized weights, and on what it decodes and why.
        renamed: {rule: tensors that have other names than the family gives them}.
    """

    path: str
    weights: bool
    files: int
    model_type: str | None
    known: bool
    problems: tuple[str, ...]
    layers: int | None
    moe_layers: int | None
    experts: int | None
    experts_per_token: int | None
    layouts: dict[str, list[int]]
    dtypes: dict[str, int]
    quantization: dict[str, Any] | None
    parameters: int | None
    active_parameters: int | None
    bytes: int
    groups: dict[str, dict[str, int | None]]
    ignored: dict[str, list[str]]
    uncovered: list[str] | None
    formats: dict[str, dict[str, int]]
    held: tuple[str, ...]
    renamed: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain types, for JSON."""
        return dataclasses.asdict(self)


def summarize(path: str | os.PathLike[str], *, mtp: bool = False) -> CheckpointSummary:
    """Look at a checkpoint without reading a weight.

    Args:
        path: checkpoint, given as for `jaxmoe.load`. A family that jaxmoe does not know, a missing config.json and missing
            weights beside a config.json leave some entries None; that is no error.
        mtp: whether its layers for multi-token prediction are a part of the model, as for `jaxmoe.load`.

    Raises:
        CheckpointError: a file breaks a rule of its format.
        FileNotFoundError: there is no checkpoint there.
    """
    path = find_checkpoint(path)
    directory = directory_of(path)
    config = read_json(directory / "config.json")
    model_type = config.get("model_type")
    family, text_config, unknown = _find_family(config)
    quantization = describe_quantization(directory, config)
    if not has_weights(path):
        facts = facts_of_config(directory, config, family, text_config, mtp=mtp)
        facts["problems"] = (*([unknown] if family is None else []), *facts["problems"])
        return CheckpointSummary(
            path=str(path),
            weights=False,
            model_type=model_type,
            known=family is not None,
            layouts={},
            dtypes={},
            quantization=quantization,
            ignored={},
            uncovered=None,
            renamed={},
            **facts,
        )
    arrays = read_stored(path) if is_stored(path) else None
    checkpoint = stored = open_checkpoint(path) if arrays is None else arrays.checkpoint
    if arrays is not None and any(isinstance(tensor, DecodedTensor) for tensor in checkpoint.tensors.values()):
        quantization = {"method": "packed", "from": STORED}
    elif quantization is None and any(quantized_base(name) for name in checkpoint.tensors):
        quantization = {"method": "unnamed", "from": "names of tensors"}

    mapped, renamed, problems = None, {}, []
    if family is None:
        problems.append(unknown)
    else:
        try:
            read = family.read(text_config, mtp=mtp)
            if arrays is None:
                found = FamilyCheckpoint.of(decode_checkpoint(checkpoint), *read)
            else:
                found = FamilyCheckpoint.of_stored(arrays, *read)
            checkpoint, renamed = found.checkpoint, dict(found.renamed)
            mapped = _map(found)
            problems += mapped.problems
        except ValueError as error:
            problems.append(str(error))
    ignored = {rule: list(names) for rule, names in mapped.unused.ignored.items()} if mapped else {}
    shapes = mapped.needed if mapped else stored_shapes(checkpoint)
    met = {name: shape for name, shape in (shapes or {}).items() if not mapped or name not in mapped.predicting}
    dropped = {name for names in ignored.values() for name in names}
    layouts = find_layouts(checkpoint, config, dropped)
    if arrays is not None and mapped:
        layouts = {"Orbax arrays, experts in order": list(mapped.config.moe_layers)}
    moe = MoESizes.known(mapped.config) if mapped else MoESizes.guessed(config)
    return CheckpointSummary(
        path=str(path),
        weights=True,
        files=len(checkpoint.files),
        model_type=model_type,
        known=family is not None,
        problems=tuple(problems),
        layers=len(mapped.config.layers) if mapped else find_size(config, "layers"),
        moe_layers=len(mapped.config.moe_layers) if mapped else sum(map(len, layouts.values())) or None,
        experts=moe.experts,
        experts_per_token=moe.per_token,
        layouts=layouts,
        dtypes=bytes_by_dtype(stored),
        quantization=quantization,
        parameters=None if shapes is None else sum(map(math.prod, shapes.values())),
        active_parameters=None
        if shapes is None or (not mapped and hides_experts(shapes, moe))
        else count_active(met, moe),
        bytes=stored.nbytes,
        groups=group_sizes(checkpoint, shapes, dropped),
        ignored=ignored,
        uncovered=list(mapped.unused.uncovered) if mapped else None,
        formats=bytes_by_format(checkpoint, dropped) if mapped else {},
        held=mapped.held if mapped else (),
        renamed=renamed,
    )


def _find_family(config: Mapping[str, Any]) -> tuple[Family | None, Mapping[str, Any], str]:
    """Find the family as `find_family` does; where there is none, None and the reason."""
    model_type = config.get("model_type")
    if not model_type:
        return None, config, "there is no config.json with a model_type"
    if model_type not in (*FAMILIES, *WRAPPERS):
        return None, config, f"jaxmoe has no family {model_type!r}"
    try:
        return *find_family(config), ""
    except ValueError as error:
        return None, config, str(error)


@dataclasses.dataclass
class _Findings:
    """Results of mapping a checkpoint: the shapes of the tensors that its model needs, and what is left over or wrong.

    `predicting` are the tensors of layers for multi-token prediction, which no token goes through.
    """

    config: DecoderConfig
    needed: Shapes
    predicting: frozenset[str]
    unused: Unused
    problems: list[str]
    held: tuple[str, ...]


def _map(found: FamilyCheckpoint) -> _Findings:
    problems, specs = Problems(str(found.checkpoint.path)), abstract_specs(found.config)
    try:
        mapped = found.onto(specs)
    except CheckpointError as error:
        problems.add(str(error))
        mapped = found.onto(specs, form="per_expert")
    unused = mapped.check(problems)
    needed = {name: block.tensor_shape for name, block in mapped.used_blocks()}
    behind = range(found.config.num_main_layers, len(found.config.layers))
    predicting = frozenset([name for name, block in mapped.used_blocks() if layer_index(block.param) in behind])
    held = () if problems.found else describe_holding(found.config, mapped)
    return _Findings(found.config, needed, predicting, unused, problems.found, held)

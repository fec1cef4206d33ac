"""The blocks of a whole model: from the paths of its parameters to a family's tensor names.

Reading and writing share the one walk in `model_blocks`. A family spells some names in several ways and writes its
experts in two forms; the names that are there decide which of them is meant. A reader gives those it found in a
checkpoint, a writer those that it wants to be in one (`wanted_names`).
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from jaxmoe.checkpoint.formats import TensorInfo
from jaxmoe.checkpoint.mapping.blocks import Block, part_blocks, part_names, rows_on_disk, whole_tensor_blocks
from jaxmoe.checkpoint.mapping.experts import expert_blocks
from jaxmoe.checkpoint.mapping.layouts import PATTERNS, shape_of
from jaxmoe.layers import ParamSpec
from jaxmoe.models import ExpertTensors, Family, Form
from jaxmoe.models.parts import is_expert_stack


def model_blocks(
    specs: Mapping[str, ParamSpec], family: Family, tensors: Mapping[str, TensorInfo | None]
) -> Iterator[Block]:
    """Make the blocks between the parameters of a model and the tensors of a checkpoint.

    Args:
        specs: parameters of the model by path.
        family: family that gives the tensors their names.
        tensors: tensors that are there, by name; they decide between a family's spellings and the forms of experts. One
            that is None has the shape of its parameter.

    Raises:
        CheckpointError: the experts of a layer are there in both forms, or in none.
    """
    whole = {path: spec for path, spec in specs.items() if not is_expert_stack(path)}
    spellings = {path: tensor_names(family, path) for path in whole}
    names = {
        path: next((name for name in own if name.replace("{part}", "0") in tensors), own[0])
        for path, own in spellings.items()
    }
    joined = _joined_rows(whole, family, names)
    for path, spec in specs.items():
        if path.endswith(".moe.w_gate_up"):
            layer = path.removesuffix("w_gate_up")
            names_here = _expert_tensors(family, path, tensors)
            if names_here.either_way or (family.wrapper and family.wrapper.fused_either_way):
                names_here = _oriented(names_here, specs[f"{layer}w_down"], tensors)
            yield from expert_blocks(
                spec,
                specs[f"{layer}w_down"],
                names_here,
                tensors,
                gate_up_bias=specs.get(f"{layer}b_gate_up"),
                down_bias=specs.get(f"{layer}b_down"),
            )
        elif path in whole and "{part}" in names[path]:
            yield from part_blocks(spec, names[path])
        elif path in whole:
            yield from whole_tensor_blocks(spec, names[path], tensors.get(names[path]), joined=joined.get(path))


def wanted_names(
    specs: Mapping[str, ParamSpec],
    family: Family,
    form: Form,
    source: Mapping[str, TensorInfo] | None = None,
) -> dict[str, TensorInfo | None]:
    """The names that a checkpoint of a model is to have, as `model_blocks` takes them.

    Of several spellings of a name the one is taken that transformers writes beside experts of that form: Mixtral's
    router is ``block_sparse_moe.gate`` beside one tensor per expert, and ``mlp.gate`` beside fused ones.

    Args:
        specs: parameters of the model by path.
        family: family that gives the tensors their names.
        form: form of the experts; the other one where the family has no names for it (`written_form`).
        source: tensors of a checkpoint of the family; where a tensor has dims of size 1 more or less than its
            parameter, the one written has them too.
    """
    source, form = source or {}, written_form(family, form)
    both_forms = bool(family.experts.per_expert(0) and family.experts.fused)
    wanted: dict[str, TensorInfo | None] = {}
    for path in specs:
        if path.endswith(".moe.w_gate_up"):
            names, experts = _expert_tensors(family, path), _down_stack(specs, path).source_groups
            assert experts is not None, f"{path}: rows without source_groups"
            per_expert = [name for expert in range(experts) for name in names.per_expert(expert)]
            wanted |= dict.fromkeys(names.fused if form == "fused" else per_expert)
        elif not is_expert_stack(path):
            spellings = tensor_names(family, path)
            found = next((source[name] for name in spellings if name in source), None)
            # Families list the released spelling first and last the one that goes with fused experts.
            name = spellings[-1] if both_forms and form == "fused" else spellings[0]
            wanted |= dict.fromkeys(part_names(specs[path], name) if "{part}" in name else [name], found)
    return wanted


def written_blocks(
    specs: Mapping[str, ParamSpec],
    family: Family,
    form: Form,
    source: Mapping[str, TensorInfo] | None = None,
) -> Iterator[Block]:
    """The blocks between a model and a checkpoint that is to be written; arguments as for `wanted_names`."""
    return model_blocks(specs, family, wanted_names(specs, family, form, source))


def written_form(family: Family, form: Form) -> Form:
    """`form`, or the other one where a family has no names for it, as gpt-oss, or `Family.written` says so."""
    if family.written is not None:
        return family.written
    if form == "fused":
        return "fused" if family.experts.fused else "per_expert"
    return "per_expert" if family.experts.per_expert(0) else "fused"


def tensor_names(family: Family, path: str) -> list[str]:
    """A family's spellings of the tensor of a parameter that is no expert stack, the preferred first."""
    index = layer_index(path)
    names = family.tensors[_template(path)]
    return list(names) if index is None else [family.name_in_layer(name, index) for name in names]


def _template(path: str) -> str:
    """The path as `Family.tensors` has it."""
    return re.sub(r"^layers\.\d+\.", "layers.{layer}.", path)


def _joined_rows(
    specs: Mapping[str, ParamSpec], family: Family, names: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """(first row, rows in all) of the parameters whose tensor holds others too; see `Family.tensors`."""
    order = {template: place for place, template in enumerate(family.tensors)}
    together: dict[str, list[str]] = defaultdict(list)
    for path in sorted(specs, key=lambda path: order[_template(path)]):
        together[names[path]].append(path)
    joined: dict[str, tuple[int, int]] = {}
    for paths in together.values():
        if len(paths) > 1:
            rows = [rows_on_disk(specs[path]) for path in paths]
            joined |= {path: (sum(rows[:i]), sum(rows)) for i, path in enumerate(paths)}
    return joined


def layer_index(path: str) -> int | None:
    """The layer that a parameter belongs to, None for those of none."""
    found = re.match(r"layers\.(\d+)\.", path)
    return int(found[1]) if found else None


def _expert_tensors(family: Family, path: str, tensors: Collection[str] = ()) -> ExpertTensors:
    index = layer_index(path)
    assert index is not None, f"{path}: experts outside a layer"
    if family.renamed_experts is not None:
        renamed = family.experts_in_layer(family.renamed_experts, index)
        if renamed.are_in(tensors):
            return renamed
    return family.experts_in_layer(family.experts, index)


def _oriented(names: ExpertTensors, down: ParamSpec, tensors: Mapping[str, TensorInfo | None]) -> ExpertTensors:
    """`names` with the transposed layout if that of both fused tensors is the one that is there."""
    assert down.source_groups is not None, f"{down.path}: rows without source_groups"
    sizes = {"E": down.source_groups, "2": 2, "F": down.shape[2], "D": down.shape[1]}
    found = [info.shape for name in names.fused_weights if (info := tensors.get(name)) is not None]
    transposed = [shape_of(dims, sizes) for dims in PATTERNS["fused_transposed"]]
    return dataclasses.replace(names, fused_layout="fused_transposed") if found == transposed else names


def _down_stack(specs: Mapping[str, ParamSpec], path: str) -> ParamSpec:
    return specs[path.removesuffix("w_gate_up") + "w_down"]

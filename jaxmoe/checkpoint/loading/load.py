"""`jaxmoe.load`: from a checkpoint directory to a model on the mesh."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmoe.checkpoint.formats import PLACEMENT
from jaxmoe.checkpoint.loading.apart import add_adapters, plan_factors, refuse_stored
from jaxmoe.checkpoint.loading.execute import load_arrays
from jaxmoe.checkpoint.loading.filling import load_progress
from jaxmoe.checkpoint.loading.merge import merge_adapter
from jaxmoe.checkpoint.loading.plan import LoadPlan, plan_packed
from jaxmoe.checkpoint.loading.quantize import load_quantized, pack_as
from jaxmoe.checkpoint.loading.room import check_room, held_bytes
from jaxmoe.checkpoint.loading.whole_modules import put_in_whole_modules
from jaxmoe.checkpoint.lora import Adapter, open_adapter
from jaxmoe.checkpoint.mapping import (
    FamilyCheckpoint,
    MappedCheckpoint,
    PackingChoice,
    Spellings,
    asked_activations,
    pack_model,
)
from jaxmoe.checks import flag, path_like
from jaxmoe.config import RouterFunction, find_checkpoint
from jaxmoe.distributed import check_same
from jaxmoe.layers import param_specs, params_by_path
from jaxmoe.mesh import EP, check_mesh
from jaxmoe.models import Decoder, Family, Origin
from jaxmoe.models.kernels import try_kernels
from jaxmoe.models.parts import held_forms
from jaxmoe.placement import ExpertPlacement, placements_from_json
from jaxmoe.progress import ProgressCallback, check_progress
from jaxmoe.quant.encode import TARGETS

_DTYPES = ("float32", "bfloat16", "float16")


def load(
    path: str | Path,
    *,
    mesh: Mesh,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
    dtype: str | None = None,
    quantized: str | None = None,
    quantize: str | None = None,
    activations: str | None = None,
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    router: RouterFunction | None = None,
    mtp: bool = False,
    expert_axes: tuple[str, ...] = (EP,),
    dispatch: str | Mapping[str, str] = "auto",
    kernels: str = "auto",
    progress: bool | ProgressCallback = False,
    check_finite: bool = False,
) -> Decoder:
    """Load a checkpoint onto a mesh; every device reads and holds its own experts only.

    Nothing is read until the whole plan holds: every tensor of the checkpoint is used or ignored by a named rule, and every
    parameter is filled exactly once. So it is with an adapter: every tensor of it is merged, or the load is refused.
    Parameters that do not fit in the free memory of a device are refused as well, with meshes on which they would.

    Of a multimodal checkpoint the text part is loaded; its other tensors are ignored by rules that `load_report` lists.
    Quantized weights stay packed on the devices where a kernel multiplies with their format, scales beside their values;
    others are decoded as they are read, in float32, and held in `dtype`. `load_report` says which.

    Args:
        path: a directory as transformers' ``save_pretrained`` writes it, a file of weights in one, or the name of a model in
            the Hugging Face hub's local cache, such as "Qwen/Qwen3-30B-A3B". Nothing is downloaded. A directory that
            `jaxmoe.convert_to_orbax` made is loaded alike, without adapters.
        mesh: mesh from `jaxmoe.make_mesh`.
        placement: a strategy's name or an `ExpertPlacement` for all MoE layers, or one for each; "checkpoint" for the
            placement that `jaxmoe.convert_to_orbax` was given to keep.
        dtype: type of weights and activations, "float32", "bfloat16" or "float16"; None for the checkpoint's own.
        quantized: "keep" holds quantized weights packed, those that can be; "dequantize" decodes all, which training
            wants. None is "keep", and "dequantize" with an adapter.
        quantize: format to quantize the linear layers of attention, MLPs and experts to, a name of
            `jaxmoe.quant.encode.TARGETS`; they stay packed. Routers, norms, embeddings and the head are left alone, and so
            are matrices that the model multiplies with in another way. `load_report.losses` has the errors.
        activations: "checkpoint" rounds the inputs of packed weights to the form that the checkpoint asks for, such
            as fp8 with a scale for each token; `load_report.held` has the form of each part, and `load_report.notes` tells
            where no kernel has the one that is asked for. None leaves inputs as they are.
        adapter: directory of a LoRA adapter, as PEFT's ``save_pretrained`` writes it, to add to the weights. Tensors that it
            has whole (``modules_to_save``, the ends of a grown vocabulary) take the place of the checkpoint's.
        adapters: directories of LoRA adapters by name, to hold beside the weights, packed or not, for prompts to choose
            from; see `jaxmoe.add_adapter`.
        router: a function that chooses the experts in every layer instead of the family's router, see
            `jaxmoe.config.ChosenByFunction`.
        mtp: whether layers for multi-token prediction are loaded too, for ``generate(..., speculate="mtp")``; otherwise
            they are ignored by a rule. Their experts have a placement like those of other layers, behind them.
        expert_axes: mesh axes that share the experts, see `jaxmoe.MoE`.
        dispatch: a backend of `jaxmoe.dispatch` or "auto", or one for each phase, {"prefill": ..., "decode": ...}.
        kernels: a backend of `jaxmoe.kernels.grouped_matmul`, or "auto".
        progress: True shows on stderr how far it is, and how full each device is of what it will hold; a callable is given
            (bytes done, bytes in all).
        check_finite: whether a checkpoint with infinities or NaNs in it is refused.

    Returns:
        The model, its `load_report` telling what was read and what each device holds.

    Raises:
        FileNotFoundError: no checkpoint or adapter there, or a part of it is missing.
        ValueError: the checkpoint, the mesh and the arguments do not fit together, or another process of the mesh
            was given other ones.

    Example:
        >>> mesh = jaxmoe.make_mesh(dp=2, tp=2, ep=2)
        >>> model = jaxmoe.load("demo", mesh=mesh)
        >>> model([[1, 2, 3]]).shape
        (1, 3, 2048)
    """
    path_like("path", path)
    check_mesh(mesh)
    if adapter is not None:
        path_like("adapter", adapter)
    for directory in (adapters or {}).values():
        path_like("adapters", directory)
    check_finite, mtp = flag("check_finite", check_finite), flag("mtp", mtp)
    check_progress(progress)
    _check_quantized(quantized, quantize, adapter)
    _check_activations(activations, quantized, quantize, adapter)
    path = find_checkpoint(path)
    found = FamilyCheckpoint.open(path, mtp=mtp)
    if found.stored is not None and (adapter is not None or adapters):
        refuse_stored(path)
    if isinstance(placement, str) and placement == "checkpoint":
        placement = _kept_placement(found)
    opened = None if adapter is None else open_adapter(adapter)
    if opened is not None:
        found = put_in_whole_modules(found, opened)
    checkpoint, family = found.checkpoint, found.family
    model = Decoder(
        found.config if router is None else found.config.with_router(router),
        mesh=mesh,
        placement=placement,
        expert_axes=expert_axes,
        dispatch=dispatch,
        kernels=kernels,
        dtype=jnp.dtype(_choose_dtype(dtype, found)),
    )
    specs = {spec.path: spec for spec in param_specs(model)}
    mapped = found.onto(specs)
    pack = functools.partial(
        _pack,
        keep=quantized != "dequantize" and adapter is None,
        target=quantize,
        rounding=activations is not None,
    )
    choice = pack(model, mapped)
    if activations is not None:
        choice.check_rounding(path)
    factors = plan_factors(model, adapters or {}, mapped, family)
    check_room(model, factors, found, placement=placement, expert_axes=expert_axes, pack=pack, adapters=adapters or {})
    plan = plan_packed(mapped, choice.packings)
    if opened is not None:
        spellings = Spellings(family)
        plan = merge_adapter(plan, checkpoint, opened, rename=lambda name: spellings.find(name, checkpoint.tensors))
        if found.untied:
            _refuse_untied_ends(plan, family)
    if mesh.is_multi_process:
        settings = (
            dtype,
            quantized,
            quantize,
            activations,
            getattr(router, "__qualname__", type(router).__qualname__),
            expert_axes,
            dispatch,
            kernels,
        )
        _check_same_input(model, found, opened, settings)
    try_kernels(model, mesh, model.dtype, kernels)
    devices = [device.id for device in mesh.local_devices]
    with load_progress(f"loading {path.name}", progress, devices, held_bytes(model)) as (on_bytes, on_placed):
        told: Any = {"check_finite": check_finite, "progress": on_bytes, "placed": on_placed}
        if quantize is None:
            arrays, report = load_arrays(plan, **told)
        else:
            arrays, report = load_quantized(model, mapped, quantize, plan, **told)
    packed, decoded = mapped.formats(choice.packings)
    model.load_report = dataclasses.replace(
        report,
        packed=packed,
        decoded=decoded,
        held=held_forms(model, model.dtype),
        activations=asked_activations(mapped),
        notes=(*found.notes, *choice.notes()),
        renamed=dict(found.renamed),
    )
    ignored = tuple(model.load_report.ignored.items())
    model.origin = Origin(path, ignored, adapted=adapter is not None, quantized=quantize is not None)
    if mesh.is_multi_process:
        check_same({"weights": _fingerprint(arrays)})
    for name, param in params_by_path(model).items():
        param.set_value(arrays[name])
    if adapters:
        add_adapters(model, adapters)
    return model


def _pack(model: Decoder, mapped: MappedCheckpoint, *, keep: bool, target: str | None, rounding: bool) -> PackingChoice:
    """Make the parameters of an abstract model packed ones, those that a load holds so.

    Args:
        model: model without values, all of its parameters plain.
        mapped: checkpoint mapped to them.
        keep: whether quantized weights stay packed.
        target: format that plain weights are quantized to, None to leave them.
        rounding: whether inputs are rounded as the checkpoint asks.

    Returns:
        The weights of the checkpoint that stay as they are packed there.
    """
    if target is not None:
        pack_as(model, mapped, target)
    elif keep:
        return pack_model(model, mapped, rounding=rounding)
    return PackingChoice({}, {})


def _kept_placement(found: FamilyCheckpoint) -> ExpertPlacement | list[ExpertPlacement]:
    """The placement that a checkpoint keeps.

    Raises:
        ValueError: it keeps none.
    """
    file = found.checkpoint.path / PLACEMENT
    if found.stored is None or not file.is_file():
        raise ValueError(
            f'placement="checkpoint" is the one that jaxmoe convert --to orbax --placement was given to keep, and '
            f"{found.checkpoint.path} keeps none; name a strategy, or give an ExpertPlacement"
        )
    return placements_from_json(file.read_text(encoding="utf-8"))


def _check_quantized(quantized: Any, quantize: Any, adapter: Any) -> None:
    if quantize is not None and quantize not in TARGETS:
        raise ValueError(
            f"quantize is one of {', '.join(TARGETS)}, or None to leave weights as they are; got {quantize!r}"
        )
    if quantize is not None and (quantized == "keep" or adapter is not None):
        other = "an adapter" if adapter is not None else 'quantized="keep"'
        raise ValueError(
            f"quantize makes packed weights of plain ones, and {other} asks for something else; leave one of the two out, "
            "or write the other with jaxmoe.convert or jaxmoe.save first"
        )
    if quantized not in (None, "keep", "dequantize"):
        raise ValueError(f'quantized is "keep", "dequantize" or None; got {quantized!r}')
    if quantized == "keep" and adapter is not None:
        raise ValueError(
            'an adapter is added to plain numbers, and quantized="keep" holds packed ones; leave one of the two out, or '
            'decode the weights with quantized="dequantize"'
        )


def _check_activations(activations: Any, quantized: Any, quantize: Any, adapter: Any) -> None:
    if activations not in (None, "checkpoint"):
        raise ValueError(
            f'activations is "checkpoint", for the form that the checkpoint asks for, or None; got {activations!r}'
        )
    others = {
        'quantized="dequantize"': quantized == "dequantize",
        "quantize": quantize is not None,
        "an adapter": adapter is not None,
    }
    if activations is not None and any(others.values()):
        other = next(name for name, given in others.items() if given)
        raise ValueError(
            f'activations="checkpoint" rounds the inputs of weights that stay packed as they are in the checkpoint, and '
            f"{other} leaves none; leave one of the two out"
        )


def _check_same_input(model: Decoder, found: FamilyCheckpoint, adapter: Adapter | None, settings: Any) -> None:
    """Refuse what would give each process a part of another model, before minutes of reading."""
    tensors = sorted(found.checkpoint.tensors.items())
    check_same(
        {
            "meshes": (model.mesh.shape, [device.id for device in model.mesh.devices.flat]),
            "configs": found.config,
            "tensors": [(name, tensor.dtype_name, tensor.shape) for name, tensor in tensors],
            "adapters": adapter and (adapter.config, sorted(adapter.file.tensors)),
            "placements": [placement.slot_to_expert.tolist() for placement in model.placements],
            "settings of load": settings,
        }
    )


def _fingerprint(arrays: Mapping[str, jax.Array]) -> str:
    """A digest of the vectors that every process holds, norms above all: two states of training differ there too."""
    digest = hashlib.sha256()
    for _, array in sorted(arrays.items()):
        if array.ndim == 1 and array.is_fully_replicated:
            digest.update(np.asarray(array.addressable_data(0)).tobytes())
    return digest.hexdigest()


def _refuse_untied_ends(plan: LoadPlan, family: Family) -> None:
    """Refuse an adapter of one end of a tied model whose checkpoint has bytes for both.

    Raises:
        ValueError: where the two are equal the update is of both, else of one, and nobody has read them.
    """
    ends = [name for path in ("embed.weight", "lm_head.weight") for name in family.tensors[path]]
    if adapted := [name for name in ends if name in plan.deltas]:
        raise ValueError(
            f"an adapter of a tied output projection changes the embedding too; config.json ties the two, the checkpoint "
            f"has a table for each, and the adapter is of {adapted[0]!r}; remove the one that is not meant from the "
            "checkpoint, or set tie_word_embeddings to false"
        )


def _choose_dtype(dtype: Any, found: FamilyCheckpoint) -> str:
    if dtype is not None:
        name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", getattr(dtype, "name", None))
        if name not in _DTYPES:
            raise ValueError(f"dtype is one of {', '.join(_DTYPES)}, or None for the checkpoint's own; got {dtype!r}")
        return name
    own = found.config.dtype
    if own is not None:
        if own not in _DTYPES:
            raise ValueError(
                f"config.json gives dtype {own!r}; a model runs in {', '.join(_DTYPES)}: pass one as dtype="
            )
        return own
    embedding = found.checkpoint.tensors.get(found.family.tensors["embed.weight"][0])
    held = None if embedding is None or embedding.dtype is None else embedding.dtype.name
    return held if held in _DTYPES else "float32"

"""`plan`: the bytes that each device will hold, from a config alone."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.loading import plan_factors
from jaxmoe.checkpoint.mapping import abstract_model, count_parameters, is_expert_stack, layer_index, pack_model
from jaxmoe.checks import flag, integer
from jaxmoe.config import DecoderConfig
from jaxmoe.hardware import get_gpu
from jaxmoe.layers import CacheArray, param_specs
from jaxmoe.mesh import AXES, EP, MODEL_AXES, axes_size, batch_axes, named, padded_batch
from jaxmoe.models import Decoder
from jaxmoe.models.parts import held_forms, part_of
from jaxmoe.placement import ExpertPlacement, RoutingTrace
from jaxmoe.planning.planned import PlannedCheckpoint, keeps_packed
from jaxmoe.planning.planned_model import PlannedModel
from jaxmoe.planning.routing import checked_halves, resolve_placement
from jaxmoe.planning.stored import StoredWeights, stored_weights
from jaxmoe.planning.workspace import StepMemory

_DTYPES = ("float32", "bfloat16", "float16")
CACHE = "key/value cache and state"
DISPATCH, TEMPORARIES = "dispatch workspace", "temporaries (estimate)"
# What a plan calls the slots of `ExpertPlacement.slot_uses`.
_PART_OF_USE = {"experts": "routed experts", "replicas": "replicas", "padding": "padding slots"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes that a model takes on the devices of a mesh, before anything is read or allocated.

    Devices are numbered as on the mesh: (dp, tp, ep) in row-major order. Weights and cache are counted to the byte; what a
    prefill of all sequences at once or a decode step needs besides is an estimate, see `jaxmoe.planning.workspace`.

    Attributes:
        model_type: name of the family.
        mesh: sizes of the mesh, {"dp": ..., "tp": ..., "ep": ...}.
        dtype: type of weights and cache.
        batch_size: number of sequences that the cache is for.
        max_length: number of tokens of each that the cache is for.
        prompt_length: number of tokens of each in the prefill.
        parts: bytes by part, {name: float64 [devices]}, in the order of a table; `jaxmoe.viz.device_memory` draws it.
        device: kind of device, None where none was named.
        capacity: bytes of its memory; None without a kind.
        parameters: number of the parameters, each counted once.
        active_parameters: those that one token meets: all but the routed experts that it does not go to.
        stored: formats and bytes of the weights in the checkpoint's files; None for a config without a checkpoint.
        held: {part: {packed form, or a dtype: arrays on the devices}}, as `jaxmoe.load` would hold them.
        notes: reasons why quantized weights are decoded.
        positions: positions of the model, the most tokens of a sequence.
        step_bytes: bytes that each step needs beside weights and cache, {"prefill": ..., "decode": ...}; `parts` has the
            larger.
        largest_batch: most sequences of `max_length` tokens for which there is room beside the weights, for their cache and
            for what a step needs, 0 where there is none; None without a kind of device.
        largest_length: most tokens of each of `batch_size` sequences, likewise; in a prefill `prompt_length` of them, or
            half if that was not given.
    """

    model_type: str
    mesh: dict[str, int]
    dtype: str
    batch_size: int
    max_length: int
    prompt_length: int
    parts: dict[str, np.ndarray]
    device: str | None
    capacity: float | None
    parameters: int
    active_parameters: int
    stored: StoredWeights | None = None
    held: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    positions: int | None = None
    step_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    largest_batch: int | None = None
    largest_length: int | None = None

    @property
    def bytes_per_device(self) -> dict[int, int]:
        """{device: bytes of all parts}."""
        return dict(enumerate(np.sum(list(self.parts.values()), axis=0).astype(np.int64).tolist()))

    @property
    def held_per_device(self) -> dict[int, int]:
        """{device: bytes of weights and cache}."""
        held = [part for name, part in self.parts.items() if name not in (DISPATCH, TEMPORARIES)]
        return dict(enumerate(np.sum(held, axis=0).astype(np.int64).tolist()))

    @property
    def held_bytes(self) -> int:
        """Those of the device that holds most."""
        return max(self.held_per_device.values())

    @property
    def fits(self) -> bool | None:
        """Whether the fullest device has room for all parts; None without a kind of device."""
        return None if self.capacity is None else max(self.bytes_per_device.values()) <= self.capacity

    @property
    def headroom(self) -> int | None:
        """Bytes of its memory that the fullest device has left; negative where it does not fit, None without a kind."""
        return None if self.capacity is None else int(self.capacity) - max(self.bytes_per_device.values())

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain types, for JSON."""
        fields = dataclasses.asdict(self) | {"parts": {name: part.tolist() for name, part in self.parts.items()}}
        stored = None if self.stored is None else self.stored.to_dict()
        return fields | {
            "bytes_per_device": self.bytes_per_device,
            "fits": self.fits,
            "headroom": self.headroom,
            "stored": stored,
        }


def plan(
    path: str | Path,
    *,
    dp: int = 1,
    tp: int = 1,
    ep: int = 1,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
    expert_axes: tuple[str, ...] = (EP,),
    dtype: str | None = None,
    quantized: str = "keep",
    activations: str | None = None,
    mtp: bool = False,
    batch_size: int = 1,
    max_length: int | None = None,
    prompt_length: int | None = None,
    device: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    trace: RoutingTrace | None = None,
) -> Plan:
    """Tell what each device would hold of a model, without devices and without weights.

    Args:
        path: checkpoint, given as for `jaxmoe.load`; its config.json is read, the file beside it that may have the
            settings of a quantization, and the headers of its weights where they are there.
        dp, tp, ep: sizes of the mesh.
        placement: strategy's name or an `ExpertPlacement` for all MoE layers, or one for each.
        expert_axes: mesh axes that share the experts, see `jaxmoe.MoE`.
        dtype: type of weights and cache, "float32", "bfloat16" or "float16"; None for the config's own, or bfloat16.
        quantized: "keep" for quantized weights that stay packed where they can, "dequantize" for decoded ones, as for
            `jaxmoe.load`.
        activations: "checkpoint" to count static scales of activations and name the form of inputs, None for weights
            alone, as for `jaxmoe.load`.
        mtp: whether layers for multi-token prediction are loaded too, as for `jaxmoe.load`.
        batch_size: number of sequences to have room for.
        max_length: number of tokens of each; None for 4096, or as many positions as the model has where those are fewer.
        prompt_length: number of tokens of each in the prefill, which computes all sequences at once; None for half of
            `max_length`.
        device: name in `jaxmoe.hardware.GPUS`, to compare with its memory.
        adapters: directories of LoRA adapters that are to be held beside the weights, by name, as for `jaxmoe.load`.
        trace: routing trace, by whose first half a strategy places that is made from loads or choices.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: a size, name or placement does not fit; the family is not known, or the checkpoint is quantized in a way
            that jaxmoe does not decode.

    Example:
        >>> report = jaxmoe.plan("docs/configs/Qwen3-30B-A3B", tp=2, ep=4, device="h100")
        >>> report.bytes_per_device[0], report.fits
        (9181229056, True)
    """
    checkpoint = PlannedCheckpoint.read(path, mtp=flag("mtp", mtp))
    keep = keeps_packed(quantized)
    if activations not in (None, "checkpoint"):
        raise ValueError(f'activations is "checkpoint" or None; got {activations!r}')
    past, sizes = checked_halves(checkpoint.config, trace)[0], {"dp": dp, "tp": tp, "ep": ep}
    return plan_config(
        checkpoint.config,
        dp=dp,
        tp=tp,
        ep=ep,
        placement=resolve_placement(checkpoint.config, placement, sizes, expert_axes, past=past),
        expert_axes=expert_axes,
        dtype=dtype,
        batch_size=batch_size,
        max_length=max_length,
        prompt_length=prompt_length,
        device=device,
        checkpoint=checkpoint,
        keep=keep,
        rounding=activations is not None,
        adapters=adapters,
    )


def plan_config(
    config: DecoderConfig,
    *,
    dp: int = 1,
    tp: int = 1,
    ep: int = 1,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
    expert_axes: tuple[str, ...] = (EP,),
    dtype: str | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    prompt_length: int | None = None,
    device: str | None = None,
    checkpoint: PlannedCheckpoint | None = None,
    keep: bool = False,
    rounding: bool = False,
    adapters: Mapping[str, str | Path] | None = None,
) -> Plan:
    """Plan a config that has been read, see `plan`; its weights are plain where there is no `checkpoint`, or no `keep`.

    Adapters are of a checkpoint.
    """
    sizes = {name: integer(name, size, least=1) for name, size in {"dp": dp, "tp": tp, "ep": ep}.items()}
    batch_size = integer("batch_size", batch_size, least=1)
    max_length = checked_length(config, max_length)
    prompt = checked_prompt(prompt_length, max_length)
    gpu = None if device is None else get_gpu(device)
    name = checked_dtype(config, dtype)
    model = abstract_model(config, sizes=sizes, placement=placement, expert_axes=expert_axes, dtype=jnp.dtype(name))
    parameters, active = count_parameters(config)
    stored: StoredWeights | None = None
    notes: tuple[str, ...] = ()
    beside: dict[str, np.ndarray] = {}
    if checkpoint is not None:
        mapped = checkpoint.onto({spec.path: spec for spec in param_specs(model)}, one_expert=not adapters)
        method = None if checkpoint.quantization is None else checkpoint.quantization.method
        stored = stored_weights(mapped, method)
        if adapters:
            factors = plan_factors(model, adapters, mapped, checkpoint.family)
            on_device = sum(spec.device_bytes for spec in factors)
            beside["adapters"] = np.full(model.mesh.size, on_device, np.float64)
        notes = pack_model(model, mapped, rounding=rounding).notes() if keep else ()
    parts = weight_parts(model) | beside
    memory = StepMemory(model)
    # Sequences are split over these: each device has as many.
    share = axes_size(model.mesh, MODEL_AXES.dp + MODEL_AXES.ep)
    room = None if gpu is None else gpu.memory - np.sum(list(parts.values()), axis=0).max()

    steps = memory(batch_size=batch_size, prompt_length=prompt, max_length=max_length)

    def taken(batch_size: int, max_length: int) -> float:
        prompt = checked_prompt(None if prompt_length is None else min(prompt_length, max_length), max_length)
        return np.sum(list(step_parts(model, memory, batch_size, prompt, max_length).values()), axis=0).max()

    return Plan(
        model_type=config.model_type,
        mesh=sizes,
        dtype=name,
        batch_size=batch_size,
        max_length=max_length,
        prompt_length=prompt,
        parts=parts | step_parts(model, memory, batch_size, prompt, max_length),
        device=device,
        capacity=None if gpu is None else gpu.memory,
        parameters=parameters,
        active_parameters=active,
        stored=stored,
        held=held_forms(model, model.dtype),
        notes=notes,
        positions=config.max_position_embeddings,
        step_bytes={name: step.nbytes for name, step in steps.items()},
        largest_batch=None
        if room is None
        else _largest(lambda count: taken(count * share, max_length) <= room) * share,
        largest_length=None
        if room is None
        else _largest(lambda length: taken(batch_size, length) <= room, most=config.max_position_embeddings),
    )


def checked_length(config: DecoderConfig, max_length: int | None) -> int:
    """The tokens of each sequence that a plan has room for: those asked for, or 4096, or all positions that there are."""
    if max_length is None:
        return min(4096, config.max_position_embeddings)
    max_length = integer("max_length", max_length, least=1)
    if max_length > config.max_position_embeddings:
        raise ValueError(
            f"the model has {config.max_position_embeddings} positions: max_length={max_length} is more than that"
        )
    return max_length


def checked_prompt(prompt_length: int | None, max_length: int) -> int:
    """The tokens of each sequence in a prefill: those asked for, or half of those that there is room for."""
    if prompt_length is None:
        return max(1, max_length // 2)
    prompt_length = integer("prompt_length", prompt_length, least=1)
    if prompt_length > max_length:
        raise ValueError(f"prompt_length is at most max_length ({max_length}); got {prompt_length}")
    return prompt_length


def checked_dtype(config: DecoderConfig, dtype: str | None) -> str:
    """The dtype of weights and cache: the one asked for, or the config's, or bfloat16."""
    name = dtype or config.dtype or "bfloat16"
    if name not in _DTYPES:
        raise ValueError(f"dtype is one of {', '.join(_DTYPES)}; got {name!r}: pass the one the model is to run in")
    return name


def weight_parts(model: Decoder | PlannedModel) -> dict[str, np.ndarray]:
    """Bytes of a model's parameters by part, {name: float64 [devices]}; parts of which there are none are left out."""
    model = PlannedModel.of(model)
    parts: dict[str, np.ndarray] = {
        name: np.zeros(model.mesh.size)
        for name in (*_PART_OF_USE.values(), "shared experts", "attention", "embedding and head")
    }
    parts["other"] = np.zeros(model.mesh.size)
    for spec in model.specs:
        on_device = spec.device_bytes
        if not is_expert_stack(spec.path):
            parts[part_of(spec.path)] += on_device
            continue
        index = layer_index(spec.path)
        assert index is not None
        moe = model.layers[index].moe
        per_slot = on_device / moe.placement.slots_per_device
        for use, slots_n in moe.placement.slot_uses.items():
            parts[_PART_OF_USE[use]] += slots_n[_expert_rank(model, moe.expert_axes)] * per_slot
    return {name: part for name, part in parts.items() if part.any()}


def _expert_rank(model: PlannedModel, expert_axes: tuple[str, ...]) -> np.ndarray:
    """int [devices], the number of each device along the expert axes."""
    places = dict(
        zip(AXES, np.unravel_index(np.arange(model.mesh.size), tuple(model.mesh.shape.values())), strict=True)
    )
    sizes = tuple([model.mesh.shape[axis] for axis in expert_axes])
    return np.ravel_multi_index(tuple([places[axis] for axis in expert_axes]), sizes)


def step_parts(
    model: Decoder | PlannedModel, memory: StepMemory, batch_size: int, prompt_length: int, max_length: int
) -> dict[str, np.ndarray]:
    """Bytes beside the weights by part, {name: float64 [devices]}: the cache, and what a step needs while it runs."""
    steps = memory(batch_size=batch_size, prompt_length=prompt_length, max_length=max_length)
    needed = max(steps.values(), key=lambda step: step.nbytes)
    parts = {DISPATCH: needed.dispatch, TEMPORARIES: needed.temporaries}
    everywhere = {name: np.full(model.mesh.size, size, np.float64) for name, size in parts.items() if size}
    return {CACHE: cache_bytes(model, batch_size, max_length)} | everywhere


def cache_bytes(model: Decoder | PlannedModel, batch_size: int, max_length: int) -> np.ndarray:
    """Bytes of the cache for so many sequences of so many tokens, float64 [devices]."""
    rows = padded_batch(model.mesh, batch_size)
    batch = batch_axes(model.mesh, rows)

    def on_device(array: CacheArray) -> int:
        dtype = jnp.dtype(array.dtype or model.dtype)
        shape = named(model.mesh, *array.spec(batch)).shard_shape(array.shape)
        return math.prod(shape) * dtype.itemsize

    arrays = [layer.cache_arrays(rows, max_length) for layer in model.layers]
    return np.full(model.mesh.size, sum(map(on_device, jax.tree.leaves(arrays))), np.float64)


def _largest(fits: Callable[[int], bool], most: int | None = None) -> int:
    """The largest number up to `most` that fits, where less than it fits too; 0 where not even 1 does."""
    least, too_many = 0, 1
    while (most is None or too_many <= most) and fits(too_many):
        least, too_many = too_many, too_many * 2
    if most is not None:
        too_many = min(too_many, most + 1)
    while too_many - least > 1:
        middle = (least + too_many) // 2
        least, too_many = (middle, too_many) if fits(middle) else (least, middle)
    return least

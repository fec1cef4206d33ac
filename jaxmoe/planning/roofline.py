"""`TimeModel`: the time of a prefill or a decode step on GPUs, modeled from what each device reads, computes and sends.

Each part of a step takes the larger of two times, that of reading its bytes and that of its arithmetic; parts follow each
other, and so do the exchanges between devices. Nothing overlaps, every rate is the device's highest, and tokens are routed
evenly unless a trace says otherwise: a real step takes longer. The order of meshes is what the model is for.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.mapping import is_expert_stack, layer_index
from jaxmoe.config import AttentionConfig, MLAConfig, TokenMixerConfig
from jaxmoe.dispatch import DISPATCHES, Collective, Dispatch, DispatchShape, dispatch_collectives, explain_dispatch
from jaxmoe.hardware import GPU
from jaxmoe.layers import MoE, dispatch_shape
from jaxmoe.mesh import AXES, TP, batch_axes, named, padded_batch
from jaxmoe.models import Decoder
from jaxmoe.placement import RoutingTrace
from jaxmoe.planning.measured import NOTHING, PARTS, Measured, Taken
from jaxmoe.planning.planned_model import PlannedModel
from jaxmoe.planning.routing import check_routing, slot_chances

Phase = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step, by what takes them.

    Attributes:
        phase: "prefill" or "decode".
        tokens: tokens of all sequences that the step computes.
        dense: weights that every token meets: attention's, dense and shared experts', the head.
        experts: routed experts, on the device that holds most of those that are met.
        cache: keys, values and states that the cache has room for, and the scores of attention.
        exchange: tokens that travel to experts and back.
        sums: partial sums over tp of what is not routed, and the logits.
        dispatch: {backend of dispatch: MoE layers that use it}.
        sources: {part: "modeled", or "measured" with the files that have it, or "measured in part"}.
    """

    phase: Phase
    tokens: int
    dense: float
    experts: float
    cache: float
    exchange: float
    sums: float
    dispatch: Mapping[str, int]
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.dense + self.experts + self.cache + self.exchange + self.sums

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all devices, in the modeled time."""
        return self.tokens / self.seconds

    def terms(self) -> dict[str, float]:
        """{part: seconds}, the largest first."""
        parts = {name: getattr(self, name) for name in PARTS}
        return dict(sorted(parts.items(), key=lambda part: -part[1]))


class _Work(NamedTuple):
    """Bytes that a device reads and operations that it does, of one part of a step."""

    bytes: float = 0.0
    flops: float = 0.0

    def times(self, count: float) -> "_Work":
        return _Work(self.bytes * count, self.flops * count)

    def on(self, gpu: GPU) -> Taken:
        return Taken(max(self.bytes / gpu.memory_bandwidth, self.flops / gpu.flops), modeled=True)


class TimeModel:
    """The modeled times of a model's steps; what the model alone says is worked out once.

    Args:
        model: model without values, on an abstract mesh; its parameters packed where they are to be.
        gpu: kind of every device.
        devices_per_node: devices that are linked by the faster way; their numbers follow each other.
        dispatch: backend of `jaxmoe.dispatch`, or "auto".
        skew: rows of the device with the most of them over the mean; None for even routing, or that of `trace`.
        trace: routing that tells the load of every slot of each MoE layer.
        measured: rates and times that are taken in place of modeled ones, see `read_measured`.

    Raises:
        ValueError: skew and trace are both given, or the trace is of other layers or experts.
    """

    def __init__(
        self,
        model: Decoder | PlannedModel,
        *,
        gpu: GPU,
        devices_per_node: int = 8,
        dispatch: str = "auto",
        skew: float | None = None,
        trace: RoutingTrace | None = None,
        measured: Measured = NOTHING,
    ):
        model = PlannedModel.of(model)
        check_routing(model.config, trace, skew)
        counts = {} if trace is None else dict(zip(model.config.moe_layers, trace.total_counts, strict=True))
        packings = model.packings
        self._model, self._dispatch, self._skew, self._measured = model, dispatch, skew or 1.0, measured
        self._gpu, self._dtype = measured.device(gpu), jnp.dtype(model.dtype).name
        self._dense, self._stacks = _weights(model)
        self._chances = {
            layer: slot_chances(model.layers[layer].moe, counts[layer]) if counts else None for layer in self._stacks
        }
        self._is_packed = bool(packings)
        self._packed = {layer_index(path) for path in packings if is_expert_stack(path)}
        self._links = _Links(model, self._gpu, devices_per_node, measured)

    def __call__(self, phase: Phase, *, batch_size: int, length: int) -> StepTime:
        """Model the time of one step; arguments as for `step_time`."""
        model, gpu, measured = self._model, self._gpu, self._measured
        rows = padded_batch(model.mesh, batch_size)
        per_row = length if phase == "prefill" else 1
        here = rows // math.prod([model.mesh.shape[axis] for axis in batch_axes(model.mesh, rows)])
        dense = _Work()
        for weight in self._dense:
            met = here if weight.last_tokens else here * per_row
            dense = _sum(dense, _Work(weight.bytes, weight.flops * met))
        experts = exchange = Taken()
        names: Counter[str] = Counter()
        alike: dict[tuple[Any, ...], tuple[Taken, str, Taken]] = {}
        for layer, slot in self._stacks.items():
            # By a trace every layer has loads of its own.
            loads = None if self._chances[layer] is None else layer
            kind = id(model.layers[layer].moe), slot, layer in self._packed, loads
            if kind not in alike:
                alike[kind] = self._routed(layer, batch_size * per_row)
            own, name, taken = alike[kind]
            experts += own
            exchange += taken
            names[name] += 1
        parts = {
            "dense": dense.on(gpu),
            "experts": experts,
            "cache": _cache(model, phase, rows, here, length).on(gpu),
            "exchange": exchange,
            "sums": self._links.seconds(_sums(model, here, per_row)),
        }
        whole = {
            "phase": phase,
            "model_type": model.config.model_type,
            "layers": model.config.num_main_layers,
            "width": model.config.hidden_size,
            "dtype": self._dtype,
            "packed": self._is_packed,
            "mesh": dict(model.mesh.shape),
            "expert_axes": list(next((model.layers[layer].moe.expert_axes for layer in self._stacks), ())),
            "length": length,
        }
        parts = {
            name: measured.seconds("part", batch_size, part=name, **whole) or taken for name, taken in parts.items()
        }
        return StepTime(
            phase=phase,
            tokens=batch_size * per_row,
            **{name: taken.seconds for name, taken in parts.items()},
            dispatch=dict(names),
            sources={name: taken.source for name, taken in parts.items()},
        )

    def _routed(self, layer: int, tokens: int) -> tuple[Taken, str, Taken]:
        """Time of a layer's experts, the backend that brings tokens to them, and the time of that."""
        moe = self._model.layers[layer].moe
        rows, work = _experts(moe, self._stacks[layer], tokens, self._skew, self._chances[layer])
        known = moe.config.gated and layer not in self._packed
        timed = _measured_experts(self._measured, moe, rows, self._dtype) if known else None
        return timed or work.on(self._gpu), *_exchange(moe, tokens, self._dispatch, self._links)


def step_time(model: Decoder | PlannedModel, phase: Phase, *, batch_size: int, length: int, **options: Any) -> StepTime:
    """Model the time of one step.

    Args:
        model: model without values, on an abstract mesh; its parameters packed where they are to be.
        phase: "prefill" computes `length` tokens of each sequence, "decode" one more.
        batch_size: number of sequences.
        length: tokens of each in the prefill; in a decode step, tokens that the cache has room for, all of which it reads.
        **options: further arguments of `TimeModel`.

    Raises:
        ValueError: skew and trace are both given, or the trace is of other layers or experts.
    """
    return TimeModel(model, **options)(phase, batch_size=batch_size, length=length)


class _Weight(NamedTuple):
    """Bytes of a weight that every token meets, on a device, and operations for each token, or each sequence's last."""

    bytes: int
    flops: int
    last_tokens: bool


def _weights(model: PlannedModel) -> tuple[list[_Weight], dict[int, _Work]]:
    """The weights that every token meets, and the work of each MoE layer with a slot and a token of it."""
    counts = {
        spec.path: math.prod(spec.sharding.shard_shape(spec.shape)) for spec in model.plain_specs if len(spec.shape) > 1
    }
    dense, stacks = list[_Weight](), dict[int, _Work]()
    head = "embed.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    for spec in model.specs:
        layer = layer_index(spec.path)
        if layer is not None and layer >= model.config.num_main_layers:
            continue
        size = spec.device_bytes
        flops = 2 * counts.get(spec.path, 0)
        if is_expert_stack(spec.path):
            assert layer is not None, f"{spec.path}: experts outside a layer"
            slots = model.layers[layer].moe.placement.slots_per_device
            stacks[layer] = _sum(stacks.get(layer, _Work()), _Work(size / slots, flops / slots))
        elif spec.path == head or not spec.path.startswith("embed."):  # of an embedding a few rows are looked up
            dense.append(_Weight(size, flops, last_tokens=spec.path == head))
    return dense, stacks


def _experts(moe: MoE, slot: _Work, tokens: int, skew: float, chances_np: np.ndarray | None) -> tuple[float, _Work]:
    """Rows of the device whose experts have most to do, and its work: the slots that are met, and their rows.

    A slot is met by none of T tokens with the probability (1 - K/E) ** T, or with its own chance by a trace.
    """
    shape, K, E = dispatch_shape(moe, tokens), moe.config.num_experts_per_tok, moe.config.num_experts
    served = shape.tokens_served
    if chances_np is not None:
        met = float((1 - (1 - chances_np) ** served).sum(axis=1).max())
        rows = float(served * chances_np.sum(axis=1).max())
        return rows, _Work(met * slot.bytes, rows * slot.flops)
    rows = served * K / shape.layout.num_devices * skew
    uses = moe.placement.slot_uses
    held = int((uses["experts"] + uses["replicas"]).max())
    met = min(held * (1 - (1 - K / E) ** served), rows)
    return rows, _Work(met * slot.bytes, rows * slot.flops)


def _measured_experts(measured: Measured, moe: MoE, rows: float, dtype: str) -> Taken | None:
    """The measured time of a layer's experts on a device with so many rows; None where there is none."""
    split = 1 if TP in moe.expert_axes else moe.mesh.shape[TP]
    return measured.seconds(
        "experts",
        rows,
        slots=moe.placement.slots_per_device,
        width=moe.config.expert_input_size,
        expert_width=moe.config.moe_intermediate_size // split,
        dtype=dtype,
    )


def _exchange(moe: MoE, tokens: int, dispatch: str, links: "_Links") -> tuple[str, Taken]:
    """Backend that brings a call's tokens to their experts, and its seconds."""
    shape = dispatch_shape(moe, tokens)
    backend = chosen_dispatch(shape, dispatch)
    moved = _Work(backend.memory_bytes(shape)).on(links.gpu)
    return backend.name, links.seconds(dispatch_collectives(backend, shape)) + moved


def chosen_dispatch(shape: DispatchShape, dispatch: str) -> Dispatch:
    """The backend of that name, or with "auto" the one that a layer takes on GPUs for a call of these sizes."""
    return DISPATCHES[explain_dispatch(shape, "gpu").name if dispatch == "auto" else dispatch]


def _cache(model: PlannedModel, phase: Phase, rows: int, here: int, length: int) -> _Work:
    """Work of a device with the cache of all layers, and with the scores of attention."""
    batch, work = batch_axes(model.mesh, rows), _Work()
    for config, layer in zip(model.config.layers, model.layers, strict=True):
        for array in jax.tree.leaves(layer.cache_arrays(rows, length)):
            shape = named(model.mesh, *array.spec(batch)).shard_shape(array.shape)
            work = _sum(work, _Work(math.prod(shape) * jnp.dtype(array.dtype or model.dtype).itemsize))
        if config.attention is not None:
            # Masks are applied to the scores of all pairs: neither a causal one nor a window leaves a pair out.
            pairs = here * length * (length if phase == "prefill" else 1) / model.mesh.shape[TP]
            work = _sum(work, _of_pair(config.attention, phase, jnp.dtype(model.dtype).itemsize).times(pairs))
    return work


def _of_pair(config: TokenMixerConfig, phase: Phase, itemsize: int) -> _Work:
    """Work of a query and a key, of all heads; recurrent layers have none that counts.

    A score is written and read in float32, and its share of the softmax in the model's dtype.
    """
    if isinstance(config, MLAConfig):
        shared = config.shared_key_dim or 0
        widths = (
            config.nope_head_dim + shared + config.v_head_dim if phase == "prefill" else 2 * config.kv_rank + shared
        )
    elif isinstance(config, AttentionConfig):
        widths = config.head_dim + config.value_width
    else:
        return _Work()
    return _Work(2 * (4 + itemsize), 2 * widths).times(config.num_heads)


def _sums(model: PlannedModel, rows: int, per_row: int) -> list[Collective]:
    """Collectives over tp of what is not routed: sums behind embedding, attention, dense and shared experts; the logits.

    Args:
        model: model.
        rows: sequences of the device.
        per_row: tokens of each.
    """
    config, tp = model.config, model.mesh.shape[TP]
    main = list(zip(config.layers, model.layers, strict=True))[: config.num_main_layers]
    partial = sum(
        (layer.attention is not None) + (hasattr(own, "mlp") or hasattr(getattr(own, "moe", None), "shared"))
        for layer, own in main
    )

    numbers = rows * per_row * config.hidden_size
    embedded = Collective(op="all-reduce", axes=(TP,), devices=tp, bytes=numbers * jnp.dtype(model.dtype).itemsize)
    in_float32 = dataclasses.replace(embedded, bytes=numbers * 4)
    logits = dataclasses.replace(embedded, op="all-gather", bytes=rows * config.vocab_size * 4)
    return [embedded, *[in_float32] * partial, logits]


class _Links:
    """Time of collectives on a mesh whose devices are numbered (dp, tp, ep), so many of them a node."""

    def __init__(self, model: PlannedModel, gpu: GPU, devices_per_node: int, measured: Measured) -> None:
        self.gpu, self._measured = gpu, measured
        self._places = np.unravel_index(np.arange(model.mesh.size), tuple(model.mesh.shape[axis] for axis in AXES))
        self._nodes = np.arange(model.mesh.size) // devices_per_node
        self._outside: dict[tuple[str, ...], float] = {}

    def seconds(self, collectives: Iterable[Collective]) -> Taken:
        """Seconds of collectives that follow each other; those within a node may have been measured."""
        total = Taken()
        for each in collectives:
            if each.devices > 1:
                if each.axes not in self._outside:
                    self._outside[each.axes] = self._share_outside(each.axes)
                outside = self._outside[each.axes]
                seconds = self.gpu.links.seconds(each.wire_bytes * (1 - outside), each.wire_bytes * outside)
                timed = (
                    None
                    if outside
                    else self._measured.seconds("collective", each.bytes, op=each.op, devices=each.devices)
                )
                total += timed or Taken(seconds, modeled=True)
        return total

    def _share_outside(self, axes: tuple[str, ...]) -> float:
        """The share of a device's partners along some axes that are in other nodes, of the device with most of them."""
        others = [place for axis, place in zip(AXES, self._places, strict=True) if axis not in axes]
        groups = (
            np.zeros(len(self._nodes), int)
            if not others
            else np.ravel_multi_index(others, [place.max() + 1 for place in others])
        )
        shares = [0.0]
        for group in np.unique(groups):
            nodes = self._nodes[groups == group]
            counts = np.unique(nodes, return_counts=True)[1]
            shares.append((len(nodes) - counts.min()) / max(len(nodes) - 1, 1))
        return float(max(shares))


def _sum(one: _Work, other: _Work) -> _Work:
    return _Work(one.bytes + other.bytes, one.flops + other.flops)

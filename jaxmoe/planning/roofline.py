"""`step_time`: the time of a prefill or a decode step on GPUs, modeled from what each device reads, computes and sends.

Each part of a step takes the larger of two times, that of reading its bytes and that of its arithmetic; parts follow each
other, and so do the exchanges between devices. Nothing overlaps, every rate is the device's highest, and tokens are routed
evenly unless a trace says otherwise: a real step takes longer. The order of meshes is what the model is for.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.mapping import is_expert_stack, layer_index
from jaxmoe.config import AttentionConfig, MLAConfig, TokenMixerConfig
from jaxmoe.dispatch import DISPATCHES, Collective, Dispatch, DispatchShape, dispatch_collectives, explain_dispatch
from jaxmoe.hardware import GPU
from jaxmoe.layers import MoE, dispatch_shape, packings_of, param_specs, unpacked_specs
from jaxmoe.mesh import AXES, DP, TP, batch_axes, named, padded_batch
from jaxmoe.models import Decoder

Phase = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step, by what takes them.

    Attributes:
        phase: "prefill" or "decode".
        tokens: tokens of all sequences that the step computes.
        dense: weights that every token meets: attention's, dense and shared experts', the head.
        experts: routed experts, on the device that holds most of those that are met.
        cache: keys, values and states of the tokens before, and the scores of attention.
        exchange: tokens that travel to experts and back.
        sums: partial sums over tp of what is not routed.
        dispatch: {backend of dispatch: MoE layers that use it}.
    """

    phase: Phase
    tokens: int
    dense: float
    experts: float
    cache: float
    exchange: float
    sums: float
    dispatch: Mapping[str, int]

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
        parts = {name: getattr(self, name) for name in ("dense", "experts", "cache", "exchange", "sums")}
        return dict(sorted(parts.items(), key=lambda part: -part[1]))


class _Work(NamedTuple):
    """Bytes that a device reads and operations that it does, of one part of a step."""

    bytes: float = 0.0
    flops: float = 0.0

    def seconds(self, gpu: GPU) -> float:
        return max(self.bytes / gpu.memory_bandwidth, self.flops / gpu.flops)


def step_time(
    model: Decoder,
    phase: Phase,
    *,
    batch_size: int,
    length: int,
    gpu: GPU,
    devices_per_node: int = 8,
    dispatch: str = "auto",
    skew: float = 1.0,
) -> StepTime:
    """Model the time of one step.

    Args:
        model: model without values, on an abstract mesh; its parameters packed where they are to be.
        phase: "prefill" computes `length` tokens of each sequence, "decode" one more after `length`.
        batch_size: number of sequences.
        length: tokens of each.
        gpu: kind of every device.
        devices_per_node: devices that are linked by the faster way; their numbers follow each other.
        dispatch: backend of `jaxmoe.dispatch`, or "auto".
        skew: rows of the device with the most of them over the mean, 1.0 for even routing.
    """
    rows = padded_batch(model.mesh, batch_size)
    per_row = length if phase == "prefill" else 1
    here = rows // math.prod([model.mesh.shape[axis] for axis in batch_axes(model.mesh, rows)])
    dense, by_layer = _weights(model, here * per_row, here)
    experts = exchange = 0.0
    names: Counter[str] = Counter()
    links = _Links(model, gpu, devices_per_node)
    for layer, stack in by_layer.items():
        moe = model.layers[layer].moe
        experts += _experts(moe, stack, batch_size * per_row, skew).seconds(gpu)
        name, seconds = _exchange(moe, batch_size * per_row, dispatch, links)
        exchange += seconds
        names[name] += 1
    width = model.config.hidden_size * jnp.dtype(model.dtype).itemsize * here * per_row
    one_sum = Collective(op="all-reduce", axes=(TP,), devices=model.mesh.shape[TP], bytes=width)
    return StepTime(
        phase=phase,
        tokens=batch_size * per_row,
        dense=dense.seconds(gpu),
        experts=experts,
        cache=_cache(model, phase, rows, here, length).seconds(gpu),
        exchange=exchange,
        sums=_sums(model) * links.seconds([one_sum]),
        dispatch=dict(names),
    )


def _weights(model: Decoder, tokens: int, rows: int) -> tuple[_Work, dict[int, _Work]]:
    """Work of a device with the weights that every token meets, and of each MoE layer that with a slot and a token of it.

    Args:
        model: model.
        tokens: tokens of the device.
        rows: sequences of the device, whose last token alone meets the head.
    """
    specs = list(param_specs(model))
    counts = {
        spec.path: math.prod(spec.sharding.shard_shape(spec.shape))
        for spec in unpacked_specs(specs, packings_of(model), model.dtype)
        if len(spec.shape) > 1
    }
    dense, stacks = _Work(), dict[int, _Work]()
    head = "embed.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    for spec in specs:
        layer = layer_index(spec.path)
        if layer is not None and layer >= model.config.num_main_layers:
            continue
        size = math.prod(spec.sharding.shard_shape(spec.shape)) * spec.dtype.itemsize
        flops = 2 * counts.get(spec.path, 0)
        if is_expert_stack(spec.path):
            assert layer is not None, f"{spec.path}: experts outside a layer"
            slots = model.layers[layer].moe.placement.slots_per_device
            stacks[layer] = _sum(stacks.get(layer, _Work()), _Work(size / slots, flops / slots))
        elif spec.path == head:
            dense = _sum(dense, _Work(size, flops * rows))
        elif not spec.path.startswith("embed."):  # a few rows are looked up
            dense = _sum(dense, _Work(size, flops * tokens))
    return dense, stacks


def _experts(moe: MoE, slot: _Work, tokens: int, skew: float) -> _Work:
    """Work of the device whose experts have most to do: the slots that are met, and their rows.

    A slot is met by none of T tokens with the probability (1 - K/E) ** T.
    """
    layout, K, E = dispatch_shape(moe, tokens).layout, moe.config.num_experts_per_tok, moe.config.num_experts
    # Every dp rank has the experts once more where they are not shared over it.
    served = tokens / math.prod(
        [size for axis, size in layout.mesh_shape if axis == DP and axis not in layout.expert_axes]
    )
    rows = served * K / layout.num_devices * skew
    uses = moe.placement.slot_uses
    held = int((uses["experts"] + uses["replicas"]).max())
    met = min(held * (1 - (1 - K / E) ** served), rows)
    return _Work(met * slot.bytes, rows * slot.flops)


def _exchange(moe: MoE, tokens: int, dispatch: str, links: "_Links") -> tuple[str, float]:
    """Backend that brings a call's tokens to their experts, and its seconds."""
    shape = dispatch_shape(moe, tokens)
    backend = chosen_dispatch(shape, dispatch)
    copying = backend.memory_bytes(shape) / links.gpu.memory_bandwidth
    return backend.name, links.seconds(dispatch_collectives(backend, shape)) + copying


def chosen_dispatch(shape: DispatchShape, dispatch: str) -> Dispatch:
    """The backend of that name, or with "auto" the one that a layer takes on GPUs for a call of these sizes."""
    return DISPATCHES[explain_dispatch(shape, "gpu").name if dispatch == "auto" else dispatch]


def _cache(model: Decoder, phase: Phase, rows: int, here: int, length: int) -> _Work:
    """Work of a device with the cache of all layers, and with the scores of attention."""
    batch, work = batch_axes(model.mesh, rows), _Work()
    for config, layer in zip(model.config.layers, model.layers, strict=True):
        for array in jax.tree.leaves(layer.cache_arrays(rows, length)):
            shape = named(model.mesh, *array.spec(batch)).shard_shape(array.shape)
            work = _sum(work, _Work(math.prod(shape) * jnp.dtype(array.dtype or model.dtype).itemsize))
        if config.attention is not None:
            pairs = here * _pairs(config.attention, phase, length)
            work = _sum(work, _Work(0, pairs * _flops_of_pair(config.attention, phase) / model.mesh.shape[TP]))
    return work


def _pairs(config: TokenMixerConfig, phase: Phase, length: int) -> float:
    """Pairs of a query and a key of one sequence."""
    seen = min(length, getattr(getattr(config, "mask", None), "size", length))
    return seen if phase == "decode" else seen * length - seen * seen / 2


def _flops_of_pair(config: TokenMixerConfig, phase: Phase) -> float:
    """Operations for a query and a key, of all heads; recurrent layers have none that count."""
    if isinstance(config, MLAConfig):
        shared = config.shared_key_dim or 0
        widths = (
            config.nope_head_dim + shared + config.v_head_dim if phase == "prefill" else 2 * config.kv_rank + shared
        )
        return 2 * config.num_heads * widths
    if isinstance(config, AttentionConfig):
        return 2 * config.num_heads * (config.head_dim + config.value_width)
    return 0.0


def _sums(model: Decoder) -> int:
    """Number of sums over tp: behind attention, and behind dense or shared experts."""
    main = list(zip(model.config.layers, model.layers, strict=True))[: model.config.num_main_layers]
    behind = [
        (config.attention is not None, hasattr(layer, "mlp") or hasattr(getattr(layer, "moe", None), "shared"))
        for config, layer in main
    ]
    return sum(map(sum, behind))


class _Links:
    """Time of collectives on a mesh whose devices are numbered (dp, tp, ep), so many of them a node."""

    def __init__(self, model: Decoder, gpu: GPU, devices_per_node: int) -> None:
        self.gpu = gpu
        self._places = np.unravel_index(np.arange(model.mesh.size), tuple(model.mesh.shape[axis] for axis in AXES))
        self._nodes = np.arange(model.mesh.size) // devices_per_node

    def seconds(self, collectives: Iterable[Collective]) -> float:
        """Seconds of collectives that follow each other."""
        total = 0.0
        for each in collectives:
            if each.devices > 1:
                outside = self._share_outside(each.axes)
                total += self.gpu.links.seconds(each.wire_bytes * (1 - outside), each.wire_bytes * outside)
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

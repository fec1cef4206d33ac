"""The routing of a trace as plans see it: placements made from it, the load of every slot, and the skew of every layer.

The first half of a trace makes placements and the second half judges them, as in ``jaxmoe place``.
"""

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxmoe.checks import integer
from jaxmoe.config import DecoderConfig, MoEConfig
from jaxmoe.layers import MoE
from jaxmoe.placement import ExpertPlacement, PlacementTask, RoutingTrace, get_strategy
from jaxmoe.placement.balance import max_over_mean
from jaxmoe.placement.traffic import route_trace
from jaxmoe.planning.planned_model import PlannedModel

# As `jaxmoe.plan` takes it.
AnyPlacement = str | ExpertPlacement | Sequence[str | ExpertPlacement]


def check_routing(config: DecoderConfig, trace: RoutingTrace | None, skew: float | None) -> None:
    """Refuse a trace of another model, a skew that is none, or both.

    Args:
        config: config of the model.
        trace: routing trace, one layer for each MoE layer of the model.
        skew: the most rows of a device over the mean.

    Raises:
        ValueError: they do not fit.
    """
    if skew is not None and not skew >= 1:
        raise ValueError(f"skew is the most rows of a device over their mean, at least 1; got {skew!r}")
    if trace is None:
        return
    if skew is not None:
        raise ValueError(f"a trace tells the skew of every layer; leave out skew={skew!r}, or the trace")
    experts = _experts_per_layer(config)
    if [trace.num_experts] * trace.num_layers != experts:
        raise ValueError(
            f"a trace is of the model's own MoE layers: {len(experts)} layers of {sorted(set(experts))} experts; got "
            f"{trace.num_layers} layers of {trace.num_experts}"
        )


def checked_halves(
    config: DecoderConfig, trace: RoutingTrace | None, skew: float | None = None
) -> tuple[RoutingTrace | None, RoutingTrace | None]:
    """The half of a trace that makes placements, and the one that judges them; None and None without a trace.

    Raises:
        ValueError: the trace cannot be halved, or `check_routing` refuses it.
    """
    check_routing(config, trace, skew)
    return (None, None) if trace is None else trace.halves()


def resolve_placement(
    config: DecoderConfig,
    placement: AnyPlacement,
    sizes: Mapping[str, int],
    expert_axes: Sequence[str],
    *,
    past: RoutingTrace | None = None,
    redundancy: int = 0,
) -> AnyPlacement:
    """Make the placement that a strategy's name stands for; what is no name, or needs neither trace nor replicas, is kept.

    Args:
        config: config of the model.
        placement: placement, as for `jaxmoe.plan`.
        sizes: sizes of the mesh.
        expert_axes: mesh axes that share the experts.
        past: trace to make it from.
        redundancy: slots of each device beyond those that hold every expert once.

    Raises:
        ValueError: the strategy cannot place this, or the placement has its slots already.
    """
    redundancy = integer("redundancy", redundancy, least=0)
    if not isinstance(placement, str):
        if redundancy:
            raise ValueError(
                "redundancy is for a strategy's name: a placement that is made already has its slots; make one with more "
                "(num_slots), or name a strategy"
            )
        return placement
    if past is None and not redundancy:
        return placement
    per_layer, ep = _experts_per_layer(config), math.prod([sizes.get(axis, 1) for axis in expert_axes])
    if len(set(per_layer)) != 1:
        raise ValueError(
            f"layers of equally many experts have replicas or a trace; these have {sorted(set(per_layer))}"
        )
    own = -(-per_layer[0] // ep)
    if own + redundancy > per_layer[0]:
        raise ValueError(
            f"a device holds an expert once: each of {ep} that share {per_layer[0]} experts has {own}, and can have "
            f"{per_layer[0] - own} more; got redundancy={redundancy}: share the experts over more devices, or ask for less"
        )
    task = PlacementTask(
        num_experts=per_layer[0],
        ep=ep,
        num_layers=len(per_layer),
        num_slots=ep * (own + redundancy) if redundancy else None,
        trace=past,
    )
    return get_strategy(placement)(task)


def slot_chances(moe: MoE, counts_E: np.ndarray) -> np.ndarray:
    """Chance that a token goes to each slot of a layer, float64 [n, p]; an expert's load is split evenly over replicas.

    Args:
        moe: layer.
        counts_E: [E], tokens of a trace that went to each expert; none at all stands for even routing.
    """
    share_E = np.asarray(counts_E, np.float64) if counts_E.sum() else np.ones(len(counts_E))
    share_E = share_E / share_E.sum() * moe.config.num_experts_per_tok / moe.placement.replica_counts
    slots_P = moe.placement.slot_to_expert
    return np.where(slots_P < 0, 0.0, np.minimum(share_E, 1.0)[slots_P]).reshape(moe.placement.ep, -1)


def layer_skew(model: PlannedModel, trace: RoutingTrace) -> tuple[float, ...]:
    """The most rows of a device over their mean, in every MoE layer."""
    layers = zip(model.moe_layers, trace.total_counts, strict=True)
    return tuple([float(max_over_mean(slot_chances(moe, counts_E).sum(axis=1))) for moe, counts_E in layers])


def sent_per_token(model: PlannedModel, trace: RoutingTrace) -> float | None:
    """Bytes of activations that a token sends to other devices, there and back, in all layers that it goes through.

    None for a trace of counts, which does not know which choices are one token's.
    """
    if trace.expert_ids is None:
        return None
    copies_L = route_trace(trace, model.placements).sent.sum(axis=(0, 2, 3))
    itemsize = jnp.dtype(model.dtype).itemsize
    main = [layer.moe for layer in model.layers[: model.config.num_main_layers] if hasattr(layer, "moe")]
    sent_L = [copies * moe.config.expert_input_size * itemsize for copies, moe in zip(copies_L, main, strict=False)]
    return float(2 * sum(sent_L) / len(trace.expert_ids))


def _experts_per_layer(config: DecoderConfig) -> list[int]:
    layers = [config.layers[index].feed_forward for index in config.moe_layers]
    return [layer.num_experts for layer in layers if isinstance(layer, MoEConfig)]

"""`rebalance`: the experts of a running model go where another placement of the same devices has them."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from jaxmoe.checks import instance_of
from jaxmoe.layers import MoE, MovedBytes, rebalance_layers
from jaxmoe.models import Decoder
from jaxmoe.placement import ExpertPlacement


def rebalance(
    model: nnx.Module,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement],
    *,
    num_nodes: int = 1,
    optimizer: Any = None,
) -> MovedBytes:
    """Swap experts on the devices until they lie as `placement` says; nothing is read from disk.

    The model itself is changed, layer by layer. Its logits stay as they are within rounding, and no program is compiled
    again. ``model.rebalance(placement)`` does the same for a model from `jaxmoe.load`.

    An optimizer has numbers for each weight, such as Adam's moments, and they lie like the experts. Give it whenever
    the model is trained with it: without it they stay where they are, and belong to other experts from then on.

    Args:
        model: model from `jaxmoe.load`, a `jaxmoe.MoE`, or any nnx module with such layers in it.
        placement: strategy's name or `ExpertPlacement` for all MoE layers, or one for each; on as many devices, with as
            many slots as the layers have.
        num_nodes: nodes of equally many devices along `expert_axes`; experts come from the nearest holder.
        optimizer: `nnx.Optimizer` that was made for `model`, or a state that ``tx.init(nnx.state(model, nnx.Param))`` of
            optax gave; what it has for the experts' weights goes where these go.

    Returns:
        Bytes copied, by the way they took.

    Raises:
        ValueError: a placement does not fit, the model has no MoE layer, or the optimizer has numbers for the experts
            that cannot go along (not in the shape of the weights, as Adafactor's, or not in Variables) or is for
            another module; nothing has been moved then.
        NotImplementedError: the mesh spans several processes.

    Example:
        >>> with model.record_routing() as routing:
        ...     outs = jaxmoe.generate(model, prompts, max_new_tokens=8)
        >>> moved = jaxmoe.rebalance(model, jaxmoe.ExpertPlacement.from_counts(routing.counts(), ep=4))
        >>> moved.total > 0
        True
    """
    instance_of("model", model, nnx.Module, "a model from jaxmoe.load, or an nnx module with jaxmoe.MoE layers in it")
    if isinstance(model, Decoder):
        return model.rebalance(placement, num_nodes=num_nodes, optimizer=optimizer)
    layers = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, MoE)]
    return rebalance_layers(model, layers, placement, num_nodes=num_nodes, optimizer=optimizer)

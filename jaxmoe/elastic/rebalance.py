"""`rebalance`: the experts of a running model go where another placement of the same devices has them."""

from collections.abc import Sequence

from jaxmoe.checks import instance_of
from jaxmoe.layers import MovedBytes
from jaxmoe.models import Decoder
from jaxmoe.placement import ExpertPlacement


def rebalance(
    model: Decoder, placement: str | ExpertPlacement | Sequence[str | ExpertPlacement], *, num_nodes: int = 1
) -> MovedBytes:
    """Swap experts on the devices until they lie as `placement` says; nothing is read from disk.

    The model itself is changed, layer by layer. Its logits stay as they are within rounding, and no program is compiled
    again. ``model.rebalance(placement)`` does the same.

    Args:
        model: model from `jaxmoe.load`.
        placement: strategy's name or `ExpertPlacement` for all MoE layers, or one for each; on as many devices, with as
            many slots as the layers have.
        num_nodes: nodes of equally many devices along `expert_axes`; experts come from the nearest holder.

    Returns:
        Bytes copied, by the way they took.

    Raises:
        ValueError: a placement does not fit, or the model has no MoE layer; nothing has been moved then.
        NotImplementedError: the mesh spans several processes.

    Example:
        >>> with model.record_routing() as routing:
        ...     outs = jaxmoe.generate(model, prompts, max_new_tokens=8)
        >>> moved = jaxmoe.rebalance(model, jaxmoe.ExpertPlacement.from_counts(routing.counts(), ep=4))
        >>> moved.total > 0
        True
    """
    instance_of("model", model, Decoder, "a model from jaxmoe.load")
    return model.rebalance(placement, num_nodes=num_nodes)

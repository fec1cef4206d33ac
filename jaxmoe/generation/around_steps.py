"""The work of an engine around each step: it notices changes of its model, and passes the routing on."""

import numpy as np
from flax import nnx

from jaxmoe.generation.model import Model
from jaxmoe.generation.programs import Record
from jaxmoe.layers import check_usable
from jaxmoe.models.routing import Routing, RoutingRecorder
from jaxmoe.placement.balancer import Balancer


class TakenArrays:
    """The arrays that a model has at this moment.

    Args:
        module: model.

    Raises:
        RuntimeError: it has no usable arrays, see `jaxmoe.layers.check_usable`.
    """

    def __init__(self, module: nnx.Module):
        check_usable(module)
        self._arrays = [(variable, variable.get_value()) for _, variable in nnx.to_flat_state(nnx.state(module))]

    @property
    def replaced(self) -> bool:
        """Whether the model has others by now, or one of these is deleted, which would take the process down."""
        return any(variable.get_value() is not value or value.is_deleted() for variable, value in self._arrays)


def wanted_record(recorder: RoutingRecorder | None, balancer: Balancer | None) -> Record:
    """The part of their routing that steps have to tell."""
    if recorder is not None and recorder.token_ids:
        return "token_ids"
    return "nothing" if recorder is None and balancer is None else "counts"


def pass_on(routing: Routing, model: Model, recorder: RoutingRecorder | None, balancer: Balancer | None) -> bool:
    """Tell recorder and balancer of a step's routing, and move the model's experts where the balancer wants it.

    Returns:
        Whether they were moved.
    """
    if recorder is not None:
        recorder.add(routing)
    if balancer is None:
        return False
    balancer.observe(np.asarray(routing.counts))
    placements = balancer.propose(model.placements)
    if placements is None:
        return False
    model.rebalance(placements, num_nodes=balancer.num_nodes, optimizer=balancer.optimizer)
    return True

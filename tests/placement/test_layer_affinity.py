"""Layer affinity where each expert has one successor: whoever follows it is on its device."""

import numpy as np
import pytest

from jaxmoe.placement import STRATEGIES, PlacementTask, RoutingTrace
from jaxmoe.placement.metrics import layer_crossings


@pytest.mark.parametrize("num_layers", [2, 3, 5])
def test_the_only_successor_of_an_expert_is_on_its_device(num_layers):
    """The order of successors is no involution: to follow tokens backwards is something else."""
    E = 12
    successor = np.random.default_rng(0).permutation(E)
    assert (successor[successor] != np.arange(E)).any()
    ids = [np.repeat(np.arange(E), 8)]
    for _ in range(num_layers - 1):
        ids.append(successor[ids[-1]])
    trace = RoutingTrace.from_expert_ids(np.stack(ids, axis=1)[:, :, None], E)
    placements = STRATEGIES["layer_affinity"](PlacementTask.from_trace(trace, 4))
    assert layer_crossings(placements, trace) == 0
    assert layer_crossings(STRATEGIES["linear"](PlacementTask.from_trace(trace, 4)), trace) > 0.3

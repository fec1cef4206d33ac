"""The nearest replica, for tokens of every device in every turn."""

import numpy as np

from jaxmoe.placement import ExpertPlacement
from jaxmoe.placement.replicas import REPLICA_CHOICES, ReplicaContext

EP, PER_NODE, TURNS = 4, 2, 6


def test_no_replica_is_nearer_than_the_one_that_is_taken():
    placement = ExpertPlacement(3, EP, [1, 2, 0, 1, 0, 1, 1, -1])
    holders = [
        set(placement.expert_to_slots[expert][placement.expert_to_slots[expert] >= 0] // 2) for expert in range(3)
    ]
    home, turn = (grid.ravel() for grid in np.meshgrid(np.arange(EP), np.arange(TURNS)))
    context = ReplicaContext(home=home, turn=turn, devices_per_node=PER_NODE, last_load=np.zeros(EP))
    ids = np.broadcast_to(np.arange(3), (home.size, 3))
    taken = REPLICA_CHOICES["local_first"](ids, placement, context) // placement.slots_per_device

    def distance(a: int, b: int) -> int:
        return 0 if a == b else 1 if a // PER_NODE == b // PER_NODE else 2

    for device, devices in zip(home, taken, strict=True):
        for expert, chosen in enumerate(devices):
            assert distance(device, chosen) == min(distance(device, holder) for holder in holders[expert])
    # Of replicas that are equally near, all have their turn.
    assert set(taken[home == 0, 1]) == {0}
    assert set(taken[home == 2, 2]) == {0}
    assert set(taken[home == 0, 0]) == {1}
    assert set(taken[home == 3, 0]) == {2}

"""Packing replicas on unequal devices, no two of one expert on a device.

Where EPLB's own packing asks for equally many slots everywhere and may put two replicas of
an expert side by side (which spreads no load), this one takes any number of slots for each
device, any speed, and keeps replicas apart.

Letters here, beside the common ones of docs/concepts/letters.md: N replicas.
"""

from collections import deque

import numpy as np


def pack_distinct(
    weights_N: np.ndarray, experts_N: np.ndarray, device_slots: np.ndarray, device_speeds: np.ndarray
) -> np.ndarray:
    """Put each replica on a device so that load / speed is level.

    Heaviest first, always on the device that would finish it earliest among those that have
    a free slot and not yet this expert. Where all free devices hold the expert, others make
    room along the shortest chain of moves. Swaps then level what the greedy order left.

    Args:
        weights_N: [N], the load of each replica.
        experts_N: [N], the expert it is of.
        device_slots: [ep], slots of each device; N is at most their sum.
        device_speeds: [ep], relative speed of each device.

    Returns:
        int64 [N], the device of each replica; -1 for one that could go only where its expert already is.
    """
    assert weights_N.size <= device_slots.sum()
    packing = _Packing(weights_N, experts_N, device_slots, device_speeds)
    for item in np.argsort(-weights_N, kind="stable"):
        packing.add(int(item))
    packing.level()
    return packing.device_N


class _Packing:
    """The state of one packing: who is where, and the loads that follow from it."""

    def __init__(self, weights_N: np.ndarray, experts_N: np.ndarray, slots: np.ndarray, speeds: np.ndarray) -> None:
        self.weights_N, self.experts_N, self.speeds = weights_N.astype(np.float64), experts_N, speeds
        self.free = slots.astype(np.int64).copy()
        self.load = np.zeros(slots.size)
        self.holds = np.zeros((slots.size, int(experts_N.max()) + 1), bool)
        self.device_N = np.full(weights_N.size, -1, np.int64)

    def add(self, item: int) -> None:
        expert, weight = self.experts_N[item], self.weights_N[item]
        lacks = ~self.holds[:, expert]
        open_ = lacks & (self.free > 0)
        if open_.any():
            finish = np.where(open_, (self.load + weight) / self.speeds, np.inf)
            self._put(item, int(finish.argmin()))
        else:
            self._make_room(item)

    def level(self) -> None:
        """Swap replicas of the device that finishes last with others while that makes it finish earlier."""
        # Each swap lowers the latest finish of a pair; the bound only guards against endless tiny gains.
        for _ in range(4 * self.device_N.size):
            finish = self.load / self.speeds
            last = int(finish.argmax())
            mine = np.flatnonzero(self.device_N == last)
            theirs = np.flatnonzero((self.device_N != last) & (self.device_N >= 0))
            if not mine.size or not theirs.size:
                return
            other = self.device_N[theirs]
            moved = self.weights_N[mine][:, None] - self.weights_N[theirs]
            apart = ~self.holds[last, self.experts_N[theirs]] & ~self.holds[other[:, None], self.experts_N[mine]].T
            after = np.maximum(
                (self.load[last] - moved) / self.speeds[last], (self.load[other] + moved) / self.speeds[other]
            )
            after[~apart | (moved <= 0)] = np.inf
            best = int(after.argmin())
            if not after.flat[best] < finish[last] * (1 - 1e-6):
                return
            give, take = int(mine[best // theirs.size]), int(theirs[best % theirs.size])
            home = int(self.device_N[take])
            self._take(give)
            self._take(take)
            self._put(give, home)
            self._put(take, last)

    def _make_room(self, item: int) -> None:
        """Move replicas along the shortest chain of devices that ends at a free slot, as in bipartite matching."""
        expert = self.experts_N[item]
        starts = np.flatnonzero(~self.holds[:, expert])
        came_from: dict[int, tuple[int, int] | None] = {int(device): None for device in starts}
        queue = deque(came_from)
        while queue:
            device = queue.popleft()
            for moving in np.flatnonzero(self.device_N == device):
                for target in np.flatnonzero(~self.holds[:, self.experts_N[moving]]):
                    if int(target) in came_from:
                        continue
                    came_from[int(target)] = (device, int(moving))
                    if self.free[target] > 0:
                        self._shift(int(target), came_from, item)
                        return
                    queue.append(int(target))
        # No chain: every arrangement doubles this expert somewhere, so the replica is left out.

    def _shift(self, target: int, came_from: dict[int, tuple[int, int] | None], item: int) -> None:
        step = came_from[target]
        while step is not None:
            source, moving = step
            self._take(moving)
            self._put(moving, target)
            target, step = source, came_from[source]
        self._put(item, target)

    def _put(self, item: int, device: int) -> None:
        self.device_N[item] = device
        self.free[device] -= 1
        self.load[device] += self.weights_N[item]
        self.holds[device, self.experts_N[item]] = True

    def _take(self, item: int) -> None:
        device = self.device_N[item]
        self.device_N[item] = -1
        self.free[device] += 1
        self.load[device] -= self.weights_N[item]
        self.holds[device, self.experts_N[item]] = False

"""`Balancer`: when a running model's experts should be placed anew, and where."""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.checks import check_positive, real_number
from jaxmoe.placement import STRATEGIES, get_strategy
from jaxmoe.placement.balance import max_over_mean
from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.migration import align
from jaxmoe.placement.strategy import PlacementTask
from jaxmoe.placement.traffic import device_loads


class Decision(NamedTuple):
    """Findings of a balancer at one of its looks.

    Attributes:
        step: steps observed until then.
        before: busiest device's load over the mean, mean over layers, as the experts were placed.
        after: that figure for the placement it found.
        moved: flag that the placement was proposed.
    """

    step: int
    before: float
    after: float
    moved: bool


@dataclasses.dataclass(kw_only=True)
class Balancer:
    """A watch over expert counts, which proposes a placement where the devices' loads have become uneven.

    Every `interval` steps it looks at the counts of the last `window` steps. Where the busiest device has more than
    `threshold` times the mean load (mean over layers), it makes a placement from those counts, and proposes
    it if that would be more even.

    Attributes:
        strategy: name in `STRATEGIES` of one that is made from counts.
        window: steps that count.
        interval: steps between two looks.
        threshold: load of the busiest device over the mean, at least 1.
        num_groups, num_nodes: groups and nodes, as `PlacementTask` has them.
        optimizer: optimizer that the model is trained with, as for `jaxmoe.rebalance`; None where it is not.
        history: decisions, one for each look that found more than `threshold`.

    Raises:
        ValueError: a number out of range, or a strategy that needs more than counts.

    Example:
        >>> balancer = Balancer(window=2, interval=2, threshold=1.2)
        >>> placements = [ExpertPlacement.linear(num_experts=4, ep=2)]
        >>> for _ in range(2):
        ...     balancer.observe(np.array([[9, 9, 1, 1]]))
        >>> balancer.propose(placements)[0].device_experts(0)
        [0, 2]
    """

    strategy: str = "eplb"
    window: int = 256
    interval: int = 64
    threshold: float = 1.1
    num_groups: int = 1
    num_nodes: int = 1
    optimizer: Any = dataclasses.field(default=None, repr=False, compare=False)
    history: list[Decision] = dataclasses.field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if get_strategy(self.strategy).needs != "counts":
            usable = sorted(name for name, strategy in STRATEGIES.items() if strategy.needs == "counts")
            raise ValueError(
                f"a balancer knows counts alone: strategy is one of {', '.join(usable)}; got {self.strategy!r}"
            )
        check_positive(self, "window", "interval", "num_groups", "num_nodes")
        self.threshold = real_number("Balancer.threshold", self.threshold, least=1, note=", max / mean")
        self._counts: deque[np.ndarray] = deque(maxlen=self.window)
        self._steps = 0

    def observe(self, counts_LE: np.ndarray) -> None:
        """Take note of one step's counts, [L, E]."""
        self._counts.append(np.asarray(counts_LE, np.int64))
        self._steps += 1

    def propose(self, placements: Sequence[ExpertPlacement]) -> list[ExpertPlacement] | None:
        """A better placement of every layer, with as many slots; None while there is no need of one.

        Args:
            placements: placement of each layer's experts now.
        """
        if not self._counts or self._steps % self.interval:
            return None
        counts_LE = np.sum(self._counts, axis=0)
        before = _unevenness(counts_LE, placements)
        if before <= self.threshold:
            return None
        first = placements[0]
        task = PlacementTask(
            num_experts=first.num_experts,
            ep=first.ep,
            counts=counts_LE,
            num_slots=first.num_slots,
            num_groups=self.num_groups,
            num_nodes=self.num_nodes,
        )
        made = [
            align(old, new, num_nodes=self.num_nodes)
            for old, new in zip(placements, get_strategy(self.strategy)(task), strict=True)
        ]
        after = _unevenness(counts_LE, made)
        self.history.append(Decision(self._steps, before, after, moved=after < before))
        return made if after < before else None


def _unevenness(counts_LE: np.ndarray, placements: Sequence[ExpertPlacement]) -> float:
    return float(max_over_mean(device_loads(counts_LE, placements)).mean())

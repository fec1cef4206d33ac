"""When a balancer looks, what it looks at, and when it proposes to move."""

import numpy as np
import pytest

from jaxmoe.placement import ExpertPlacement
from jaxmoe.placement.balancer import Balancer

LINEAR = [ExpertPlacement.linear(num_experts=4, ep=2)]
EVEN, UNEVEN, OTHER_WAY = (np.array([counts]) for counts in ([5, 5, 5, 5], [9, 9, 1, 1], [1, 1, 9, 9]))


def proposals(balancer: Balancer, counts: list[np.ndarray]) -> list[bool]:
    """Whether each step ends with a proposal."""
    found = []
    for one in counts:
        balancer.observe(one)
        found.append(balancer.propose(LINEAR) is not None)
    return found


def test_it_looks_every_so_many_steps():
    balancer = Balancer(interval=3, threshold=1.2)
    assert proposals(balancer, [UNEVEN] * 7) == [False, False, True, False, False, True, False]
    assert [decision.step for decision in balancer.history] == [3, 6]


@pytest.mark.parametrize(("threshold", "moves"), [(1.7, True), (1.8, False), (1.9, False)])
def test_only_more_than_the_threshold_is_uneven(threshold, moves):
    """18 of 20 tokens on one of two devices are 1.8 times the mean."""
    balancer = Balancer(interval=1, threshold=threshold)
    assert proposals(balancer, [UNEVEN]) == [moves]
    assert len(balancer.history) == moves


def test_an_even_load_is_left_alone():
    balancer = Balancer(interval=1, threshold=1.2)
    assert proposals(balancer, [EVEN] * 3) == [False] * 3
    assert balancer.history == []


def test_steps_before_the_window_do_not_count():
    assert proposals(Balancer(interval=2, window=2, threshold=1.2), [UNEVEN, OTHER_WAY]) == [False, False]
    assert proposals(Balancer(interval=2, window=1, threshold=1.2), [UNEVEN, OTHER_WAY]) == [False, True]

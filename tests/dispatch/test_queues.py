"""Queues and rounds, against loops."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings

from jaxmoe.dispatch import DispatchLayout
from jaxmoe.dispatch.queues import capacity, fill_queues, slots_at, take_round


def queues_of(slots_TK: np.ndarray, n: int, p: int) -> list[list[int]]:
    """The tokens in the queue for each device."""
    return [
        [t for t, slots in enumerate(slots_TK) if any(slot // p == d for slot in slots if slot >= 0)] for d in range(n)
    ]


@partial(jax.jit, static_argnums=(1, 2, 3))
def all_rounds(slots_TK, n: int, p: int, C: int):
    """The queues, and every round that any routing could need."""
    queues = fill_queues(slots_TK, n, p, C)
    return queues, [take_round(queues, jnp.int32(index), C) for index in range(-(-len(slots_TK) // C))]


# T, K, n, p, C: a destination a choice or fewer, one choice, one device, one token, queues longer and shorter than C.
SHAPES = [(12, 3, 5, 2, 5), (12, 5, 3, 4, 4), (7, 1, 8, 1, 1), (7, 2, 1, 4, 3), (1, 4, 4, 1, 1), (12, 2, 3, 2, 12)]


@settings(max_examples=100)
@given(shape=st.sampled_from(SHAPES), masked=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_rounds_walk_every_queue_once(shape, masked, seed):
    T, K, n, p, C = shape
    rng = np.random.default_rng(seed)
    slots_TK = rng.integers(0, rng.integers(1, n * p + 1), size=(T, K))
    slots_TK[rng.random((T, K)) < masked] = -1
    expected = queues_of(slots_TK, n, p)
    queues, rounds = jax.device_get(all_rounds(slots_TK.astype(np.int32), n, p, C))
    assert queues.lengths_n.tolist() == [len(queue) for queue in expected]
    answered = np.zeros((T, n), int)
    for index, now in enumerate(rounds):
        for d, queue in enumerate(expected):
            part = queue[index * C : (index + 1) * C]
            assert now.sizes_n[d] == len(part)
            assert now.tokens[d, : len(part)].tolist() == part
        # The answer for a token comes back from where the token was put.
        for t, j in np.argwhere(now.places >= 0):
            d, place = divmod(now.places[t, j], C)
            assert place < now.sizes_n[d]
            assert now.tokens[d, place] == t
            answered[t, d] += 1
    np.testing.assert_array_equal(answered, [[t in queue for queue in expected] for t in range(T)])


def test_slots_of_one_device():
    slots = jnp.array([[0, 5, -1], [7, 4, 3]])
    assert slots_at(slots, jnp.int32(1), 4).tolist() == [[-1, 1, -1], [3, 0, -1]]


def layout(n, p):
    return DispatchLayout(mesh_shape=(("ep", n),), expert_axes=("ep",), partial_axes=(), num_slots=n * p)


@given(T=st.integers(1, 5000), K=st.integers(1, 16), n=st.integers(1, 64), p=st.integers(1, 8))
@example(T=1, K=1, n=64, p=1)
def test_capacity_has_room_for_an_even_routing(T, K, n, p):
    K = min(K, n * p)
    C = capacity(T, K, layout(n, p))
    assert 1 <= C <= T
    assert min(T, T * K / (n * p)) <= C
    assert C % 8 == 0 or C == T


def test_one_round_is_usual_for_random_routing():
    """The room above the mean is enough for 4096 tokens on 8 devices, for every number of experts per token."""
    rng = np.random.default_rng(0)
    for K in (1, 2, 4, 8):
        slots_TK = np.argsort(rng.random((512, 64)), axis=1)[:, :K]
        need = max(len(queue) for queue in queues_of(slots_TK, 8, 8))
        assert need <= capacity(512, K, layout(8, 8)) < 1.7 * need

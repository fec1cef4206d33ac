"""Sums over a number of rounds known only at run time, with a gradient in the same memory."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.numerics import sum_dtype, zeros_behind

# (index of the round, what a gradient is taken of, everything else that is traced) -> what the round adds to the sum.
Body = Callable[[jax.Array, Any, Any], jax.Array]


class Bodies(NamedTuple):
    """A body, and the way in which it is run.

    Attributes:
        forward: function that is summed.
        for_gradient: function that stands for it where a gradient is taken.
        first_apart: flag that round 0 is done before the loop: work around the loop can then overlap the collectives of the
            round that is mostly the only one. The program holds the body twice.
    """

    forward: Body
    for_gradient: Body
    first_apart: bool = False


def sum_rounds(bodies: Bodies, rounds: int | jax.Array, inputs: Any, constants: Any) -> jax.Array:
    """Σ_{i < rounds} body(i, inputs, constants), differentiable in `inputs`.

    d inputs = Σ_i (∂ body(i) / ∂ inputs)ᵀ dy: the backward pass runs the same rounds and does each of them again, so it
    keeps nothing but the inputs, whatever the number of rounds. It adds up in float32 (float64 for float64).

    Args:
        bodies: functions that close over no traced value; collectives are welcome.
        rounds: number of rounds, the same on all devices that share a collective of a body. A Python 1 needs no loop.
        inputs: pytree of floating-point arrays.
        constants: pytree of arrays that no gradient is taken of.
    """
    once = isinstance(rounds, int) and rounds == 1
    return _sum_rounds(bodies, once, jnp.int32(rounds), inputs, constants)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_rounds(bodies: Bodies, once: bool, rounds: jax.Array, inputs: Any, constants: Any) -> jax.Array:
    body = bodies.forward
    if once:
        return body(jnp.int32(0), inputs, constants)
    first = jax.tree.leaves(inputs)[0]
    return _add_up(lambda index: body(index, inputs, constants), rounds, first, first_apart=bodies.first_apart)


def _forward(
    bodies: Bodies, once: bool, rounds: jax.Array, inputs: Any, constants: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _sum_rounds(bodies, once, rounds, inputs, constants), (rounds, inputs, constants)


def _backward(bodies: Bodies, once: bool, residuals: tuple[Any, ...], dy: jax.Array) -> tuple[None, Any, None]:
    rounds, inputs, constants = residuals

    def pull_back(index: jax.Array) -> Any:
        _, pull = jax.vjp(lambda inputs: bodies.for_gradient(index, inputs, constants), inputs)
        return pull(dy)[0]

    if once:
        return None, pull_back(jnp.int32(0)), None
    sums = _add_up(
        lambda index: jax.tree.map(lambda x: x.astype(sum_dtype(x.dtype)), pull_back(index)),
        rounds,
        dy,
        first_apart=bodies.first_apart,
    )
    return None, jax.tree.map(lambda total, x: total.astype(x.dtype), sums, inputs), None


_sum_rounds.defvjp(_forward, _backward)


def _add_up(term: Callable[[jax.Array], Any], rounds: int | jax.Array, behind: jax.Array, *, first_apart: bool) -> Any:
    """Σ_{i < rounds} term(i), from zeros that wait for `behind` unless the first term stands apart."""

    def step(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        index, sums = state
        return index + 1, jax.tree.map(jnp.add, sums, term(index))

    if first_apart:
        start = (jnp.int32(1), term(jnp.int32(0)))
    else:
        out = jax.eval_shape(term, jax.ShapeDtypeStruct((), jnp.int32))
        start = (jnp.int32(0), jax.tree.map(lambda x: zeros_behind(behind, x.shape, x.dtype), out))
    return jax.lax.while_loop(lambda state: state[0] < rounds, step, start)[1]

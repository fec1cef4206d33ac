"""Experts chosen and weighted by a function of the user's."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.config.routers.base import ExpertChoice

RouterFunction = Callable[..., tuple[Any, Any]]
"""A choice of experts of one's own; see `ChosenByFunction`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenByFunction(ExpertChoice):
    """Experts and weights by a function of one's own, which looks at no correction bias and no experts' factors.

    Attributes:
        function: function of float32 logits [T, E] and K, traced by JAX, that gives integers [T, K], experts that differ
            from each other, and weights [T, K]. With a parameter ``expert_ids=None`` it can be replayed: given integers
            [T, K] there, it gives them back with the weights that they have. Masked tokens and padding have an x of zeros,
            of which its gradient has to be finite.
    """

    function: RouterFunction

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(f"ChosenByFunction.function is a function of logits and K; got {self.function!r:.80}")

    def choose(
        self, logits_TE: jax.Array, K: int, bias_E: jax.Array | None, scale_E: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Call the function.

        Raises:
            ValueError: it gives something of another shape or kind.
        """
        del bias_E, scale_E
        return self._checked(self.function(logits_TE, K), (logits_TE.shape[0], K), logits_TE.dtype)

    def weigh(self, logits_TE: jax.Array, ids_TK: jax.Array, scale_E: jax.Array | None) -> jax.Array:
        """Call the function with experts that are not its own choice.

        Raises:
            ValueError: it takes none, or gives something of another shape or kind.
        """
        del scale_E
        if "expert_ids" not in inspect.signature(self.function).parameters:
            raise ValueError(
                "a router function that is to weight given choices takes them as expert_ids=, integers [T, K], and gives "
                f"them back with their weights; {self._name!r} has no such parameter"
            )
        found = self.function(logits_TE, ids_TK.shape[1], expert_ids=ids_TK)
        return self._checked(found, ids_TK.shape, logits_TE.dtype)[1]

    @property
    def _name(self) -> object:
        return getattr(self.function, "__name__", self.function)

    def _checked(
        self, found: tuple, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
    ) -> tuple[jax.Array, jax.Array]:
        ids_TK, weights_TK = (jnp.asarray(array) for array in found)
        kinds = jnp.issubdtype(ids_TK.dtype, jnp.integer) and jnp.issubdtype(weights_TK.dtype, jnp.floating)
        if ids_TK.shape != shape or weights_TK.shape != shape or not kinds:
            raise ValueError(
                f"a router function gives integers and weights of shape [T, K], here {shape}; "
                f"{self._name!r} gives {ids_TK.dtype} {ids_TK.shape} and {weights_TK.dtype} {weights_TK.shape}"
            )
        return ids_TK.astype(jnp.int32), weights_TK.astype(dtype)

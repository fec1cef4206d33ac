"""The interface of a router's policies, and the normalizations of weights that they have."""

import abc
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmoe.checks import real_number


class ExpertChoice(abc.ABC):
    """A choice of K experts for each token, by float32 or float64 logits [T, E], and the weights of chosen experts.

    `weigh` gives experts that `choose` chose the weights that `choose` gave them. A subclass is a frozen dataclass, for
    configs are compared and hashed.

    Example:
        Experts by their logits, all with the same weight:

        >>> @dataclasses.dataclass(frozen=True)
        ... class Alike(ExpertChoice):
        ...     def choose(self, logits_TE, K, bias_E, scale_E):
        ...         ids_TK = jax.lax.top_k(logits_TE, K)[1]
        ...         return ids_TK, self.weigh(logits_TE, ids_TK, scale_E)
        ...     def weigh(self, logits_TE, ids_TK, scale_E):
        ...         return jnp.full(ids_TK.shape, 1 / ids_TK.shape[1], logits_TE.dtype)
        >>> Alike().choose(jnp.array([[0.0, 2.0, 1.0]]), 2, None, None)[0].tolist()
        [[1, 2]]
    """

    @property
    def expert_groups(self) -> int:
        """Number of equal groups that the experts are in."""
        return 1

    @abc.abstractmethod
    def choose(
        self, logits_TE: jax.Array, K: int, bias_E: jax.Array | None, scale_E: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Choose experts and weight them.

        Args:
            logits_TE: logits of all experts.
            K: experts for each token.
            bias_E: correction bias, which counts for the choice and not for the weight; None for none.
            scale_E: factors that experts' weights are multiplied by; None for none.

        Returns:
            int32 [T, K] experts and [T, K] weights in the logits' dtype, first choice first.
        """

    @abc.abstractmethod
    def weigh(self, logits_TE: jax.Array, ids_TK: jax.Array, scale_E: jax.Array | None) -> jax.Array:
        """Weight experts that were chosen in this order, whoever chose them; differentiable.

        Args:
            logits_TE: logits of all experts.
            ids_TK: int32, the chosen experts.
            scale_E: factors that experts' weights are multiplied by; None for none.

        Returns:
            [T, K] in the logits' dtype.
        """


class Normalization(Protocol):
    """A divisor of the weights of a token."""

    def normalize(self, weights_TK: jax.Array) -> jax.Array:
        """Divide each token's weights."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumNormalization:
    """Division by the sum of a token's weights.

    Attributes:
        epsilon: number added to the sum.
        min_sum: least value that the sum then counts as.
    """

    epsilon: float = 0.0
    min_sum: float = 0.0

    def __post_init__(self) -> None:
        check_real(self, "epsilon", least=0)
        check_real(self, "min_sum", least=0)

    def normalize(self, weights_TK: jax.Array) -> jax.Array:
        """Compute w / max(Σ w + epsilon, min_sum)."""
        total_T1 = jnp.sum(weights_TK, axis=-1, keepdims=True) + self.epsilon
        return weights_TK / jnp.maximum(total_T1, self.min_sum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PNormNormalization:
    """Division by the p-norm of a token's weights.

    Attributes:
        p: order of the norm, above 0.
    """

    p: float

    def __post_init__(self) -> None:
        check_real(self, "p", above=0)

    def normalize(self, weights_TK: jax.Array) -> jax.Array:
        """Compute w / (Σ w^p)^(1/p)."""
        return weights_TK / jnp.sum(weights_TK**self.p, axis=-1, keepdims=True) ** (1 / self.p)


def scaled(weights_TK: jax.Array, normalization: Normalization | None, scale: float) -> jax.Array:
    """Divide weights where there is a normalization, and multiply them by `scale`."""
    return (weights_TK if normalization is None else normalization.normalize(weights_TK)) * scale


def check_real(config: Any, name: str, **rule: float) -> None:
    """Make the attribute `name` of a frozen config a float, refused where it does not follow the rule of `real_number`."""
    rules: dict[str, Any] = rule
    value = real_number(f"{type(config).__name__}.{name}", getattr(config, name), **rules)
    object.__setattr__(config, name, value)

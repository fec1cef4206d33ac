"""Experts chosen one after the other, as SparseMixer does."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.config.routers.base import ExpertChoice, Normalization, check_real, scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseMixer(ExpertChoice):
    """One expert after the other, each weighted by a softmax over those left that come near it.

    Near the logit m of the one that is chosen are the logits s with (m - s) / max(|s|, m) of at most 2 · jitter; two
    experts close to each other so share a weight, and one far ahead of all has weight 1. This is what SparseMixer-v2
    (GRIN-MoE, arXiv:2409.12136) leaves of itself at inference. It looks at no correction bias and no experts' factors.

    Attributes:
        jitter: half of the relative distance within which experts share a weight.
        normalization: division of the K weights; None for the weights as they are.
        scale: factor of the weights.
    """

    jitter: float
    normalization: Normalization | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_real(self, "jitter", least=0)
        check_real(self, "scale")

    def choose(
        self, logits_TE: jax.Array, K: int, bias_E: jax.Array | None, scale_E: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Choose the largest logit that is left, each time."""
        del bias_E
        left_TE, ids = logits_TE, []
        for _ in range(K):
            id_T = jnp.argmax(left_TE, axis=-1).astype(jnp.int32)
            left_TE = _without(left_TE, id_T)
            ids.append(id_T)
        ids_TK = jnp.stack(ids, axis=-1)
        return ids_TK, self.weigh(logits_TE, ids_TK, scale_E)

    def weigh(self, logits_TE: jax.Array, ids_TK: jax.Array, scale_E: jax.Array | None) -> jax.Array:
        """Weight each expert among those that were left when it was chosen."""
        del scale_E
        left_TE, weights = logits_TE, []
        for k in range(ids_TK.shape[1]):
            id_T = ids_TK[:, k]
            logit_T1 = jnp.take_along_axis(left_TE, id_T[:, None], axis=-1)
            far_TE = (logit_T1 - logits_TE) / jnp.maximum(jnp.abs(logits_TE), logit_T1) > 2 * self.jitter
            near_TE = jax.nn.softmax(jnp.where(far_TE, -jnp.inf, left_TE), axis=-1)
            weights.append(jnp.take_along_axis(near_TE, id_T[:, None], axis=-1)[:, 0])
            left_TE = _without(left_TE, id_T)
        return scaled(jnp.stack(weights, axis=-1), self.normalization, self.scale)


def _without(left_TE: jax.Array, id_T: jax.Array) -> jax.Array:
    chosen_TE = jnp.arange(left_TE.shape[1], dtype=jnp.int32)[None] == id_T[:, None]
    return jnp.where(chosen_TE, -jnp.inf, left_TE)

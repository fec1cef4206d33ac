"""The K experts with the largest scores, of all or of the best groups."""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxmoe.checks import check_flags, check_positive, one_of
from jaxmoe.config.routers.base import ExpertChoice, Normalization, SumNormalization, check_real, scaled

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
GroupScore = Literal["max", "top2_sum"]

SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(ExpertChoice):
    """The K experts with the largest score, the lowest index first among equals, weighted by their scores.

    Shazeer et al. 2017 (arXiv:1701.06538), section 2.1; correction bias: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2.

    Attributes:
        score: name in `SCORES` of the function from logits to scores.
        score_after_top_k: whether experts are chosen by their logits, and only the K chosen logits are scored.
        normalization: division of the K weights; None for the scores as they are.
        scale: factor of the weights.
    """

    score: Score = "softmax"
    score_after_top_k: bool = False
    normalization: Normalization | None = dataclasses.field(default_factory=SumNormalization)
    scale: float = 1.0

    def __post_init__(self) -> None:
        one_of(f"{type(self).__name__}.score", self.score, get_args(Score))
        check_flags(self, "score_after_top_k")
        check_real(self, "scale")

    def choose(
        self, logits_TE: jax.Array, K: int, bias_E: jax.Array | None, scale_E: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Choose the K largest of score + bias, or of logit + bias."""
        choice_TE = logits_TE if self.score_after_top_k else SCORES[self.score](logits_TE)
        if bias_E is not None:
            choice_TE = choice_TE + bias_E.astype(choice_TE.dtype)[None]
        _, ids_TK = jax.lax.top_k(self._eligible(choice_TE), K)
        return ids_TK, self.weigh(logits_TE, ids_TK, scale_E)

    def weigh(self, logits_TE: jax.Array, ids_TK: jax.Array, scale_E: jax.Array | None) -> jax.Array:
        """Weight by score, divided and scaled, all alike or each expert's by its own factor."""
        score = SCORES[self.score]
        if self.score_after_top_k:
            weights_TK = score(jnp.take_along_axis(logits_TE, ids_TK, axis=-1))
        else:
            weights_TK = jnp.take_along_axis(score(logits_TE), ids_TK, axis=-1)
        weights_TK = scaled(self._counted(weights_TK, logits_TE.shape[1]), self.normalization, self.scale)
        if scale_E is not None:
            weights_TK *= scale_E.astype(weights_TK.dtype)[ids_TK]
        return weights_TK

    def _eligible(self, choice_TE: jax.Array) -> jax.Array:
        """The values to choose by, of which a subclass may put some out of reach."""
        return choice_TE

    def _counted(self, weights_TK: jax.Array, E: int) -> jax.Array:
        """The scores of the chosen, of which a subclass may leave some out."""
        del E
        return weights_TK


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedTopK(TopK):
    """The K best experts of the best groups; experts are in groups of equal size, in their order.

    DeepSeek-V2 (arXiv:2405.04434), section 2.2.2, and DeepSeek-V3 (arXiv:2412.19437), section 2.1.2.

    Attributes:
        num_groups: number of groups.
        topk_groups: number of groups that are eligible for a token.
        group_score: "max" where a group counts as its largest score, "top2_sum" for the sum of its two largest.
        zero_other_groups: whether experts of the other groups score 0, and so weigh nothing where they are chosen for
            want of others, instead of being no choice.
    """

    num_groups: int
    topk_groups: int
    group_score: GroupScore = "top2_sum"
    zero_other_groups: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_groups", "topk_groups")
        one_of(f"{type(self).__name__}.group_score", self.group_score, get_args(GroupScore))
        check_flags(self, "zero_other_groups")
        if self.topk_groups > self.num_groups:
            raise ValueError(
                f"a token chooses among at most all groups: topk_groups={self.topk_groups} is above "
                f"num_groups={self.num_groups}"
            )

    @property
    def expert_groups(self) -> int:
        """Number of groups, `num_groups`."""
        return self.num_groups

    def _eligible(self, choice_TE: jax.Array) -> jax.Array:
        T, E = choice_TE.shape
        groups_TGe = choice_TE.reshape(T, self.num_groups, -1)
        count = 1 if self.group_score == "max" else min(2, groups_TGe.shape[-1])
        group_TG = jnp.sum(jax.lax.top_k(groups_TGe, count)[0], axis=-1)
        _, best_TB = jax.lax.top_k(group_TG, self.topk_groups)
        chosen_TG = jnp.any(best_TB[:, :, None] == jnp.arange(self.num_groups, dtype=jnp.int32)[None, None], axis=1)
        eligible_TE = jnp.repeat(chosen_TG, E // self.num_groups, axis=1, total_repeat_length=E)
        return jnp.where(eligible_TE, choice_TE, 0 if self.zero_other_groups else -jnp.inf)

    def _counted(self, weights_TK: jax.Array, E: int) -> jax.Array:
        if not self.zero_other_groups:
            return weights_TK
        # The eligible groups' experts come first; what is chosen beyond them was chosen for want of others.
        return weights_TK.at[:, self.topk_groups * E // self.num_groups :].set(0)

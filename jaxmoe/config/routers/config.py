"""`RouterConfig`: a policy and the parameters that a router has."""

import dataclasses
from collections.abc import Iterable
from typing import TypedDict, Unpack

from jaxmoe.checks import check_flags, flag, instance_of
from jaxmoe.config.routers.base import ExpertChoice, Normalization, PNormNormalization, SumNormalization, check_real
from jaxmoe.config.routers.function import ChosenByFunction, RouterFunction
from jaxmoe.config.routers.sparsemixer import SparseMixer
from jaxmoe.config.routers.top_k import GroupedTopK, GroupScore, Score, TopK

_OF_WEIGHTS = {"renormalize", "sum_epsilon", "min_sum", "p_norm", "scale"}
_OF_GROUPS = {"num_groups", "topk_groups", "group_score", "zero_other_groups"}
_OF_TOP_K = {"score", "score_after_top_k"}


class ChoiceSwitches(TypedDict, total=False):
    """The short spelling of a policy; see `RouterConfig`."""

    score: Score
    score_after_top_k: bool
    renormalize: bool
    sum_epsilon: float
    min_sum: float
    p_norm: float | None
    num_groups: int
    topk_groups: int
    group_score: GroupScore
    zero_other_groups: bool
    scale: float
    sparsemixer: float | None
    function: RouterFunction | None


@dataclasses.dataclass(frozen=True, kw_only=True, init=False)
class RouterConfig:
    """A router: how experts are chosen and weighted, and the parameters that it has; see `jaxmoe.layers.router.route`.

    Attributes:
        choice: policy that chooses and weights, one of `jaxmoe.config`: `TopK`, `GroupedTopK`, `SparseMixer`,
            `ChosenByFunction`, or an `ExpertChoice` of one's own.
        logit_bias: whether the projection to logits has a bias.
        correction_bias: whether there is a bias per expert that counts for the choice and not for the weight.
        expert_scale: whether there is a learned factor per expert that its weight is multiplied by.
        input_norm_eps: epsilon of a norm before the router, which then sees x / rms(x) · scale / sqrt(D), with a learned
            scale [D]; None for x as it is.

    Args:
        switches: policy in short, instead of `choice`. Those that are not given are as in `TopK`:

            * score, score_after_top_k and scale of a `TopK`;
            * num_groups, topk_groups, group_score and zero_other_groups of a `GroupedTopK`, where there is more than one;
            * sum_epsilon and min_sum of a `SumNormalization`; renormalize=False for none;
            * p_norm, the p of a `PNormNormalization`, instead;
            * sparsemixer, the jitter of a `SparseMixer`, besides which only switches of the weights may be given;
            * function of a `ChosenByFunction`, besides which none may.

    Raises:
        ValueError: a name, number or flag that is none of those above, or switches that do not belong together.

    Example:
        DeepSeek-V3's router, in short and in full:

        >>> from jaxmoe.config import GroupedTopK, SumNormalization
        >>> short = RouterConfig(score="sigmoid", correction_bias=True, num_groups=8, topk_groups=4, sum_epsilon=1e-20)
        >>> normalization = SumNormalization(epsilon=1e-20)
        >>> choice = GroupedTopK(score="sigmoid", num_groups=8, topk_groups=4, normalization=normalization)
        >>> short == RouterConfig(choice=choice, correction_bias=True)
        True

        Experts by their logits, all with the same weight:

        >>> def alike(logits_TE, K, expert_ids=None):
        ...     ids_TK = jax.lax.top_k(logits_TE, K)[1] if expert_ids is None else expert_ids
        ...     return ids_TK, jnp.full(ids_TK.shape, 1 / K)
        >>> router = RouterConfig(function=alike)
    """

    choice: ExpertChoice
    logit_bias: bool
    correction_bias: bool
    expert_scale: bool
    input_norm_eps: float | None

    def __init__(
        self,
        *,
        choice: ExpertChoice | None = None,
        logit_bias: bool = False,
        correction_bias: bool = False,
        expert_scale: bool = False,
        input_norm_eps: float | None = None,
        **switches: Unpack[ChoiceSwitches],
    ):
        if unknown := switches.keys() - ChoiceSwitches.__annotations__.keys():
            raise TypeError(f"RouterConfig has no argument {' and '.join(sorted(unknown))}")
        if choice is not None and switches:
            raise ValueError(
                f"a router has a choice, or the switches of one; got choice={choice!r:.80} and {_names(switches)}; set "
                "them in the choice"
            )
        given = {
            "choice": _choice_of(switches) if choice is None else choice,
            "logit_bias": logit_bias,
            "correction_bias": correction_bias,
            "expert_scale": expert_scale,
            "input_norm_eps": input_norm_eps,
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        instance_of("RouterConfig.choice", self.choice, ExpertChoice, "an ExpertChoice, such as TopK()")
        check_flags(self, "logit_bias", "correction_bias", "expert_scale")
        if input_norm_eps is not None:
            # Of a mean of squares of zeros, which padding has, the gradient is finite only with an epsilon.
            check_real(self, "input_norm_eps", above=0)


def _choice_of(switches: ChoiceSwitches) -> ExpertChoice:
    """Make the policy that the switches mean.

    Raises:
        ValueError: some do not belong together, or have values that the policy does not take.
    """
    function, jitter = switches.get("function"), switches.get("sparsemixer")
    if function is not None:
        _refuse_besides("function", switches, _OF_TOP_K | _OF_GROUPS | _OF_WEIGHTS | {"sparsemixer"})
        return ChosenByFunction(function=function)
    normalization, scale = _normalization_of(switches), switches.get("scale", 1.0)
    if jitter is not None:
        _refuse_besides("sparsemixer", switches, _OF_TOP_K | _OF_GROUPS)
        return SparseMixer(jitter=jitter, normalization=normalization, scale=scale)
    ungrouped = TopK(
        score=switches.get("score", "softmax"),
        score_after_top_k=switches.get("score_after_top_k", False),
        normalization=normalization,
        scale=scale,
    )
    grouped = GroupedTopK(
        **vars(ungrouped),
        num_groups=switches.get("num_groups", 1),
        topk_groups=switches.get("topk_groups", 1),
        group_score=switches.get("group_score", "top2_sum"),
        zero_other_groups=switches.get("zero_other_groups", False),
    )
    return ungrouped if grouped.num_groups == 1 else grouped


def _normalization_of(switches: ChoiceSwitches) -> Normalization | None:
    p, renormalize = switches.get("p_norm"), flag("RouterConfig.renormalize", switches.get("renormalize", True))
    by_sum = SumNormalization(epsilon=switches.get("sum_epsilon", 0.0), min_sum=switches.get("min_sum", 0.0))
    if p is not None:
        return PNormNormalization(p=p)
    return by_sum if renormalize else None


def _refuse_besides(name: str, switches: ChoiceSwitches, others: set[str]) -> None:
    besides = {other for other, value in switches.items() if other in others and value is not None}
    if besides:
        raise ValueError(f"RouterConfig({name}=) has no part that {_names(besides)} could change: leave it out")


def _names(switches: Iterable[str]) -> str:
    return " and ".join(sorted(switches))

"""Configs of dense MLPs, of routers and of routed experts."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

from jaxmoe.checks import check_flags, check_positive, instance_of, one_of, real_number

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
GroupScore = Literal["max", "top2_sum"]
RouterFunction = Callable[..., tuple[Any, Any]]
"""A choice of experts of one's own; see `RouterConfig.function`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a router turns logits into experts and weights; see `jaxmoe.layers.router.route`.

    Attributes:
        score: from logits to scores, a name in `jaxmoe.layers.router.SCORES`.
        score_after_top_k: choose by the logits, and score only the K chosen ones.
        renormalize: divide the weights by their sum.
        sum_epsilon: added to that sum.
        min_sum: the sum is at least this.
        p_norm: divide the weights by their p-norm instead of their sum.
        logit_bias: the router's projection has a bias.
        correction_bias: a bias per expert that counts for the choice and not for the weight.
        num_groups: experts are in this many groups, of which `topk_groups` are eligible for a token.
        topk_groups: see `num_groups`.
        group_score: a group counts as its largest score, or as the sum of its two largest.
        zero_other_groups: experts of the other groups score 0, and so weigh nothing where they are chosen for want of
            others, instead of being no choice.
        scale: the weights are multiplied by it.
        expert_scale: the weight of each expert is multiplied by a learnt factor of that expert.
        input_norm_eps: the router sees x / rms(x) · scale / sqrt(D), with a learnt scale [D] and this epsilon; None for
            x as it is.
        sparsemixer: choose and weight by `jaxmoe.layers.router.sparsemixer` with this jitter; None for the above.
        function: choose and weight by this function of float32 logits [T, E] and K, which gives whole numbers [T, K],
            experts that differ from each other, and weights [T, K]. It is traced by JAX, and nothing but
            `input_norm_eps` and `logit_bias` counts beside it. With a parameter ``expert_ids=None`` it can be replayed:
            given whole numbers [T, K] there, it gives them back with the weights that they have. Masked tokens and padding
            have an x of zeros there, of which its gradient has to be finite. None for the above.

    Raises:
        ValueError: a name, number or flag that is none of those above.

    Example:
        Experts by their logits, all with the same weight:

        >>> def alike(logits_TE, K, expert_ids=None):
        ...     ids_TK = jax.lax.top_k(logits_TE, K)[1] if expert_ids is None else expert_ids
        ...     return ids_TK, jnp.full(ids_TK.shape, 1 / K)
        >>> router = RouterConfig(function=alike)
    """

    score: Score = "softmax"
    score_after_top_k: bool = False
    renormalize: bool = True
    sum_epsilon: float = 0.0
    min_sum: float = 0.0
    p_norm: float | None = None
    logit_bias: bool = False
    correction_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: GroupScore = "top2_sum"
    zero_other_groups: bool = False
    scale: float = 1.0
    expert_scale: bool = False
    input_norm_eps: float | None = None
    sparsemixer: float | None = None
    function: RouterFunction | None = None

    def __post_init__(self) -> None:
        check_positive(self, "num_groups", "topk_groups")
        one_of("RouterConfig.score", self.score, get_args(Score))
        one_of("RouterConfig.group_score", self.group_score, get_args(GroupScore))
        check_flags(
            self,
            "score_after_top_k",
            "renormalize",
            "logit_bias",
            "correction_bias",
            "zero_other_groups",
            "expert_scale",
        )
        self._check_numbers()
        if self.function is not None and not callable(self.function):
            raise ValueError(f"RouterConfig.function is a function of logits and K, or None; got {self.function!r:.80}")
        if self.topk_groups > self.num_groups:
            raise ValueError(f"topk_groups={self.topk_groups} is above num_groups={self.num_groups}")

    def _check_numbers(self) -> None:
        # Of a mean of squares of zeros, which padding has, the gradient is finite only with an epsilon.
        rules: dict[str, dict[str, Any]] = {
            "sum_epsilon": {"least": 0},
            "min_sum": {"least": 0},
            "p_norm": {"above": 0},
            "scale": {},
            "input_norm_eps": {"above": 0},
            "sparsemixer": {"least": 0},
        }
        for name, rule in rules.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, real_number(f"RouterConfig.{name}", value, **rule))
            elif name in ("sum_epsilon", "min_sum", "scale"):
                raise ValueError(f"RouterConfig.{name} is a finite number; got None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A dense MLP: down(act(gate x) · up x).

    Attributes:
        hidden_size: D.
        intermediate_size: width between the products.
        activation: a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
        bias: every projection has a bias.
        gated: False for down(act(up x)), without a gate.
    """

    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    bias: bool = False
    gated: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "intermediate_size")
        check_flags(self, "bias", "gated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A layer of routed experts, each a gated MLP, and perhaps experts that serve every token.

    Attributes:
        num_experts: logical experts E.
        num_experts_per_tok: experts K that each token goes to.
        hidden_size: model width D.
        moe_intermediate_size: expert width F.
        activation: a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
        activation_limit: bound of a clamped activation, for those that have one.
        bias: every expert's projections have a bias.
        gated: False for down(act(up x)), without a gate.
        router: how experts are chosen and weighted.
        weights_on_input: the weight multiplies what goes into an expert instead of what comes out.
        shared: the experts that serve every token, as one MLP; None for none.
        shared_gate: the shared experts' output is multiplied by sigmoid(w · x).
        latent_size: the routed experts work on a projection of x to this width, and their sum is projected back; None
            for x itself. Router and shared experts see x either way.
        latent_bias: these two projections have a bias.

    Raises:
        ValueError: a size below 1, K above E, or E not divisible by the router's groups.
    """

    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    activation: str = "silu"
    activation_limit: float | None = None
    bias: bool = False
    gated: bool = True
    router: RouterConfig = RouterConfig()
    weights_on_input: bool = False
    shared: MLPConfig | None = None
    shared_gate: bool = False
    latent_size: int | None = None
    latent_bias: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size")
        check_flags(self, "bias", "gated", "weights_on_input", "shared_gate", "latent_bias")
        instance_of("MoEConfig.router", self.router, RouterConfig, "a RouterConfig")
        if self.activation_limit is not None:
            limit = real_number("MoEConfig.activation_limit", self.activation_limit, above=0)
            object.__setattr__(self, "activation_limit", limit)
        if self.shared is not None:
            instance_of("MoEConfig.shared", self.shared, MLPConfig, "an MLPConfig, or None")
            if self.shared.hidden_size != self.hidden_size:
                raise ValueError(
                    f"experts that serve every token have the layer's width: hidden_size={self.hidden_size}, and that of "
                    f"shared is {self.shared.hidden_size}"
                )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"a token goes to at most all experts: num_experts_per_tok={self.num_experts_per_tok} is above "
                f"num_experts={self.num_experts}"
            )
        if self.num_experts % self.router.num_groups:
            raise ValueError(
                f"expert groups are of equal size: num_experts={self.num_experts} is no multiple of "
                f"num_groups={self.router.num_groups}"
            )
        if self.latent_size is not None:
            check_positive(self, "latent_size")
        elif self.latent_bias:
            raise ValueError("latent_bias is of the projections to latent_size, which is None")

    @property
    def expert_input_size(self) -> int:
        """Width of what a routed expert takes and gives."""
        return self.hidden_size if self.latent_size is None else self.latent_size

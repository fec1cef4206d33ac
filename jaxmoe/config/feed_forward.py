"""Configs of dense MLPs and of routed experts."""

import dataclasses

from jaxmoe.checks import check_flags, check_positive, instance_of, integer, real_number
from jaxmoe.config.routers import RouterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A dense MLP: down(act(gate x) · up x).

    Attributes:
        hidden_size: model width D.
        intermediate_size: width between the products.
        activation: name in `jaxmoe.numerics.ACTIVATIONS`, or of a clamped activation of experts.
        bias: whether every projection has a bias.
        gated: whether there is a gate; without one the MLP is down(act(up x)).
        activation_limit: bound of a clamped activation; None for those that have none.
    """

    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    bias: bool = False
    gated: bool = True
    activation_limit: float | None = None

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "intermediate_size")
        check_flags(self, "bias", "gated")
        _check_limit(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A layer of routed experts, each a gated MLP, and perhaps experts that serve every token.

    Attributes:
        num_experts: number of logical experts, E.
        num_experts_per_tok: number of experts that each token goes to, K.
        zero_experts: number of choices of the router besides, ids E and above, that give back their input and so cost no
            computation: a token is nowhere sent for them. "Experts" that have weights are the `num_experts` alone.
        hidden_size: model width D.
        moe_intermediate_size: expert width F.
        activation: name in `jaxmoe.numerics.ACTIVATIONS`.
        activation_limit: bound of a clamped activation; None for those that have none.
        bias: whether every expert's projections have a bias.
        gated: whether experts have a gate; without one they are down(act(up x)).
        router: choice and weights of a token's experts.
        weights_on_input: whether the weight multiplies the input of an expert instead of its output.
        shared: experts that serve every token, as one MLP; None for none.
        shared_gate: whether the shared experts' output is multiplied by sigmoid(w · x).
        latent_size: width of a projection of x that the routed experts work on, their sum being projected back; None for
            x itself. Router and shared experts see x either way.
        latent_bias: whether these two projections have a bias.
        latent_norm_eps: epsilon of a norm of the sum before it is projected back; None for no norm.

    Raises:
        ValueError: a size below 1, K above the number of choices, or that not divisible by the router's groups.
    """

    num_experts: int
    num_experts_per_tok: int
    zero_experts: int = 0
    hidden_size: int
    moe_intermediate_size: int
    activation: str = "silu"
    activation_limit: float | None = None
    bias: bool = False
    gated: bool = True
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    weights_on_input: bool = False
    shared: MLPConfig | None = None
    shared_gate: bool = False
    latent_size: int | None = None
    latent_bias: bool = False
    latent_norm_eps: float | None = None

    def __post_init__(self) -> None:
        check_positive(self, "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size")
        check_flags(self, "bias", "gated", "weights_on_input", "shared_gate", "latent_bias")
        instance_of("MoEConfig.router", self.router, RouterConfig, "a RouterConfig")
        _check_limit(self)
        if self.shared is not None:
            instance_of("MoEConfig.shared", self.shared, MLPConfig, "an MLPConfig, or None")
            if self.shared.hidden_size != self.hidden_size:
                raise ValueError(
                    f"experts that serve every token have the layer's width: hidden_size={self.hidden_size}, and that of "
                    f"shared is {self.shared.hidden_size}"
                )
        integer("MoEConfig.zero_experts", self.zero_experts, least=0)
        besides = f" with zero_experts={self.zero_experts}" if self.zero_experts else ""
        if self.num_experts_per_tok > self.num_choices:
            raise ValueError(
                f"a token goes to at most all experts: num_experts_per_tok={self.num_experts_per_tok} is above "
                f"num_experts={self.num_experts}{besides}"
            )
        if self.num_choices % self.router.choice.expert_groups:
            raise ValueError(
                f"expert groups are of equal size: num_experts={self.num_experts}{besides} is no multiple of "
                f"num_groups={self.router.choice.expert_groups}"
            )
        if self.latent_size is not None:
            check_positive(self, "latent_size")
        elif self.latent_bias or self.latent_norm_eps is not None:
            raise ValueError("latent_bias and latent_norm_eps are of the projections to latent_size, which is None")

    @property
    def num_choices(self) -> int:
        """Number of what the router chooses from, experts and zero experts."""
        return self.num_experts + self.zero_experts

    @property
    def experts_met(self) -> float:
        """Mean number of experts that a token meets where the router chooses all alike: K without zero experts."""
        return self.num_experts_per_tok * self.num_experts / self.num_choices

    @property
    def expert_input_size(self) -> int:
        """Width of a routed expert's input and output."""
        return self.hidden_size if self.latent_size is None else self.latent_size


def _check_limit(config: MLPConfig | MoEConfig) -> None:
    """Make a limit a float, refused where it is no number above 0."""
    if config.activation_limit is not None:
        limit = real_number(f"{type(config).__name__}.activation_limit", config.activation_limit, above=0)
        object.__setattr__(config, "activation_limit", limit)

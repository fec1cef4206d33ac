"""Configs of recurrent layers and of short convolutions: layers with a state in place of a cache of positions."""

import dataclasses
import math
from typing import Literal

from jaxmoe.checks import check_flags, check_positive
from jaxmoe.config.token_mixers import TokenMixerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(TokenMixerConfig):
    """A recurrent layer: a memory per head that decays and overwrites, behind a short convolution.

    Yang et al. 2024 (arXiv:2412.06464).

    Attributes:
        num_key_heads: number of heads of queries and keys.
        num_value_heads: number of heads of values, each with a memory of its own; a multiple of `num_key_heads`.
        key_head_dim: width of a query and of a key.
        value_head_dim: width of a value.
        conv_kernel_size: number of taps of the convolution.
        activation: name in `jaxmoe.numerics.ACTIVATIONS` of the function after the convolution.
        gate: function of the gates of outputs.
        fused_projections: whether queries, keys, values and gates come from one projection, and decays and strengths from
            another, in which the rows of a key head and of its value heads are together; otherwise from one each.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_size: int
    activation: str = "silu"
    gate: Literal["silu", "sigmoid"] = "silu"
    fused_projections: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_size")
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"each key head serves the same number of value heads: num_value_heads={self.num_value_heads} is no "
                f"multiple of num_key_heads={self.num_key_heads}"
            )

    @property
    def value_heads_per_key_head(self) -> int:
        """Value heads that share a query and a key."""
        return self.num_value_heads // self.num_key_heads

    def tp_faults(self, tp: int) -> list[str]:
        """List key heads that do not split over tp; their value heads go with them."""
        return [f"linear_num_key_heads={self.num_key_heads}"] if self.num_key_heads % tp else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDAConfig(TokenMixerConfig):
    """Kimi delta attention: a gated delta net in which every row of a head's memory has a decay of its own.

    Kimi Team 2025 (arXiv:2510.26692), section 3.

    Attributes:
        num_heads: number of heads, each with queries, keys, values and a memory of its own.
        head_dim: width of a query, of a key and of a value.
        conv_kernel_size: number of taps of the convolution.
        activation: name in `jaxmoe.numerics.ACTIVATIONS` of the function after the convolution.
        decay_rank: width of the latent that decays are made from; None for decays straight from the activations.
        gate_rank: the same for the gates of the outputs.
        least_log_decay: logarithm of the strongest decay, below 0, which the sigmoid of a decay's rate is multiplied by;
            None for decays without a bound.
        wide_rates: whether the checkpoint has the heads' rates as [1, 1, H, 1] instead of [H].
        spare_rates: number of entries behind the heads' rates in the checkpoint that belong to no head.
    """

    num_heads: int
    head_dim: int
    conv_kernel_size: int
    activation: str = "silu"
    decay_rank: int | None = None
    gate_rank: int | None = None
    least_log_decay: float | None = None
    wide_rates: bool = False
    spare_rates: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "head_dim", "conv_kernel_size")
        check_flags(self, "wide_rates")
        if self.spare_rates < 0 or (self.spare_rates and self.wide_rates):
            raise ValueError(
                "entries behind the heads' rates are 0 or more, and none where the rates are [1, 1, H, 1]; got "
                f"spare_rates={self.spare_rates} and wide_rates={self.wide_rates}"
            )
        for name in ("decay_rank", "gate_rank"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        if self.least_log_decay is not None and not -math.inf < self.least_log_decay < 0:
            raise ValueError(
                "a decay is a number between 0 and 1, and its logarithm is below 0; got "
                f"least_log_decay={self.least_log_decay}"
            )

    def tp_faults(self, tp: int) -> list[str]:
        """List heads that do not split over tp."""
        return [f"linear_num_heads={self.num_heads}"] if self.num_heads % tp else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(TokenMixerConfig):
    """A selective state space layer, each channel with a state of its own, behind a short convolution.

    Gu and Dao 2023 (arXiv:2312.00752), with Jamba's norms (Lieber et al. 2024, arXiv:2403.19887).

    Attributes:
        num_channels: width between the projections.
        state_size: number of values of a channel's state.
        dt_rank: width of the projection that step sizes are made from.
        conv_kernel_size: number of taps of the convolution.
        activation: name in `jaxmoe.numerics.ACTIVATIONS` of the function after the convolution.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections in and out have one.
    """

    num_channels: int
    state_size: int
    dt_rank: int
    conv_kernel_size: int
    activation: str = "silu"
    conv_bias: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "num_channels", "state_size", "dt_rank", "conv_kernel_size")

    def tp_faults(self, tp: int) -> list[str]:
        """List channels that do not split over tp."""
        return [f"the Mamba width {self.num_channels}"] if self.num_channels % tp else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(TokenMixerConfig):
    """A state space layer in the dual form: a matrix state per head that decays, behind a short convolution.

    Dao and Gu 2024 (arXiv:2405.21060).

    Attributes:
        num_heads: number of heads, each with a state of its own.
        head_dim: width of a head's input.
        num_groups: number of groups of heads that share the inputs and readouts of their states; divides `num_heads`.
            Outputs are normalized over the heads of each.
        state_size: width of a state, [head_dim, state_size].
        conv_kernel_size: number of taps of the convolution.
        activation: name in `jaxmoe.numerics.ACTIVATIONS` of the function after the convolution.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections in and out have one.
        min_step: least step size.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_kernel_size: int
    activation: str = "silu"
    conv_bias: bool = True
    bias: bool = False
    min_step: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "head_dim", "num_groups", "state_size", "conv_kernel_size")
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"each group has the same number of heads: num_heads={self.num_heads} is no multiple of "
                f"num_groups={self.num_groups}"
            )

    @property
    def num_channels(self) -> int:
        """Number of inputs of all heads."""
        return self.num_heads * self.head_dim

    def tp_faults(self, tp: int) -> list[str]:
        """List heads and groups that do not split over tp; with fewer groups than ranks, ranks share one."""
        faults = [f"mamba_num_heads={self.num_heads}"] if self.num_heads % tp else []
        if self.num_groups % tp and tp % self.num_groups:
            faults.append(f"the Mamba groups {self.num_groups} (neither divides the other)")
        return faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConvConfig(TokenMixerConfig):
    """A gated short convolution, through which a token sees the few before it.

    Attributes:
        width: number of channels, the model's width.
        conv_kernel_size: number of taps of the convolution.
        bias: whether the convolution and the projections in and out have a bias.
    """

    width: int
    conv_kernel_size: int
    bias: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "width", "conv_kernel_size")

    def tp_faults(self, tp: int) -> list[str]:
        """List channels that do not split over tp."""
        return [f"the width of convolutions {self.width}"] if self.width % tp else []

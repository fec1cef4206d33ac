"""Configs of the layers through which a token sees the ones before it."""

import dataclasses

from jaxmoe.checks import check_positive
from jaxmoe.rotary import RopeConfig


class TokenMixerConfig:
    """What the layers have in common through which a token sees the ones before it; see `jaxmoe.layers.mixers`."""

    def tp_faults(self, tp: int) -> list[str]:
        """What does not split over `tp` ranks, as "name=value"."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig(TokenMixerConfig):
    """Multi-head latent attention: the keys and values of all heads come from one small latent.

    DeepSeek-V2 (arXiv:2405.04434), section 2.1.

    Attributes:
        num_heads: heads; each has keys and values of its own, made from the latent.
        kv_rank: width of the latent that keys and values are made from.
        q_rank: width of the latent that queries are made from; None for queries straight from the activations.
        nope_head_dim: dims of a head's query and key that carry no position.
        v_head_dim: dims of a head's value.
        rope: rotary embedding of the dims that follow, all of which rotate; their key is one for all heads.
        scale: of the scores.
        bias: the projections into the latents and the output projection have a bias.
        latent_norm_eps: epsilon of the latents' norms.
    """

    num_heads: int
    kv_rank: int
    q_rank: int | None
    nope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    scale: float
    bias: bool = False
    latent_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "kv_rank", "nope_head_dim", "v_head_dim")
        if self.q_rank is not None:
            check_positive(self, "q_rank")

    @property
    def rope_head_dim(self) -> int:
        """Dims of a head's query, and of the one key, that rotate."""
        return self.rope.rotary_dim

    def tp_faults(self, tp: int) -> list[str]:
        """Heads are split over tp; every rank has the latents."""
        return [f"num_attention_heads={self.num_heads}"] if self.num_heads % tp else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(TokenMixerConfig):
    """A recurrent layer: a memory per head that decays and overwrites, behind a short convolution.

    Yang et al. 2024 (arXiv:2412.06464).

    Attributes:
        num_key_heads: heads of queries and keys.
        num_value_heads: heads of values, each with a memory of its own; a multiple of `num_key_heads`.
        key_head_dim: width of a query and of a key.
        value_head_dim: width of a value.
        conv_kernel_size: taps of the convolution.
        activation: after the convolution, a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
        fused_projections: queries, keys, values and gates come from one projection, decays and strengths from another,
            in which the rows of a key head and of its value heads are together; otherwise from one each.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_size: int
    activation: str = "silu"
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
        """Key heads are split over tp, their value heads with them."""
        return [f"linear_num_key_heads={self.num_key_heads}"] if self.num_key_heads % tp else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(TokenMixerConfig):
    """A selective state space layer, each channel with a state of its own, behind a short convolution.

    Gu and Dao 2023 (arXiv:2312.00752), with Jamba's norms (Lieber et al. 2024, arXiv:2403.19887).

    Attributes:
        num_channels: width between the projections.
        state_size: numbers that a channel's state has.
        dt_rank: width of the projection that step sizes are made from.
        conv_kernel_size: taps of the convolution.
        activation: after the convolution, a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
        conv_bias: the convolution has a bias.
        bias: the projections in and out have one.
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
        """Channels are split over tp."""
        return [f"the Mamba width {self.num_channels}"] if self.num_channels % tp else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(TokenMixerConfig):
    """A state space layer in the dual form: a matrix state per head that decays, behind a short convolution.

    Dao and Gu 2024 (arXiv:2405.21060).

    Attributes:
        num_heads: heads, each with a state of its own.
        head_dim: width of a head's input.
        num_groups: groups of heads that share what enters their states and what reads them; divides `num_heads`. Outputs
            are normalised over the heads of each.
        state_size: a state is [head_dim, state_size].
        conv_kernel_size: taps of the convolution.
        activation: after the convolution, a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
        conv_bias: the convolution has a bias.
        bias: the projections in and out have one.
        min_step: step sizes are at least this.
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
        """Inputs of all heads."""
        return self.num_heads * self.head_dim

    def tp_faults(self, tp: int) -> list[str]:
        """Heads are split over tp; with fewer groups than ranks, ranks share one."""
        faults = [f"mamba_num_heads={self.num_heads}"] if self.num_heads % tp else []
        if self.num_groups % tp and tp % self.num_groups:
            faults.append(f"the Mamba groups {self.num_groups} (neither divides the other)")
        return faults

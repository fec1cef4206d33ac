"""Configs of the layers through which a token sees the ones before it."""

import dataclasses
import math
from typing import Literal

from jaxmoe.checks import check_flags, check_positive, integer
from jaxmoe.rotary import RopeConfig


class TokenMixerConfig:
    """A layer through which a token sees the ones before it; see `jaxmoe.layers.mixers`."""

    @property
    def chooses_positions(self) -> bool:
        """Whether it attends to chosen positions, which layers hand on to the ones after them."""
        return False

    def tp_faults(self, tp: int) -> list[str]:
        """List the sizes that do not split over `tp` ranks, as "name=value"."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """A choice of the positions that a token attends to, by small heads that share one key a position.

    DeepSeek-V3.2 (arXiv:2512.02556), section 2.1.

    Attributes:
        num_heads: number of heads that score positions.
        head_dim: width of each.
        topk: number of positions that a token attends to; all of them where there are no more.
        rope: rotary embedding of the leading dims of queries and keys; None for no positions.
        reuses: whether the choice is that of the last layer before which makes one; such a layer has no indexer of its own.
        key_norm_eps: epsilon of the norm of the keys.
        pool_size: number of positions of a pool, which has one key and is chosen as a whole. A token attends to the best of
            the pools that end at it or before it, `topk` positions, and to the positions behind the last such pool. None
            for positions that are chosen one by one.
    """

    num_heads: int
    head_dim: int
    topk: int
    rope: RopeConfig | None
    reuses: bool = False
    key_norm_eps: float = 1e-6
    pool_size: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "head_dim", "topk")
        check_flags(self, "reuses")
        if self.pool_size is not None:
            check_positive(self, "pool_size")
            if self.topk % self.pool_size:
                raise ValueError(
                    f"chosen positions (index_topk) fill pools of pool_size={self.pool_size} (index_kpool); got "
                    f"topk={self.topk}"
                )
        if self.rope is not None and self.rope.rotary_dim > self.head_dim:
            raise ValueError(
                f"the dims of an indexer's head that rotate are some of it: {self.rope.rotary_dim} of "
                f"head_dim={self.head_dim}"
            )

    @property
    def most_seen(self) -> int:
        """Number of positions that a token may attend to; where there are no more, it attends to all."""
        return self.topk if self.pool_size is None else self.topk + self.pool_size - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig(TokenMixerConfig):
    """Multi-head latent attention: the keys and values of all heads come from one small latent.

    DeepSeek-V2 (arXiv:2405.04434), section 2.1.

    Attributes:
        num_heads: number of heads; each has keys and values of its own, made from the latent.
        kv_rank: width of the latent that keys and values are made from.
        q_rank: width of the latent that queries are made from; None for queries straight from the activations.
        nope_head_dim: number of dims of a head's query and key that carry no position.
        v_head_dim: number of dims of a head's value.
        rope: rotary embedding of the dims that follow, all of which rotate; their key is one for all heads. None where
            nothing rotates.
        shared_key_dim: number of those dims, where none of them rotates, perhaps 0; None where `rope` gives it.
        scale: factor of the scores.
        bias: whether the projections into the latents and the output projection have a bias.
        latent_norm_eps: epsilon of the latents' norms.
        latent_scale: factor of the latent that keys and values are made from, behind its norm.
        indexer: choice of the positions that a token attends to; None for all up to its own.
        head_gates: whether each head has one number from a projection of its own, whose sigmoid multiplies the head's
            output.
        output_gate: whether every number of the heads' outputs has a gate from a projection of its own, whose sigmoid
            multiplies it.
    """

    num_heads: int
    kv_rank: int
    q_rank: int | None
    nope_head_dim: int
    v_head_dim: int
    rope: RopeConfig | None
    shared_key_dim: int | None = None
    scale: float
    bias: bool = False
    latent_norm_eps: float = 1e-6
    latent_scale: float = 1.0
    indexer: IndexerConfig | None = None
    head_gates: bool = False
    output_gate: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "kv_rank", "nope_head_dim", "v_head_dim")
        if (self.rope is None) == (self.shared_key_dim is None):
            raise ValueError(
                "the dims of the key that all heads share rotate, as rope says, or shared_key_dim says how many there are; "
                f"got rope={self.rope!r:.80} and shared_key_dim={self.shared_key_dim}"
            )
        if self.shared_key_dim is not None:
            integer("shared_key_dim", self.shared_key_dim, least=0)
        if self.q_rank is not None:
            check_positive(self, "q_rank")
        elif self.indexer is not None:
            raise ValueError(
                "an indexer's queries are made from the latent of the queries; q_rank (q_lora_rank) is None"
            )

    @property
    def chooses_positions(self) -> bool:
        """Whether there is an indexer."""
        return self.indexer is not None

    @property
    def rope_head_dim(self) -> int:
        """Dims of a head's query, and of the one key, that rotate where the layer has positions."""
        if self.rope is not None:
            return self.rope.rotary_dim
        assert self.shared_key_dim is not None
        return self.shared_key_dim

    def tp_faults(self, tp: int) -> list[str]:
        """List heads that do not split over tp; every rank has the latents."""
        return [f"num_attention_heads={self.num_heads}"] if self.num_heads % tp else []


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

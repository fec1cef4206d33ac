"""Configs of latent attention, and of the indexer that chooses the positions which an attention sees."""

import dataclasses

from jaxmoe.checks import check_flags, check_positive, integer
from jaxmoe.config.token_mixers import TokenMixerConfig
from jaxmoe.rotary import RopeConfig


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

"""The config of attention to a window and to compressed entries of what is before it."""

import dataclasses

from jaxmoe.checks import check_flags, check_positive
from jaxmoe.config.latent_attention import IndexerConfig
from jaxmoe.config.token_mixers import TokenMixerConfig
from jaxmoe.rotary import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """One entry for each run of positions, a sum that is weighted by gates.

    DeepSeek-V4's compressed sparse attention has an overlap and an indexer, its heavily compressed attention has neither.

    Attributes:
        rate: number of positions of a run.
        overlap: whether an entry is made of the run before as well, by projections of their own.
        indexer: choice of the entries that a token attends to, with compressed keys of its own; None for all of them.
    """

    rate: int
    overlap: bool
    indexer: IndexerConfig | None = None

    def __post_init__(self) -> None:
        check_positive(self, "rate")
        check_flags(self, "overlap")
        if self.indexer is not None and (self.indexer.rope is None or self.indexer.pool_size is not None):
            raise ValueError(
                "an indexer of entries rotates its keys and chooses entries one by one; got "
                f"rope={self.indexer.rope!r:.80} and pool_size={self.indexer.pool_size}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedAttentionConfig(TokenMixerConfig):
    """Attention of all heads to one key, which is the value too: of the last positions, and of compressed entries.

    Attributes:
        num_heads: number of heads.
        head_dim: width of a head, and of the key.
        q_rank: width of the latent that queries are made from.
        output_groups: number of groups of heads, each of which has an output projection of its own.
        output_rank: width of what each of these gives; another projection makes the result of all.
        window: number of positions that a token sees as they are, its own included.
        rope: rotary embedding of the trailing dims of queries and keys; it is taken back from the outputs.
        compression: entries of the positions from the first on; None for the window alone.
    """

    num_heads: int
    head_dim: int
    q_rank: int
    output_groups: int
    output_rank: int
    window: int
    rope: RopeConfig
    compression: CompressionConfig | None = None

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "head_dim", "q_rank", "output_groups", "output_rank", "window")
        if self.num_heads % self.output_groups:
            raise ValueError(
                f"each group has the same number of heads: num_heads={self.num_heads} is no multiple of "
                f"output_groups={self.output_groups}"
            )
        if self.rope.rotary_dim > self.head_dim:
            raise ValueError(
                f"the dims of a head that rotate are some of it: {self.rope.rotary_dim} of head_dim={self.head_dim}"
            )

    def tp_faults(self, tp: int) -> list[str]:
        """List groups of heads that do not split over tp; every rank has the keys and the entries."""
        return [f"o_groups={self.output_groups}"] if self.output_groups % tp else []

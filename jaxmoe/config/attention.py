"""The config of grouped-query attention and its parts: masks, norms of queries and keys, temperature."""

import dataclasses
from typing import Any, Literal, Protocol

from jaxmoe.checks import check_positive
from jaxmoe.config.token_mixers import TokenMixerConfig
from jaxmoe.rotary import RopeConfig


class AttentionMask(Protocol):
    """A bound on the positions that a token sees of those up to its own."""

    def first_seen(self, position: Any) -> Any:
        """Compute the first position that a token at `position` sees; integers, or arrays of them."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """A token sees the last positions, its own included.

    Attributes:
        size: number of them.
    """

    size: int

    def __post_init__(self) -> None:
        check_positive(self, "size")

    def first_seen(self, position: Any) -> Any:
        """Compute the first position of the window; below 0 near the start."""
        return position - self.size + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """Positions are in chunks of equal size, and a token sees its own chunk only.

    Attributes:
        size: positions of a chunk.
    """

    size: int

    def __post_init__(self) -> None:
        check_positive(self, "size")

    def first_seen(self, position: Any) -> Any:
        """Compute the first position of the chunk."""
        return position // self.size * self.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryKeyNorm:
    """RMS norms of queries and of keys.

    Attributes:
        over: "head" for each head on its own, "full" for the width of all heads together.
        weight: "plain", "zero_centered" for a factor of 1 + weight, or "none"; a norm over all heads has a plain one.
        after_rope: whether they come after the rotation instead of before.
    """

    over: Literal["head", "full"] = "head"
    weight: Literal["plain", "zero_centered", "none"] = "plain"
    after_rope: bool = False

    def __post_init__(self) -> None:
        if self.over == "full" and self.weight != "plain":
            raise ValueError(
                f'a norm of queries and keys over all heads has a plain weight; got over="full" and weight={self.weight!r}'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryTemperature:
    """A factor of queries that grows with their position: slope · ln(1 + ⌊(position + 1) / floor⌋) + 1.

    Attributes:
        floor: positions over which the factor stays the same.
        slope: growth of the factor, as in the formula.
    """

    floor: float
    slope: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(TokenMixerConfig):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    Attributes:
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads; divides `num_heads`.
        head_dim: width of a head.
        v_head_dim: width of a head's values; that of its queries and keys where None.
        rope: rotary embedding of queries and keys; None for no position embedding.
        mask: bound on the positions that a token sees; None for all up to its own.
        qk_norm: norms of queries and keys; None for none.
        biases: "qkv" for biases of the projections to queries, keys and values, "all" for one of the output projection
            too; None for none.
        scale: factor of the scores; head_dim^-0.5 where None.
        clip: bound that queries, keys and values are clipped to, ±clip, before the rotation and after a norm that is
            before it; None for none.
        sinks: whether each head has one more logit, whose probability is dropped (attention sinks).
        temperature: factor of queries far from the start; None for none.
        values_are_keys: whether the keys, before their norm and rotation, are the values too.
        value_scale: factor of the values; None for none.
        v_norm: whether values are RMS-normalized, each head on its own and without a weight.
        output_gate: whether each query head has a gate, whose sigmoid multiplies the head's output.
        gate_projection: whether the gates come from a projection of their own; without one each stands beside its head in
            the query projection.
        head_gates: whether each query head has one number from a projection of its own, whose sigmoid multiplies the
            head's output.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    rope: RopeConfig | None
    mask: AttentionMask | None = None
    qk_norm: QueryKeyNorm | None = None
    biases: Literal["qkv", "all"] | None = None
    scale: float | None = None
    clip: float | None = None
    sinks: bool = False
    temperature: QueryTemperature | None = None
    values_are_keys: bool = False
    value_scale: float | None = None
    v_norm: bool = False
    output_gate: bool = False
    gate_projection: bool = False
    head_gates: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "num_heads", "num_kv_heads", "head_dim")
        if self.gate_projection and not self.output_gate:
            raise ValueError("gate_projection is of the gates that output_gate=True gives; got output_gate=False")
        if self.v_head_dim is not None:
            check_positive(self, "v_head_dim")
            if self.values_are_keys or self.v_norm or self.output_gate:
                raise ValueError(
                    "values of a width of their own have a projection of their own, no norm, and no gate behind them; got "
                    f"v_head_dim={self.v_head_dim} beside values_are_keys, v_norm or output_gate"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"each key/value head serves the same number of query heads: num_heads={self.num_heads} is no "
                f"multiple of num_kv_heads={self.num_kv_heads}"
            )

    @property
    def value_width(self) -> int:
        """Width of a head's values and outputs."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def tp_faults(self, tp: int) -> list[str]:
        """List heads that do not split over tp; with fewer key/value heads than ranks, ranks share one."""
        faults = [f"num_attention_heads={self.num_heads}"] if self.num_heads % tp else []
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            faults.append(f"num_key_value_heads={self.num_kv_heads} (neither divides the other)")
        return faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparseAttentionConfig(AttentionConfig):
    """Grouped-query attention to the blocks of keys that an indexer chooses, for each key/value head its own.

    Attributes:
        index_head_dim: width of the indexer's queries, one for each key/value head, and of its one key.
        block_size: number of positions of a block.
        top_blocks: number of blocks that a token sees, those near it included.
        local_blocks: number of blocks that a token sees anyway: its own and those before it.
    """

    index_head_dim: int
    block_size: int
    top_blocks: int
    local_blocks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "index_head_dim", "block_size", "top_blocks")
        if not 0 <= self.local_blocks <= self.top_blocks:
            raise ValueError(
                f"the blocks near a token are among the {self.top_blocks} that it sees; got local_blocks={self.local_blocks}"
            )
        if self.rope is not None and self.rope.rotary_dim > self.index_head_dim:
            raise ValueError(
                f"the indexer's queries and key rotate as heads do, in their first {self.rope.rotary_dim} dims; got "
                f"index_head_dim={self.index_head_dim}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledBlockAttentionConfig(AttentionConfig):
    """Grouped-query attention to the blocks of keys that an indexer chooses by their mean, the same for all heads.

    A token sees the best of the blocks that end at it or before it, and the positions behind the last of those.

    Attributes:
        index_heads: number of heads of the indexer, which share one key.
        index_head_dim: width of each.
        block_size: number of positions of a block.
        top_blocks: number of whole blocks that a token sees.
    """

    index_heads: int
    index_head_dim: int
    block_size: int
    top_blocks: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "index_heads", "index_head_dim", "block_size", "top_blocks")
        if self.rope is not None and self.rope.rotary_dim > self.index_head_dim:
            raise ValueError(
                f"the indexer's queries and key rotate as heads do, in their first {self.rope.rotary_dim} dims; got "
                f"index_head_dim={self.index_head_dim}"
            )

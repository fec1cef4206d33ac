"""`Model`: all that generation asks of a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmoe.models.replay import RoutingReplay
from jaxmoe.models.routing import RoutingRecorder
from jaxmoe.placement import ExpertPlacement


class Limits(Protocol):
    """Part of a model's config that generation reads."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """Most tokens of prompt and text together."""
        ...


class Outline(Protocol):
    """Part of a model that is known before a weight is read; prompts are encoded and checked with it."""

    @property
    def config(self) -> Limits:
        """Sizes of the model."""
        ...

    @property
    def source(self) -> Path | None:
        """Directory with the model's tokenizer and EOS tokens; None where it comes from no checkpoint."""
        ...


@runtime_checkable
class HoldsAdapters(Protocol):
    """A model with adapters beside its weights: its array methods take ``adapter_ids_B`` too, int32 [B], -1 for none."""

    def adapter_ids(self, adapters: Sequence[str | None] | None, count: int) -> np.ndarray | None:
        """Numbers of the adapters by name, int32 [count], -1 for None; None where no sequence has one."""
        ...


@runtime_checkable
class Model(Outline, Protocol):
    """A model that `generate` takes: an `nnx.Module` with these members, such as `jaxmoe.Decoder`.

    Array methods are pure and traceable. B is a number that `padded_batch` returned.
    """

    @property
    def mesh(self) -> Mesh:
        """Devices that the model lives on."""
        ...

    @property
    def recorder(self) -> RoutingRecorder | None:
        """Recorder that is told of every step; None while nothing is recorded."""
        ...

    @property
    def replay(self) -> RoutingReplay | None:
        """Trace that every run replays; None while the routers choose."""
        ...

    @property
    def placements(self) -> list[ExpertPlacement]:
        """Placement of every MoE layer, for a balancer."""
        ...

    def rebalance(self, placement: list[ExpertPlacement], *, num_nodes: int = 1, optimizer: Any = None) -> Any:
        """Swap experts until they lie as a balancer has proposed."""
        ...

    def split_network(self) -> tuple[Any, Any]:
        """`nnx.split` of the model as it is while nothing is recorded or replayed."""
        ...

    def padded_batch(self, batch_size: int) -> int:
        """Rows to compute for `batch_size` sequences on this mesh."""
        ...

    def init_cache(self, batch_size: int, max_length: int) -> Any:
        """An empty KV cache, a pytree of sharded arrays."""
        ...

    def prefill_and_stats(
        self,
        tokens_BS: jax.Array,
        lengths_B: jax.Array,
        cache: Any,
        expert_ids_BSLK: jax.Array | None,
    ) -> tuple[jax.Array, Any, Any]:
        """Logits [B, V] of each row's last token, the filled cache, and one `MoEStats` per MoE layer.

        Rows are padded on the right; a row of length 0 is no prompt. The experts of `expert_ids_BSLK`, where there are
        any, are taken instead of the routers' own. A model that `HoldsAdapters` is given ``adapter_ids_B`` too, where a row
        has an adapter.
        """
        ...

    def decode_and_stats(
        self,
        tokens_B: jax.Array,
        positions_B: jax.Array,
        cache: Any,
        active_B: jax.Array,
        expert_ids_BLK: jax.Array | None,
    ) -> tuple[jax.Array, Any, Any]:
        """The same after one more token a row. Logits of inactive rows are never read."""
        ...

"""The layers through which a token sees the tokens before it: attention, and recurrent layers in its place.

A kind is a frozen config, an nnx module in a file of its own, and a line in `TOKEN_MIXERS`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from jaxmoe.config import (
    AttentionConfig,
    BlockSparseAttentionConfig,
    CompressedAttentionConfig,
    GatedDeltaNetConfig,
    KDAConfig,
    Mamba2Config,
    MambaConfig,
    MLAConfig,
    PooledBlockAttentionConfig,
    ShortConvConfig,
    TokenMixerConfig,
)
from jaxmoe.layers.attention import Attention
from jaxmoe.layers.block_sparse import BlockSparseAttention
from jaxmoe.layers.compressed_attention import CompressedAttention
from jaxmoe.layers.gated_delta_net import GatedDeltaNet
from jaxmoe.layers.kda import KimiDeltaAttention
from jaxmoe.layers.mamba import Mamba
from jaxmoe.layers.mamba2 import Mamba2
from jaxmoe.layers.mla import LatentAttention
from jaxmoe.layers.param import ParamFactory
from jaxmoe.layers.pooled_blocks import PooledBlockAttention
from jaxmoe.layers.short_conv import ShortConv


class TokenMixer(Protocol):
    """The interface that a decoder layer asks of every kind."""

    def cache_arrays(self, batch_size: int, max_length: int) -> Any:
        """The arrays that the layer keeps of the tokens seen, as a pytree of `CacheArray`."""
        ...

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        cache: Any,
        batch: tuple[str, ...],
        *,
        decode: bool = False,
        lengths_B: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Mix the tokens of each row: returns [B, S, D], and the cache (where given) with the new tokens in it.

        Rows are padded on the right, and padding stands where a row's last token does: a row's
        length is its largest position + 1. In `decode` the cache holds all tokens before, and S is 1. Attention, latent
        attention and the recurrent layers take several tokens at once too, at positions that follow each other, from each
        row's own first one on. Their cache is then as each of them has left it, see `jaxmoe.layers.cache.accepted`; or with
        `lengths_B` as the first so many of each row have left it, and those behind them count for nothing.

        `adapter_ids_B` are the adapters of the rows, see `jaxmoe.layers.weights.WeightSpecs.weights`.

        A layer whose config says that it `chooses_positions` is also given those that the layers before have chosen, as
        `chosen`, and gives those that it has attended to as a third result.
        """
        ...


TOKEN_MIXERS: dict[type[TokenMixerConfig], Callable[..., TokenMixer]] = {
    AttentionConfig: Attention,
    BlockSparseAttentionConfig: BlockSparseAttention,
    CompressedAttentionConfig: CompressedAttention,
    GatedDeltaNetConfig: GatedDeltaNet,
    KDAConfig: KimiDeltaAttention,
    Mamba2Config: Mamba2,
    MambaConfig: Mamba,
    MLAConfig: LatentAttention,
    PooledBlockAttentionConfig: PooledBlockAttention,
    ShortConvConfig: ShortConv,
}


def make_token_mixer(config: TokenMixerConfig, hidden_size: int, eps: float, *, param: ParamFactory) -> TokenMixer:
    """Make the layer that `config` describes, for activations of width `hidden_size` and norms with epsilon `eps`."""
    return TOKEN_MIXERS[type(config)](config, hidden_size, eps, param=param)

"""The kinds of residual streams where there are several.

A kind is a frozen config, two nnx modules in a file of its own, and a line in `STREAMS`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.config import AveragedStreamsConfig, BlockResidualsConfig, GatedStreamsConfig, HyperConnectionConfig
from jaxmoe.layers.block_residuals import BlockResiduals, BlockResidualsHead
from jaxmoe.layers.gated_streams import GatedStreams, GatedStreamsHead
from jaxmoe.layers.hyper import AveragingHead, HyperConnection, HyperHead

STREAMS: dict[type[Any], tuple[Callable[..., Any], Callable[..., Any]]] = {
    AveragedStreamsConfig: (HyperConnection, AveragingHead),
    BlockResidualsConfig: (BlockResiduals, BlockResidualsHead),
    GatedStreamsConfig: (GatedStreams, GatedStreamsHead),
    HyperConnectionConfig: (HyperConnection, HyperHead),
}
"""By the config: the module of a half of a layer, which gives its input and weights for `join_streams`, and that of one
stream from all, after the last layer."""


def join_streams(x_BSnD: jax.Array, weights: tuple[jax.Array, jax.Array | None] | None, y_BSD: jax.Array) -> jax.Array:
    """Give the streams behind a half of a layer: mixᵀ x + write · y.

    Args:
        x_BSnD: streams before it.
        weights: write [B, S, n] and mix [B, S, n, n]; without mix each stream stays what it was. None where the last
            stream alone is written to.
        y_BSD: result of the half.
    """
    if weights is None:
        return jnp.concatenate([x_BSnD[:, :, :-1], x_BSnD[:, :, -1:] + y_BSD[:, :, None]], axis=2)
    write_BSn, mix_BSmn = weights
    written = write_BSn.astype(y_BSD.dtype)[..., None] * y_BSD[:, :, None]
    kept = x_BSnD if mix_BSmn is None else jnp.einsum("bsmn,bsmd->bsnd", mix_BSmn.astype(x_BSnD.dtype), x_BSnD)
    return written + kept


def append_stream(x_BSnD: jax.Array, y_BSD: jax.Array) -> jax.Array:
    """Give the streams with the result of a half as one more."""
    return jnp.concatenate([x_BSnD, y_BSD[:, :, None]], axis=2)

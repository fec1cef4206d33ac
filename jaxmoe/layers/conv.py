"""The short causal convolution in front of recurrent layers, with the inputs it keeps between calls."""

import jax
import jax.numpy as jnp


def causal_conv(
    x_BSA: jax.Array,
    weight_AW: jax.Array,
    bias_A: jax.Array | None,
    state_BVA: jax.Array | None,
    lengths_B: jax.Array,
    *,
    dilation: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """y_t = Σ_w weight_w · x_{t-d(W-1-w)} + bias, each channel for itself, added up in float32.

    Letters: A channels, W taps, d positions apart, V = d (W - 1) inputs kept.

    Args:
        x_BSA: inputs, rows padded on the right.
        weight_AW: taps of every channel, the last one for the newest input.
        bias_A: numbers added to the result; None for none.
        state_BVA: V inputs before `x_BSA`, oldest first; None for the zeros before a sequence's start.
        lengths_B: int32, number of inputs of each row that count; the rest is padding.
        dilation: number of positions d from one tap to the next.

    Returns:
        [B, S, A], and the V inputs up to each row's length, for the next call.
    """
    B, S, A = x_BSA.shape
    W = weight_AW.shape[1]
    V = dilation * (W - 1)
    before = jnp.zeros((B, V, A), x_BSA.dtype) if state_BVA is None else state_BVA.astype(x_BSA.dtype)
    inputs = jnp.concatenate([before, x_BSA], axis=1)
    y_BSA = jnp.zeros((1, 1, A), jnp.float32) if bias_A is None else bias_A.astype(jnp.float32)[None, None]
    for tap in range(W):
        x = inputs[:, dilation * tap : dilation * tap + S]
        y_BSA = y_BSA + x.astype(jnp.float32) * weight_AW[:, tap].astype(jnp.float32)[None, None]
    kept_BV = lengths_B[:, None] + jnp.arange(V, dtype=jnp.int32)[None]
    return y_BSA.astype(x_BSA.dtype), jnp.take_along_axis(inputs, kept_BV[:, :, None], axis=1)

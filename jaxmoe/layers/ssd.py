"""The state space dual form of Mamba-2: a matrix state per head, computed by matrix products within chunks.

Dao and Gu 2024 (arXiv:2405.21060). A head has a state M of [p, n] numbers that all decay alike; several heads, a group,
share b and c. With a step size dt, an input x and a rate of decay below 0 each token does

    M_t = exp(dt_t rate) M_{t-1} + dt_t x_t b_tᵀ,    y_t = M_t c_t

Letters here, beside the common ones of docs/concepts/letters.md: G groups, H heads, q heads of a group, p numbers of a
head's input, n of its b and c, C positions of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

CHUNK_SIZE = 64

# Errors add up over a sequence: no product is rounded to fewer bits than its operands have.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def ssd_step(
    x_BHp: jax.Array, dt_BH: jax.Array, rate_H: jax.Array, b_BGn: jax.Array, c_BGn: jax.Array, state_BHpn: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Apply the recurrence to one token.

    Args:
        x_BHp: inputs.
        dt_BH: step sizes, at least 0.
        rate_H: rates of decay, below 0.
        b_BGn: factors by which the inputs of a group's heads enter their states.
        c_BGn: factors by which these are read.
        state_BHpn: states before the token.

    Returns:
        Outputs [B, H, p] and the states after the token, in the arguments' dtype.
    """
    heads = x_BHp.shape[1] // b_BGn.shape[1]
    b_BHn, c_BHn = (jnp.repeat(y_BGn, heads, axis=1) for y_BGn in (b_BGn, c_BGn))
    decay_BH11 = jnp.exp(dt_BH * rate_H[None])[..., None, None]
    state_BHpn = decay_BH11 * state_BHpn + (dt_BH[..., None] * x_BHp)[..., None] * b_BHn[:, :, None]
    return jnp.sum(state_BHpn * c_BHn[:, :, None], axis=-1), state_BHpn


def chunked_ssd(
    x_BSHp: jax.Array,
    dt_BSH: jax.Array,
    rate_H: jax.Array,
    b_BSGn: jax.Array,
    c_BSGn: jax.Array,
    state_BHpn: jax.Array | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[jax.Array, jax.Array]:
    """Apply the recurrence to a sequence: matrix products within chunks, and a scan over the chunks.

    Let g_i be the product of a chunk's decays up to its position i, and M the state before the chunk (section 6):

        y_i = g_i M c_i + Σ_{j ≤ i} (g_i / g_j) (c_i·b_j) dt_j x_j
        M'  = g_C M + Σ_j (g_C / g_j) dt_j x_j b_jᵀ

    A position with step size 0 leaves the states as they are.

    Args:
        x_BSHp: inputs.
        dt_BSH: step sizes, at least 0.
        rate_H: rates of decay, below 0.
        b_BSGn: factors by which the inputs of a group's heads enter their states.
        c_BSGn: factors by which these are read.
        state_BHpn: states before the sequence; None for zeros.
        chunk_size: number of positions of a chunk.

    Returns:
        Outputs [B, S, H, p] and the states after the sequence, in the arguments' dtype.
    """
    B, S, H, p = x_BSHp.shape
    G, n = b_BSGn.shape[2:]
    C = min(chunk_size, S)

    def chunks(y_BSi: jax.Array) -> jax.Array:
        """[chunks, B, C, ...], the last chunk filled up with positions of step size 0."""
        padded = jnp.pad(y_BSi, [(0, 0), (0, -S % C)] + [(0, 0)] * (y_BSi.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, -1, C, *y_BSi.shape[2:]), 1, 0)

    def one_chunk(state_BGqpn: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x_BCHp, dt_BCH, b_BCGn, c_BCGn = chunk
        x_BCGqp = (x_BCHp * dt_BCH[..., None]).reshape(B, C, G, -1, p)
        log_decay_BGqC = jnp.cumsum(jnp.moveaxis((dt_BCH * rate_H[None, None]).reshape(B, C, G, -1), 1, -1), axis=-1)
        # Masked before the exponential, which would overflow above the diagonal.
        between = log_decay_BGqC[..., :, None] - log_decay_BGqC[..., None, :]
        between = jnp.exp(jnp.where(jnp.tri(C, dtype=bool)[None, None, None], between, -jnp.inf))
        weights_BGqij = _einsum("bign,bjgn->bgij", c_BCGn, b_BCGn)[:, :, None] * between
        y_BCGqp = _einsum("bgqij,bjgqp->bigqp", weights_BGqij, x_BCGqp)
        kept = jnp.moveaxis(jnp.exp(log_decay_BGqC), -1, 1)[..., None]
        y_BCGqp += _einsum("bign,bgqpn->bigqp", c_BCGn, state_BGqpn) * kept
        left = jnp.moveaxis(jnp.exp(log_decay_BGqC[..., -1:] - log_decay_BGqC), -1, 1)[..., None]
        state_BGqpn = state_BGqpn * kept[:, -1, ..., None] + _einsum("bjgqp,bjgn->bgqpn", x_BCGqp * left, b_BCGn)
        return state_BGqpn, y_BCGqp

    if state_BHpn is None:
        state_BHpn = jnp.zeros((B, H, p, n), x_BSHp.dtype)
    inputs = (chunks(x_BSHp), chunks(dt_BSH), chunks(b_BSGn), chunks(c_BSGn))
    state, y = jax.lax.scan(one_chunk, state_BHpn.reshape(B, G, -1, p, n), inputs)
    return jnp.moveaxis(y, 0, 1).reshape(B, -1, H, p)[:, :S], state.reshape(B, H, p, n)

"""The selective scan of Mamba: every channel a small linear system whose step size depends on the token.

Gu and Dao 2023 (arXiv:2312.00752), section 3.2. Channel a has a state h of n numbers, which decay at rates of their
own. With a step size dt, an input x and vectors b and c each token does

    h_t = exp(dt_t rate) h_{t-1} + dt_t x_t b_t,    y_t = c_t · h_t

Letters here, beside the common ones of docs/concepts/letters.md: A channels, n numbers of a state, C positions of a
chunk.
"""

import jax
import jax.numpy as jnp

# A chunk's states [B, C, A, n] exist all at once: C bounds the memory, and the scan over chunks is S / C long.
CHUNK_SIZE = 16


def selective_step(
    x_BA: jax.Array, dt_BA: jax.Array, rate_An: jax.Array, b_Bn: jax.Array, c_Bn: jax.Array, state_BAn: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Apply the selective scan to one token.

    Args:
        x_BA: inputs.
        dt_BA: step sizes, at least 0.
        rate_An: rates of decay, below 0.
        b_Bn: factors by which the input enters the state.
        c_Bn: factors by which the state is read.
        state_BAn: states before the token.

    Returns:
        Outputs [B, A] and the states after the token, in the arguments' dtype.
    """
    state_BAn = jnp.exp(dt_BA[..., None] * rate_An[None]) * state_BAn + (dt_BA * x_BA)[..., None] * b_Bn[:, None]
    return jnp.sum(state_BAn * c_Bn[:, None], axis=-1), state_BAn


def selective_scan(
    x_BSA: jax.Array,
    dt_BSA: jax.Array,
    rate_An: jax.Array,
    b_BSn: jax.Array,
    c_BSn: jax.Array,
    state_BAn: jax.Array | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[jax.Array, jax.Array]:
    """Apply the selective scan to a sequence: an associative scan within chunks, and a scan over the chunks.

    Two steps h → d1 h + u1 and h → d2 h + u2 after each other are the step h → d1 d2 h + (d2 u1 + u2). A position with
    step size 0 leaves the states as they are.

    Args:
        x_BSA: inputs.
        dt_BSA: step sizes, at least 0.
        rate_An: rates of decay, below 0.
        b_BSn: factors by which the inputs enter the states.
        c_BSn: factors by which the states are read.
        state_BAn: states before the sequence; None for zeros.
        chunk_size: number of positions of a chunk.

    Returns:
        Outputs [B, S, A] and the states after the sequence, in the arguments' dtype.
    """
    B, S, A = x_BSA.shape
    C = min(chunk_size, S)

    def chunks(y_BSi: jax.Array) -> jax.Array:
        """[chunks, B, C, i], the last chunk filled up with positions of step size 0."""
        return jnp.moveaxis(jnp.pad(y_BSi, ((0, 0), (0, -S % C), (0, 0))).reshape(B, -1, C, y_BSi.shape[-1]), 1, 0)

    def after_each_other(
        first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (decay1, added1), (decay2, added2) = first, second
        return decay1 * decay2, decay2 * added1 + added2

    def one_chunk(state_BAn: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x_BCA, dt_BCA, b_BCn, c_BCn = chunk
        steps = (jnp.exp(dt_BCA[..., None] * rate_An[None, None]), (dt_BCA * x_BCA)[..., None] * b_BCn[:, :, None])
        decay_BCAn, added_BCAn = jax.lax.associative_scan(after_each_other, steps, axis=1)
        states_BCAn = decay_BCAn * state_BAn[:, None] + added_BCAn
        return states_BCAn[:, -1], jnp.sum(states_BCAn * c_BCn[:, :, None], axis=-1)

    before_BAn = jnp.zeros((B, *rate_An.shape), x_BSA.dtype) if state_BAn is None else state_BAn
    inputs = (chunks(x_BSA), chunks(dt_BSA), chunks(b_BSn), chunks(c_BSn))
    after_BAn, y = jax.lax.scan(one_chunk, before_BAn, inputs)
    return jnp.moveaxis(y, 0, 1).reshape(B, -1, A)[:, :S], after_BAn

"""The gated delta rule: a memory that decays, and in which a token overwrites what is stored under its key.

Yang et al. 2024 (arXiv:2412.06464). A head's memory S is a [k, v] matrix that maps keys to values. With a decay
a_t in (0, 1] and a strength b_t in [0, 1] each token does

    S_t = a_t S_{t-1} + k_t u_tᵀ,    u_t = b_t (v_t - a_t S_{t-1}ᵀ k_t),    o_t = S_tᵀ q_t

Letters here, beside the common ones of docs/concepts/letters.md: H heads, k and v the widths of a key and a value, n
chunks, C positions of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

CHUNK_SIZE = 64

# Errors add up over a sequence: no product is rounded to fewer bits than its operands have.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def delta_rule_step(
    q_BHk: jax.Array,
    k_BHk: jax.Array,
    v_BHv: jax.Array,
    log_decay_BH: jax.Array,
    beta_BH: jax.Array,
    state_BHkv: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Apply the gated delta rule to one token.

    Args:
        q_BHk: queries.
        k_BHk: keys, of length 1 (or 0).
        v_BHv: values.
        log_decay_BH: logarithms of the decays a, at most 0.
        beta_BH: strengths b.
        state_BHkv: memory before the token.

    Returns:
        Outputs [B, H, v] and the memory after the token, in the arguments' dtype.
    """
    decay_BH1 = jnp.exp(log_decay_BH)[..., None]
    # Both reads of the old memory in one pass over it: o = a Sᵀq + (k·q) u.
    reads = _einsum("bhik,bhkv->bhiv", jnp.stack([k_BHk, q_BHk], axis=2), state_BHkv) * decay_BH1[..., None]
    update_BHv = beta_BH[..., None] * (v_BHv - reads[:, :, 0])
    state_BHkv = state_BHkv * decay_BH1[..., None] + k_BHk[..., :, None] * update_BHv[..., None, :]
    return reads[:, :, 1] + jnp.sum(q_BHk * k_BHk, axis=-1, keepdims=True) * update_BHv, state_BHkv


def chunked_delta_rule(
    q_BSHk: jax.Array,
    k_BSHk: jax.Array,
    v_BSHv: jax.Array,
    log_decay_BSH: jax.Array,
    beta_BSH: jax.Array,
    state_BHkv: jax.Array | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[jax.Array, jax.Array]:
    """Apply the gated delta rule to a sequence: matrix products within chunks, and a scan over the chunks.

    Let g_i be the product of a chunk's decays up to its position i, and S the memory before the chunk. The updates u
    of a chunk depend on each other through a triangular system, and everything else on them (section 3.3):

        (I + T) U = diag(b) (V - diag(g) K S),    T_ij = b_i (g_i / g_j) k_i·k_j for j < i
        o_i = g_i Sᵀ q_i + Σ_{j ≤ i} (g_i / g_j) (q_i·k_j) u_j
        S'  = g_C S + Σ_j (g_C / g_j) k_j u_jᵀ

    U is linear in S, so the systems of all chunks are solved at once, before the scan. A position with decay 1 and
    strength 0 leaves the memory as it is.

    Args:
        q_BSHk: queries.
        k_BSHk: keys, of length 1 (or 0).
        v_BSHv: values.
        log_decay_BSH: logarithms of the decays a, at most 0.
        beta_BSH: strengths b.
        state_BHkv: memory before the sequence; None for an empty one.
        chunk_size: number of positions of a chunk.

    Returns:
        Outputs [B, S, H, v] and the memory after the sequence, in the arguments' dtype.
    """
    B, S, H, k = k_BSHk.shape
    v = v_BSHv.shape[-1]
    C = min(chunk_size, S)

    def chunks(x_BSH: jax.Array) -> jax.Array:
        """[n, B, H, C, ...], the last chunk filled up with positions that change nothing."""
        padded = jnp.pad(x_BSH, [(0, 0), (0, -S % C)] + [(0, 0)] * (x_BSH.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, -1, C, *x_BSH.shape[2:]), (1, 3), (0, 2))

    q, keys, values, beta = chunks(q_BSHk), chunks(k_BSHk), chunks(v_BSHv), chunks(beta_BSH)[..., None]
    log_decay = jnp.cumsum(chunks(log_decay_BSH), axis=-1)
    total = jnp.exp(log_decay)[..., None]
    # Masked before the exponential, which would overflow above the diagonal.
    between = log_decay[..., :, None] - log_decay[..., None, :]
    between = jnp.exp(jnp.where(jnp.tri(C, dtype=bool)[None, None, None], between, -jnp.inf))

    system = _einsum("nbhik,nbhjk->nbhij", keys * beta, keys) * between
    sides = jnp.concatenate([values * beta, keys * beta * total], axis=-1)
    # The solver reads below the diagonal and takes ones on it.
    solved = jax.lax.linalg.triangular_solve(system, sides, left_side=True, lower=True, unit_diagonal=True)
    scores = _einsum("nbhik,nbhjk->nbhij", q, keys) * between
    keys_out = keys * jnp.exp(log_decay[..., -1:] - log_decay)[..., None]

    def one_chunk(state_BHkv: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        updates, reads, scores, q, keys_out, decay = chunk
        updates = updates - _einsum("bhck,bhkv->bhcv", reads, state_BHkv)
        out = _einsum("bhck,bhkv->bhcv", q, state_BHkv) + _einsum("bhij,bhjv->bhiv", scores, updates)
        return state_BHkv * decay + _einsum("bhck,bhcv->bhkv", keys_out, updates), out

    first_BHkv = jnp.zeros((B, H, k, v), v_BSHv.dtype) if state_BHkv is None else state_BHkv
    chunk_inputs = (solved[..., :v], solved[..., v:], scores, q * total, keys_out, total[..., -1:, :])
    last_BHkv, out = jax.lax.scan(one_chunk, first_BHkv, chunk_inputs)
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(B, -1, H, v)[:, :S], last_BHkv

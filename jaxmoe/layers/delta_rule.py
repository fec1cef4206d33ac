"""The gated delta rule: a memory that decays, and in which a token overwrites what is stored under its key.

Yang et al. 2024 (arXiv:2412.06464). A head's memory S is a [k, v] matrix that maps keys to values. With a decay
a_t in (0, 1] and a strength b_t in [0, 1] each token does

    S_t = A_t S_{t-1} + k_t u_tᵀ,    u_t = b_t (v_t - (A_t S_{t-1})ᵀ k_t),    o_t = S_tᵀ q_t

where A_t is a_t for a decay of the whole memory, and diag(a_t) for one of each of its k rows (Kimi delta attention,
Kimi Team 2025, arXiv:2510.26692).

Letters here, beside the common ones of docs/concepts/letters.md: H heads, k and v the widths of a key and a value, d
decays of a head, 1 or k, n chunks, C positions of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxmoe.layers.recurrent import is_token

CHUNK_SIZE = 64
# Pairs of positions of so many are weighted one by one, where each row of the memory has a decay of its own.
_BLOCK_SIZE = 16
_UNIT_EPS = 1e-6

# Errors add up over a sequence: no product is rounded to fewer bits than its operands have.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def delta_rule_step(
    q_BHk: jax.Array,
    k_BHk: jax.Array,
    v_BHv: jax.Array,
    log_decay_BHd: jax.Array,
    beta_BH: jax.Array,
    state_BHkv: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Apply the gated delta rule to one token.

    Args:
        q_BHk: queries.
        k_BHk: keys, of length 1 (or 0).
        v_BHv: values.
        log_decay_BHd: logarithms of the decays a, at most 0.
        beta_BH: strengths b.
        state_BHkv: memory before the token.

    Returns:
        Outputs [B, H, v] and the memory after the token, in the arguments' dtype.
    """
    decay_BHd = jnp.exp(log_decay_BHd)
    # Both reads of the old memory in one pass over it: o = Sᵀ(a q) + (k·q) u.
    readers = jnp.stack([k_BHk, q_BHk], axis=2) * decay_BHd[:, :, None]
    reads = _einsum("bhik,bhkv->bhiv", readers, state_BHkv)
    update_BHv = beta_BH[..., None] * (v_BHv - reads[:, :, 0])
    state_BHkv = state_BHkv * decay_BHd[..., None] + k_BHk[..., :, None] * update_BHv[..., None, :]
    return reads[:, :, 1] + jnp.sum(q_BHk * k_BHk, axis=-1, keepdims=True) * update_BHv, state_BHkv


def chunked_delta_rule(
    q_BSHk: jax.Array,
    k_BSHk: jax.Array,
    v_BSHv: jax.Array,
    log_decay_BSHd: jax.Array,
    beta_BSH: jax.Array,
    state_BHkv: jax.Array | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[jax.Array, jax.Array]:
    """Apply the gated delta rule to a sequence: matrix products within chunks, and a scan over the chunks.

    Let g_i be the product of a chunk's decays up to its position i, and S the memory before the chunk. The updates u
    of a chunk depend on each other through a triangular system, and everything else on them (section 3.3, where g is a
    number; products with a vector of decays are elementwise):

        (I + T) U = diag(b) (V - (g K) S),    T_ij = b_i (g_i / g_j) k_i·k_j for j < i
        o_i = Sᵀ (g_i q_i) + Σ_{j ≤ i} (g_i / g_j q_i·k_j) u_j
        S'  = g_C S + Σ_j (g_C / g_j) k_j u_jᵀ

    U is linear in S, so the systems of all chunks are solved at once, before the scan. A position with decay 1 and
    strength 0 leaves the memory as it is.

    Args:
        q_BSHk: queries.
        k_BSHk: keys, of length 1 (or 0).
        v_BSHv: values.
        log_decay_BSHd: logarithms of the decays a, at most 0.
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
    log_decay = jnp.cumsum(chunks(log_decay_BSHd), axis=-2)
    total = jnp.exp(log_decay)

    system = _products(keys * beta, keys, log_decay)
    sides = jnp.concatenate([values * beta, keys * beta * total], axis=-1)
    # The solver reads below the diagonal and takes ones on it.
    solved = jax.lax.linalg.triangular_solve(system, sides, left_side=True, lower=True, unit_diagonal=True)
    scores = _products(q, keys, log_decay)
    keys_out = keys * jnp.exp(log_decay[..., -1:, :] - log_decay)

    def one_chunk(state_BHkv: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        updates, reads, scores, q, keys_out, decay = chunk
        updates = updates - _einsum("bhck,bhkv->bhcv", reads, state_BHkv)
        out = _einsum("bhck,bhkv->bhcv", q, state_BHkv) + _einsum("bhij,bhjv->bhiv", scores, updates)
        return state_BHkv * decay + _einsum("bhck,bhcv->bhkv", keys_out, updates), out

    first_BHkv = jnp.zeros((B, H, k, v), v_BSHv.dtype) if state_BHkv is None else state_BHkv
    chunk_inputs = (solved[..., :v], solved[..., v:], scores, q * total, keys_out, total[..., -1, :, None])
    last_BHkv, out = jax.lax.scan(one_chunk, first_BHkv, chunk_inputs)
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(B, -1, H, v)[:, :S], last_BHkv


def run_delta_rule(
    q_BSHk: jax.Array,
    k_BSHk: jax.Array,
    v_BSHv: jax.Array,
    log_decay_BSHd: jax.Array,
    beta_BSH: jax.Array,
    lengths_B: jax.Array,
    state_BHkv: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Apply the rule to a prompt from an empty memory, or to more tokens after what a cache holds.

    Args:
        q_BSHk, k_BSHk, v_BSHv, log_decay_BSHd, beta_BSH: arguments of `chunked_delta_rule`.
        lengths_B: int32, number of tokens of each row; padding neither fades the memory nor writes to it.
        state_BHkv: memory that the tokens before have left; None for the start of sequences.

    Returns:
        Outputs [B, S, H, v] and the memory after each row's last token.
    """
    seen_BS1 = is_token(q_BSHk.shape[1], lengths_B)
    beta_BSH, log_decay_BSHd = jnp.where(seen_BS1, beta_BSH, 0), jnp.where(seen_BS1[..., None], log_decay_BSHd, 0)
    if state_BHkv is None or q_BSHk.shape[1] > 1:
        return chunked_delta_rule(q_BSHk, k_BSHk, v_BSHv, log_decay_BSHd, beta_BSH, state_BHkv)
    o_BHv, state_BHkv = delta_rule_step(
        q_BSHk[:, 0], k_BSHk[:, 0], v_BSHv[:, 0], log_decay_BSHd[:, 0], beta_BSH[:, 0], state_BHkv
    )
    return o_BHv[:, None], state_BHkv


def unit_heads(y_BSHk: jax.Array) -> jax.Array:
    """The same heads at length 1, or shorter where they are all but 0."""
    return y_BSHk * jax.lax.rsqrt(jnp.sum(jnp.square(y_BSHk), axis=-1, keepdims=True) + _UNIT_EPS)


def _products(x_Ck: jax.Array, keys_Ck: jax.Array, log_decay_Cd: jax.Array) -> jax.Array:
    """Σ_k x_i g_i / g_j k_j for j ≤ i, and 0 above the diagonal: [..., C, C].

    With a decay for every k the quotient stands in the sum. It is taken apart at a position between j and i, g_i / g_m
    times g_m / g_j, of which neither is above 1: halves of a chunk meet in a matrix product, and each half in itself is
    the same problem again. A quotient of g_i and 1 / g_j would overflow.

    Args:
        x_Ck: vectors, with any dims before.
        keys_Ck: keys, likewise.
        log_decay_Cd: logarithms of g, likewise.
    """
    C = x_Ck.shape[-2]
    if log_decay_Cd.shape[-1] == 1 or C <= _BLOCK_SIZE or C % 2:
        between = log_decay_Cd[..., :, None, :] - log_decay_Cd[..., None, :, :]
        # Masked before the exponential, which would overflow above the diagonal.
        seen = jax.lax.broadcast_to_rank(jnp.tri(C, dtype=bool)[..., None], between.ndim)
        between = jnp.exp(jnp.where(seen, between, -jnp.inf))
        if log_decay_Cd.shape[-1] == 1:
            return _einsum("...ik,...jk->...ij", x_Ck, keys_Ck) * between[..., 0]
        return jnp.sum(x_Ck[..., :, None, :] * keys_Ck[..., None, :, :] * between, axis=-1)
    x, keys, log_decay = (y.reshape(*y.shape[:-2], 2, C // 2, y.shape[-1]) for y in (x_Ck, keys_Ck, log_decay_Cd))
    within = _products(x, keys, log_decay)
    middle = log_decay[..., 0, -1:, :]
    from_middle = x[..., 1, :, :] * jnp.exp(log_decay[..., 1, :, :] - middle)
    to_middle = keys[..., 0, :, :] * jnp.exp(middle - log_decay[..., 0, :, :])
    across = _einsum("...ik,...jk->...ij", from_middle, to_middle)
    above = jnp.concatenate([within[..., 0, :, :], jnp.zeros_like(across)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([across, within[..., 1, :, :]], axis=-1)], axis=-2)

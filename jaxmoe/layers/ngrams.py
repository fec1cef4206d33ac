"""Embeddings of the last tokens together, added to the residual streams of a layer, as Qwen4-Exp has them.

Letters here, beside the common ones of docs/concepts/letters.md: n streams, I heads, e width of the embeddings of all heads,
A = n D channels, W taps of the convolution.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import NGramConfig
from jaxmoe.layers.cache import CacheArray
from jaxmoe.layers.conv import causal_conv
from jaxmoe.layers.embedding import VocabTable
from jaxmoe.layers.norm import zero_centered_rms_norm
from jaxmoe.layers.param import ParamFactory, zeros


class NGramCache(NamedTuple):
    """The arrays that are kept of a sequence; also holds their shapes or partition specs.

    Attributes:
        tokens: int32 [B, ngram_size - 1], the last tokens.
        conv: [B, ngram_size · (W - 1), A], inputs of the convolution before the next token.
    """

    tokens: Any
    conv: Any


def hashed_rows(tokens_BS: jax.Array, before_BN: jax.Array, config: NGramConfig) -> jax.Array:
    """Rows of the table for the n-grams that end at each token, int32 [B, S, I].

    An n-gram t_0, t_1, ..., the last token first, has in each head the row (t_0 m_0 xor t_1 m_1 xor ...) mod the head's
    rows, with `NGramConfig.multipliers` m. Of tokens before an end token only the end token counts.

    Args:
        tokens_BS: int32, tokens.
        before_BN: int32, those before them, one fewer than the longest n-gram has.
        config: sizes, and numbers of the hash.
    """
    S, N = tokens_BS.shape[1], config.ngram_size - 1
    all_tokens = jnp.concatenate([before_BN, tokens_BS], axis=1)
    mixed = _product(tokens_BS, config.multipliers[0])
    ended_BS = jnp.zeros(tokens_BS.shape, bool)
    rows, start = [], 0
    for back in range(1, config.ngram_size):
        earlier_BS = all_tokens[:, N - back : N - back + S]
        ended_BS |= earlier_BS == config.end_token
        product = _product(jnp.where(ended_BS, config.end_token, earlier_BS), config.multipliers[back])
        mixed = [ours ^ theirs for ours, theirs in zip(mixed, product, strict=True)]
        for size in config.head_rows[(back - 1) * config.heads : back * config.heads]:
            rows.append(_remainder(mixed, size).astype(jnp.int32) + start)
            start += size
    return jnp.stack(rows, axis=-1)


def _product(tokens: jax.Array, factor: int) -> list[jax.Array]:
    """Tokens times a number, in four digits of 16 bits, the lowest first: JAX has 32 bits unless it is told otherwise."""
    tokens = tokens.astype(jnp.uint32)
    digits = [jnp.zeros(tokens.shape, jnp.uint32)] * 5
    for i, half in enumerate((tokens & 0xFFFF, tokens >> 16)):
        for j in range(4 - i):
            product = half * jnp.uint32(factor >> (16 * j) & 0xFFFF)
            digits[i + j] = digits[i + j] + (product & 0xFFFF)
            digits[i + j + 1] = digits[i + j + 1] + (product >> 16)
    for i in range(4):
        digits[i + 1] = digits[i + 1] + (digits[i] >> 16)
        digits[i] = digits[i] & 0xFFFF
    return digits[:4]


def _remainder(digits: list[jax.Array], divisor: int) -> jax.Array:
    """The remainder of a number in digits of 16 bits, by a divisor below 2^28."""
    rest = jnp.zeros(digits[0].shape, jnp.uint32)
    for digit in reversed(digits):
        for shift in (12, 8, 4, 0):
            rest = (rest * 16 + (digit >> shift & 0xF)) % jnp.uint32(divisor)
    return rest


class NGrams(nnx.Module):
    """g + silu(conv(ĝ)), for streams x where g = sigmoid(s) · v, s = sign(k̂ · x̂) sqrt|k̂ · x̂ / sqrt(D)|.

    k, for each stream, and v, for all of them, are projections of the embeddings of the n-grams that end at a token; x̂, k̂
    and ĝ are normalized, each stream on its own, with factors of 1 + weight. The taps of the convolution are `ngram_size`
    positions apart.
    """

    def __init__(self, config: NGramConfig, streams: int, hidden_size: int, eps: float, *, param: ParamFactory):
        self.config, self.eps = config, eps
        width = streams * hidden_size
        self.table = VocabTable(config.rows, config.width // config.all_heads, param=param, parts=config.parts)
        self.w_key = param((width, config.width))
        self.w_value = param((hidden_size, config.width))
        self.key_norm = param((width,), init=zeros)
        self.query_norm = param((width,), init=zeros)
        self.conv_norm = param((width,), init=zeros)
        self.conv = param((width, 1, config.conv_kernel_size))

    def cache_arrays(self, batch_size: int) -> NGramCache:
        """The cache, as an `NGramCache` of `CacheArray`."""
        config = self.config
        kept = config.ngram_size * (config.conv_kernel_size - 1)
        return NGramCache(
            tokens=CacheArray((batch_size, config.ngram_size - 1), dtype="int32", by_position=False),
            conv=CacheArray((batch_size, kept, self.conv.shape[0]), by_position=False),
        )

    def __call__(
        self,
        x_BSnD: jax.Array,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        cache: NGramCache | None,
        batch: tuple[str, ...],
        *,
        decode: bool = False,
        lengths_B: jax.Array | None = None,
    ) -> tuple[jax.Array, NGramCache | None]:
        """Give what is added to the streams, and the cache after each row's last token; see `TokenMixer`."""
        config, (B, S, n, D) = self.config, x_BSnD.shape
        if lengths_B is None:
            lengths_B = jnp.ones(B, jnp.int32) if decode else jnp.max(positions_BS, axis=1) + 1
        N = config.ngram_size - 1
        before_BN = jnp.full((B, N), config.end_token, jnp.int32) if cache is None or not decode else cache.tokens
        rows_BSI = hashed_rows(tokens_BS, before_BN, config)
        e_BSe = self.table.embed(rows_BSI.reshape(B, -1), batch).reshape(B, S, -1)

        def normed(y_BSnD: jax.Array, weight: nnx.Param) -> jax.Array:
            return zero_centered_rms_norm(y_BSnD, weight[...].reshape(n, D), self.eps)

        k_BSnD = jnp.einsum("bse,ae->bsa", e_BSe, self.w_key[...]).reshape(x_BSnD.shape)
        k_BSnD, q_BSnD = normed(k_BSnD, self.key_norm), normed(x_BSnD, self.query_norm)
        score = jnp.sum((k_BSnD * q_BSnD).astype(jnp.float32), axis=-1, keepdims=True) * D**-0.5
        score = jnp.sqrt(jnp.maximum(jnp.abs(score), 1e-6)) * jnp.sign(score)
        v_BSD = jnp.einsum("bse,de->bsd", e_BSe, self.w_value[...])
        g_BSnD = jax.nn.sigmoid(score).astype(v_BSD.dtype) * v_BSD[:, :, None]
        conv_BSA, conv = causal_conv(
            normed(g_BSnD, self.conv_norm).reshape(B, S, -1),
            self.conv[...][:, 0],
            None,
            cache.conv if cache is not None and decode else None,
            lengths_B,
            dilation=config.ngram_size,
        )
        y_BSnD = g_BSnD + jax.nn.silu(conv_BSA).reshape(x_BSnD.shape)
        if cache is None:
            return y_BSnD, None
        kept_BN = lengths_B[:, None] + jnp.arange(N, dtype=jnp.int32)[None]
        tokens_BN = jnp.take_along_axis(jnp.concatenate([before_BN, tokens_BS], axis=1), kept_BN, axis=1)
        return y_BSnD, NGramCache(tokens_BN.astype(jnp.int32), conv.astype(cache.conv.dtype))

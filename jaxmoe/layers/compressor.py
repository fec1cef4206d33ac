"""Compressed entries: one for each run of positions, a sum over them that is weighted by gates.

Letters here, beside the common ones of docs/concepts/letters.md: W runs (and entries), r positions of a run, h width of an
entry, A width of a projection (2h with an overlap, else h), n slots of a ring.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.config import CompressionConfig
from jaxmoe.layers.cache import CacheArray, write_prompt, write_token
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.param import ParamFactory, ones, zeros
from jaxmoe.layers.ring import ring_of_prompt, ring_slice, write_ring
from jaxmoe.numerics import sum_dtype
from jaxmoe.rotary import RopeConfig
from jaxmoe.rotary.apply import rotate_tail


class CompressorWeights(NamedTuple):
    """The weights of a compressor; also holds their parameters.

    Attributes:
        w_kv: [A, D], to the numbers that are summed up.
        w_gate: [A, D], to the gates.
        bias: [r, A], added to the gates; not rounded with the other weights.
        norm: [h], scale of the entries' norm.
    """

    w_kv: Any
    w_gate: Any
    bias: Any
    norm: Any


class CompressorCache(NamedTuple):
    """The entries so far, and what the next ones are made of.

    Attributes:
        entries: [B, W, h], normed and rotated; the one of a run that has not ended may hold anything.
        kv: [B, n, A], of the last n tokens: a run, and with an overlap another.
        gate: [B, n, A], likewise.
    """

    entries: Any
    kv: Any
    gate: Any


class Compressor(NamedTuple):
    """The settings of a compressor.

    Attributes:
        config: runs and overlap.
        width: h.
        rope: rotary embedding of the trailing dims of an entry, at the first position of its run.
        eps: epsilon of the norm.
    """

    config: CompressionConfig
    width: int
    rope: RopeConfig
    eps: float

    @property
    def projected(self) -> int:
        """Width of the projections."""
        return self.width * (2 if self.config.overlap else 1)

    def make_weights(self, hidden_size: int, *, param: ParamFactory) -> CompressorWeights:
        """Make the parameters, each whole on every device."""
        A = self.projected
        return CompressorWeights(
            w_kv=param((A, hidden_size)),
            w_gate=param((A, hidden_size)),
            bias=param((self.config.rate, A), init=zeros, dtype=sum_dtype(param.dtype)),
            norm=param((self.width,), init=ones),
        )

    def cache_arrays(self, batch_size: int, max_length: int) -> CompressorCache:
        """The cache, as a `CompressorCache` of `CacheArray`."""
        rate = self.config.rate
        ring = CacheArray((batch_size, rate * (2 if self.config.overlap else 1), self.projected))
        return CompressorCache(CacheArray((batch_size, -(-max_length // rate), self.width)), ring, ring)

    def last_entry(self, positions_BS: jax.Array) -> jax.Array:
        """The index of the last entry that a token at each position sees, that of a run which has ended; -1 for none."""
        return (positions_BS + 1) // self.config.rate - 1

    def of_prompt(
        self, w: CompressorWeights, x_BSD: jax.Array, lengths_B: jax.Array, cache: CompressorCache | None
    ) -> tuple[jax.Array, CompressorCache | None]:
        """The entries of prompts, [B, W, h], and the cache (where given) with them."""
        rate, (kv_BSA, gate_BSA) = self.config.rate, _project(w, x_BSD)

        def runs(y_BSA: jax.Array) -> jax.Array:
            padded = jnp.pad(y_BSA, ((0, 0), (0, -y_BSA.shape[1] % rate), (0, 0)))
            return padded.reshape(padded.shape[0], -1, rate, padded.shape[2])

        def before(y_BWrA: jax.Array) -> jax.Array:
            return jnp.pad(y_BWrA[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))

        kv, gate = runs(kv_BSA), runs(gate_BSA)
        index_1W = jnp.arange(kv.shape[1], dtype=jnp.int32)[None]
        entries_BWh = self._pool(w, (kv, gate), (before(kv), before(gate)), index_1W)
        if cache is None:
            return entries_BWh, None
        rings = [
            write_prompt(ring, ring_of_prompt(y_BSA, lengths_B, ring.shape[1]))
            for ring, y_BSA in ((cache.kv, kv_BSA), (cache.gate, gate_BSA))
        ]
        held = cache.entries.shape[1]
        return entries_BWh, CompressorCache(write_prompt(cache.entries, entries_BWh[:, :held]), *rings)

    def of_token(
        self, w: CompressorWeights, x_B1D: jax.Array, position_B: jax.Array, cache: CompressorCache
    ) -> CompressorCache:
        """The cache with one more token of each row.

        The entry of its run is made anew, from what there is of it: nobody sees it before the run's last token is in it.
        """
        rate = self.config.rate
        kv, gate = (
            write_ring(ring, new, position_B)
            for ring, new in zip((cache.kv, cache.gate), _project(w, x_B1D), strict=True)
        )
        index_B = position_B // rate
        here, before = (
            tuple(ring_slice(ring, first_B, rate)[:, None] for ring in (kv, gate))
            for first_B in (index_B * rate, index_B * rate - rate)
        )
        entry_B1h = self._pool(w, here, before, index_B[:, None])
        return CompressorCache(write_token(cache.entries, entry_B1h, index_B), kv, gate)

    def _pool(
        self, w: CompressorWeights, here: tuple[jax.Array, ...], before: tuple[jax.Array, ...], index_BW: jax.Array
    ) -> jax.Array:
        """Entries from the numbers and gates [B, W, r, A] of their runs, and of the runs before; the first has none."""
        (kv, gate), h = here, self.width
        bias = w.bias[None, None]
        gate = gate.astype(bias.dtype) + bias
        if self.config.overlap:
            earlier = before[1][..., :h].astype(bias.dtype) + bias[..., :h]
            earlier = jnp.where((index_BW > 0)[..., None, None], earlier, -jnp.inf)
            kv = jnp.concatenate([before[0][..., :h], kv[..., h:]], axis=2)
            gate = jnp.concatenate([earlier, gate[..., h:]], axis=2)
        shares = jax.nn.softmax(gate, axis=2).astype(kv.dtype)
        entries_BWh = rms_norm(jnp.sum(kv * shares, axis=2), w.norm, self.eps, float32_weight=True)
        return rotate_tail(entries_BWh[:, :, None], index_BW * self.config.rate, self.rope)[:, :, 0]


def _project(w: CompressorWeights, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    kv_BSA, gate_BSA = (jnp.einsum("bsd,ad->bsa", x_BSD, weight) for weight in (w.w_kv, w.w_gate))
    return kv_BSA, gate_BSA

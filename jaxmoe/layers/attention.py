"""Grouped-query attention with a key/value cache, heads over tp and sequences over dp and ep.

Letters here, beside the common ones of docs/concepts/letters.md: H query heads, G key/value heads, q query heads of one
key/value head, h head_dim, v width of a value, C positions of the cache, s some of the S positions. On a device H and G are
its own.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmoe.config import AttentionConfig, AttentionMask, QueryKeyNorm
from jaxmoe.layers.cache import CacheArray, cache_specs, write_prompts, write_token
from jaxmoe.layers.norm import rms_norm, zero_centered_rms_norm
from jaxmoe.layers.param import ParamFactory, RowMap, ones, zeros
from jaxmoe.layers.weights import WeightSpecs
from jaxmoe.mesh import TP
from jaxmoe.numerics import zeros_behind
from jaxmoe.rotary.apply import apply_rope

# Queries of a long prompt are taken this many at a time, which bounds the score matrix.
QUERY_BLOCK = 512


class ChosenKeys(NamedTuple):
    """A choice of the keys that each token sees, computed for some tokens at a time.

    Attributes:
        by: [B, S, ...], what the choice is made by, for each token.
        choose: function of `by` of s of the tokens, and of their positions [B, s], to bool [B, G, s, C]; G may be 1.
    """

    by: jax.Array
    choose: Callable[[jax.Array, jax.Array], jax.Array]

    @classmethod
    def of(cls, among_BSC: jax.Array) -> "ChosenKeys":
        """Make a choice that is known, bool [B, S, C], the same for all heads."""
        return cls(among_BSC, lambda among_BsC, positions_Bs: among_BsC[:, None])


class KVCache(NamedTuple):
    """Keys [B, G, C, h] and values [B, G, C, v] of the positions seen so far; position i lies at index i.

    Also holds what describes them: their shapes, or their partition specs.
    """

    k: Any
    v: Any


def attend(
    q_BSHh: jax.Array,
    k_BGCh: jax.Array,
    v_BGCv: jax.Array,
    positions_BS: jax.Array,
    *,
    scale: float,
    mask: AttentionMask | None = None,
    sinks_H: jax.Array | None = None,
    chosen: ChosenKeys | None = None,
) -> jax.Array:
    """softmax(scale · q kᵀ + causal mask) v, the softmax in float32; returns [B, S, H, v].

    A query at position t sees the keys at indices 0..t, or with a mask those from `mask.first_seen(t)` on, and of them only
    those that are chosen, if a choice is given. Indices beyond t may hold anything finite. A head's sink is one more logit
    that takes its share of the softmax and adds nothing (Xiao et al. 2023, arXiv:2309.17453).
    """
    B, _, H, h = q_BSHh.shape
    G, C = k_BGCh.shape[1:3]
    index_11C = jnp.arange(C, dtype=jnp.int32)[None, None]

    def block(q_BsHh: jax.Array, positions_Bs: jax.Array, *by: jax.Array) -> jax.Array:
        q_BsGqh = q_BsHh.reshape(B, -1, G, H // G, h)
        scores = jnp.einsum("bsgqh,bgch->bgqsc", q_BsGqh, k_BGCh, preferred_element_type=jnp.float32) * scale
        seen_BsC = index_11C <= positions_Bs[..., None]
        if mask is not None:
            seen_BsC &= index_11C >= mask.first_seen(positions_Bs[..., None])
        seen_BGsC = seen_BsC[:, None]
        if chosen is not None:
            seen_BGsC = seen_BGsC & chosen.choose(by[0], positions_Bs)
        scores = jnp.where(seen_BGsC[:, :, None], scores, -jnp.inf)
        probabilities = _softmax(scores, sinks_H).astype(v_BGCv.dtype)
        return jnp.einsum("bgqsc,bgcv->bsgqv", probabilities, v_BGCv).reshape(B, -1, H, v_BGCv.shape[-1])

    return by_query_blocks(block, q_BSHh, positions_BS, *([] if chosen is None else [chosen.by]))


def by_query_blocks(block: Callable[..., jax.Array], *queries: jax.Array) -> jax.Array:
    """Apply a function of queries [B, S, ...] to some of them at a time, which bounds what it makes of each.

    It gives [B, s, ...] for s of the S queries, each of which counts for itself.
    """
    B, S = queries[0].shape[:2]
    if S <= QUERY_BLOCK:
        return block(*queries)
    blocks = -(-S // QUERY_BLOCK)
    padded = [jnp.pad(x, [(0, 0), (0, blocks * QUERY_BLOCK - S)] + [(0, 0)] * (x.ndim - 2)) for x in queries]

    def apply(i: jax.Array) -> jax.Array:
        return block(*[jax.lax.dynamic_slice_in_dim(x, i * QUERY_BLOCK, QUERY_BLOCK, axis=1) for x in padded])

    def put(i: jax.Array, out: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(out, apply(i), i * QUERY_BLOCK, axis=1)

    one = jax.eval_shape(apply, jax.ShapeDtypeStruct((), jnp.int32))
    out = zeros_behind(queries[0], (B, blocks * QUERY_BLOCK, *one.shape[2:]), one.dtype)
    return jax.lax.fori_loop(0, blocks, put, out)[:, :S]


def _softmax(scores_BGqSC: jax.Array, sinks_H: jax.Array | None) -> jax.Array:
    if sinks_H is None:
        return jax.nn.softmax(scores_BGqSC, axis=-1)
    sinks = sinks_H.astype(jnp.float32).reshape(1, scores_BGqSC.shape[1], -1, 1, 1)
    largest = jnp.maximum(jnp.max(scores_BGqSC, axis=-1, keepdims=True), sinks)
    exponentials = jnp.exp(scores_BGqSC - largest)
    return exponentials / (jnp.sum(exponentials, axis=-1, keepdims=True) + jnp.exp(sinks - largest))


class Attention(nnx.Module):
    """Grouped-query attention; each tp rank has its own query heads and the key/value heads they use.

    With fewer key/value heads than tp ranks, each rank holds a copy of the one it uses.
    """

    packable: ClassVar[tuple[str, ...]] = ("w_q", "w_k", "w_v", "w_gate", "w_head_gate", "w_o")

    def __init__(self, config: AttentionConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        h, v, tp = config.head_dim, config.value_width, param.mesh.shape[TP]
        self.config, self.eps, self.mesh, self.linear = config, eps, param.mesh, param.linear
        self.kv_heads = max(config.num_kv_heads, tp)
        kv_rows = None
        if self.kv_heads != config.num_kv_heads:
            kv_rows = RowMap(config.num_kv_heads, copies=self.kv_heads // config.num_kv_heads)

        q_rows = config.num_heads * h * (2 if config.output_gate and not config.gate_projection else 1)
        self.w_q = param((q_rows, hidden_size), TP, None)
        self.w_k = param((self.kv_heads * h, hidden_size), TP, None, rows=kv_rows)
        if not config.values_are_keys:
            self.w_v = param((self.kv_heads * v, hidden_size), TP, None, rows=kv_rows)
        if config.gate_projection:
            self.w_gate = param((config.num_heads * h, hidden_size), TP, None)
        self.w_o = param((hidden_size, config.num_heads * v), None, TP)
        if config.biases is not None:
            self.b_q = param((q_rows,), TP, init=zeros)
            self.b_k = param((self.kv_heads * h,), TP, init=zeros, rows=kv_rows)
            if not config.values_are_keys:
                self.b_v = param((self.kv_heads * v,), TP, init=zeros, rows=kv_rows)
        if config.biases == "all":
            self.b_o = param((hidden_size,), init=zeros)
        norm = config.qk_norm
        if norm is not None and norm.over == "head" and norm.weight != "none":
            init = zeros if norm.weight == "zero_centered" else ones
            self.q_norm = param((h,), init=init)
            self.k_norm = param((h,), init=init)
        elif norm is not None and norm.over == "full":
            self.q_norm = param((config.num_heads * h,), TP, init=ones)
            self.k_norm = param((self.kv_heads * h,), TP, init=ones, rows=kv_rows)
        if config.head_gates:
            self.w_head_gate = param((config.num_heads, hidden_size), TP, None)
        if config.sinks:
            self.sinks = param((config.num_heads,), TP, init=zeros)
        self.specs = WeightSpecs.of(self)

    def cache_arrays(self, batch_size: int, max_length: int) -> KVCache:
        """The layer's cache, as a `KVCache` of `CacheArray`."""
        keys, values = (
            CacheArray((batch_size, self.kv_heads, max_length, width), (TP,))
            for width in (self.config.head_dim, self.config.value_width)
        )
        return KVCache(keys, values)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        cache: KVCache | None,
        batch: tuple[str, ...],
        *,
        decode: bool = False,
        lengths_B: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend within a prompt, or from new tokens to the cache.

        Args:
            x_BSD: normed activations, the batch dim sharded over the axes `batch`.
            positions_BS: int32, position of each token; 0..S-1 unless `decode`, then from each row's own first one on.
            cache: cache that gets the new keys and values; None for none.
            batch: mesh axes of the batch dim.
            decode: whether the tokens attend to the cache at their positions and before.
            lengths_B: int32, tokens of each row that count; it makes no difference, for none sees those behind it.
            adapter_ids_B: int32, adapter of each row, -1 for none; None for none at all.

        Returns:
            [B, S, D], and the cache with the new tokens in it.
        """
        del lengths_B
        weights, specs = self.specs.weights(self, adapter_ids_B, batch)
        cache_spec = None if cache is None else cache_specs(self.cache_arrays(1, 1), batch)

        def local(
            w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array, cache: KVCache | None
        ) -> tuple[jax.Array, KVCache | None]:
            q_BSHh, k_BSGh, v_BSGv, gate_BSHh = self._project(w, x_BSD, positions_BS)
            new = self._entries(w, x_BSD, positions_BS, KVCache(k_BSGh.swapaxes(1, 2), v_BSGv.swapaxes(1, 2)))
            if cache is not None and decode:
                position_B = positions_BS[:, 0]
                cache = jax.tree.map(lambda old, one: write_token(old, one, position_B), cache, new)
            elif cache is not None:
                cache, new = write_prompts(cache, new)
            seen = cache if cache is not None and decode else new
            config = self.config
            o_BSHv = attend(
                q_BSHh,
                seen.k,
                seen.v,
                positions_BS,
                scale=config.head_dim**-0.5 if config.scale is None else config.scale,
                mask=config.mask,
                sinks_H=w.get("sinks"),
                chosen=self._chosen(w, x_BSD, positions_BS, seen),
            )
            if gate_BSHh is not None:
                o_BSHv = o_BSHv * jax.nn.sigmoid(gate_BSHh)
            if config.head_gates:
                o_BSHv = o_BSHv * jax.nn.sigmoid(self.linear(x_BSD, w["w_head_gate"]))[..., None]
            o_BSA = o_BSHv.reshape(*o_BSHv.shape[:2], -1)
            y_BSD = self.linear(o_BSA, w["w_o"], jnp.float32)
            y_BSD = jax.lax.psum(y_BSD, TP).astype(x_BSD.dtype)
            return y_BSD + w["b_o"][None, None] if "b_o" in w else y_BSD, cache

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs, P(batch), P(batch), cache_spec),
            out_specs=(P(batch), cache_spec),
            check_vma=False,
        )(weights, x_BSD, positions_BS, cache)

    def _entries(self, w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array, new: KVCache) -> Any:
        """The cache's entries for these tokens, from their keys and values; a subclass may keep more."""
        del w, x_BSD, positions_BS
        return new

    def _chosen(self, w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array, seen: Any) -> ChosenKeys | None:
        """The choice of the keys in `seen`, entries of a cache, that these tokens see; None for all that the mask allows."""
        del w, x_BSD, positions_BS, seen
        return None

    def _project(
        self, w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """This rank's queries [B, S, H, h], keys [B, S, G, h], values [B, S, G, v], and gates [B, S, H, h] of outputs."""
        config = self.config

        def project(name: str) -> jax.Array:
            y_BSA = self.linear(x_BSD, w[f"w_{name}"])
            return y_BSA + w[f"b_{name}"][None, None] if f"b_{name}" in w else y_BSA

        def norm(y_BSA: jax.Array, name: str, kind: QueryKeyNorm) -> jax.Array:
            if kind.over == "full":
                return _norm_over_tp(y_BSA, w[name], self.eps)
            y_BSHh = y_BSA.reshape(*y_BSA.shape[:2], -1, config.head_dim)
            if kind.weight == "zero_centered":
                return zero_centered_rms_norm(y_BSHh, w[name], self.eps).reshape(y_BSA.shape)
            weight = jnp.ones((), y_BSA.dtype) if kind.weight == "none" else w[name]
            return rms_norm(y_BSHh, weight, self.eps).reshape(y_BSA.shape)

        def turn(y_BSA: jax.Array) -> jax.Array:
            if config.rope is None:
                return y_BSA
            y_BSHh = y_BSA.reshape(*y_BSA.shape[:2], -1, config.head_dim)
            return apply_rope(y_BSHh, positions_BS, config.rope).reshape(y_BSA.shape)

        q, k, gate_BSHh = project("q"), project("k"), None
        if config.gate_projection:
            gate_BSHh = project("gate").reshape(*x_BSD.shape[:2], -1, config.head_dim)
        elif config.output_gate:
            q_and_gate = q.reshape(*x_BSD.shape[:2], -1, 2, config.head_dim)
            q, gate_BSHh = q_and_gate[..., 0, :].reshape(*x_BSD.shape[:2], -1), q_and_gate[..., 1, :]
        v = k if config.values_are_keys else project("v")
        if config.v_norm:
            v = norm(v, "v_norm", QueryKeyNorm(weight="none"))
        if config.value_scale is not None:
            v = (v.astype(jnp.float32) * config.value_scale).astype(v.dtype)
        if config.qk_norm is not None and not config.qk_norm.after_rope:
            q, k = norm(q, "q_norm", config.qk_norm), norm(k, "k_norm", config.qk_norm)
        if config.clip is not None:
            q, k, v = (jnp.clip(y_BSA, -config.clip, config.clip) for y_BSA in (q, k, v))
        q, k = turn(q), turn(k)
        if config.qk_norm is not None and config.qk_norm.after_rope:
            q, k = norm(q, "q_norm", config.qk_norm), norm(k, "k_norm", config.qk_norm)
        if config.temperature is not None:
            steps_BS = jnp.floor((positions_BS.astype(jnp.float32) + 1) / config.temperature.floor)
            longer_BS = config.temperature.slope * jnp.log1p(steps_BS) + 1
            q = (q.astype(jnp.float32) * longer_BS[..., None]).astype(q.dtype)
        q_BSHh, k_BSGh, v_BSGv = (
            y_BSA.reshape(*x_BSD.shape[:2], -1, width)
            for y_BSA, width in ((q, config.head_dim), (k, config.head_dim), (v, config.value_width))
        )
        return q_BSHh, k_BSGh, v_BSGv, gate_BSHh


def _norm_over_tp(y_BSA: jax.Array, weight_A: jax.Array, eps: float) -> jax.Array:
    """RMS norm over the full width, of which this rank has a part. Copies of a head leave the mean as it is."""
    y32 = y_BSA.astype(jnp.float32)
    squares = jax.lax.psum(jnp.sum(jnp.square(y32), axis=-1, keepdims=True), TP)
    scale = jax.lax.rsqrt(squares / (y_BSA.shape[-1] * jax.lax.axis_size(TP)) + eps)
    return weight_A[None, None] * (y32 * scale).astype(y_BSA.dtype)

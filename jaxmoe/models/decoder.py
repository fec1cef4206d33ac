"""The decoder every family shares, composed from `jaxmoe.layers` as its config says."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.config import DecoderConfig, LayerConfig, MoEConfig
from jaxmoe.layers import (
    MLP,
    NORMS,
    Attention,
    CacheArray,
    HostData,
    KVCache,
    MoE,
    ParamFactory,
    VocabTable,
    check_expert_axes,
)
from jaxmoe.mesh import EP, TP, axes_size, batch_axes, named, padded_batch
from jaxmoe.placement import ExpertPlacement, make_placements

Cache = tuple[KVCache | None, ...]

_SMALLEST_BUCKET = 16


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self,
        config: LayerConfig,
        decoder: DecoderConfig,
        *,
        param: ParamFactory,
        placement: ExpertPlacement | None,
        expert_axes: tuple[str, ...],
        dispatch: str,
        kernels: str,
    ):
        norm = NORMS[decoder.norm]
        hidden_size, eps = decoder.hidden_size, decoder.norm_eps
        self.residual_multiplier = decoder.residual_multiplier
        self.attention_norm = norm(hidden_size, eps, param=param)
        self.attention = Attention(config.attention, hidden_size, eps, param=param)
        self.feed_forward_norm = norm(hidden_size, eps, param=param)
        self.sparse = isinstance(config.feed_forward, MoEConfig)
        if isinstance(config.feed_forward, MoEConfig):
            assert placement is not None
            self.moe = MoE(
                config.feed_forward,
                mesh=param.mesh,
                placement=placement,
                expert_axes=expert_axes,
                dispatch=dispatch,
                kernels=kernels,
                dtype=param.dtype,
                rngs=param.rngs,
            )
        else:
            self.mlp = MLP(config.feed_forward, param=param)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        mask_BS: jax.Array,
        cache: KVCache | None,
        batch: tuple[str, ...],
        *,
        decode: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """Apply the layer; tokens where `mask_BS` is False reach no routed expert."""
        attended, cache = self.attention(self.attention_norm(x_BSD), positions_BS, cache, batch, decode=decode)
        x_BSD = x_BSD + attended * self.residual_multiplier
        normed = self.feed_forward_norm(x_BSD)
        if self.sparse:
            y_BSD, _ = self.moe(normed, mask_BS)
            y_BSD = jax.lax.with_sharding_constraint(y_BSD, named(self.moe.mesh, batch))
        else:
            y_BSD = self.mlp(normed, batch)
        return x_BSD + y_BSD * self.residual_multiplier, cache


class Decoder(nnx.Module):
    """A decoder-only transformer on a (dp, tp, ep) mesh.

    Args:
        config: sizes and kinds of its parts.
        mesh: from `jaxmoe.make_mesh`.
        placement: one strategy name or `ExpertPlacement` for all MoE layers, or one for each.
        expert_axes, dispatch, kernels: as for `jaxmoe.MoE`.
        dtype: of weights and activations.
        rngs: random streams for the weights; None leaves them abstract, for a loader to fill.
        source: the checkpoint directory it comes from.

    Raises:
        ValueError: heads or widths do not divide over tp, or a placement does not fit.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        mesh: Mesh,
        placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
        expert_axes: tuple[str, ...] = (EP,),
        dispatch: str = "auto",
        kernels: str = "auto",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
        source: Path | None = None,
    ):
        check_expert_axes(expert_axes)
        check_tp(config, mesh.shape[TP], expert_axes)
        self.config, self.mesh, self.dtype = config, mesh, jnp.dtype(dtype)
        self._source: HostData[Path | None] = HostData(source)
        self._load_report: HostData[Any] = HostData(None)
        param = ParamFactory(mesh, dtype, rngs)
        experts = [ffn.num_experts for layer in config.layers if isinstance(ffn := layer.feed_forward, MoEConfig)]
        placements = dict(
            zip(
                config.moe_layers,
                make_placements(placement, experts, axes_size(mesh, expert_axes)),
                strict=True,
            )
        )
        self.embed = VocabTable(config.vocab_size, config.hidden_size, param=param)
        self.layers = nnx.List(
            DecoderLayer(
                layer,
                config,
                param=param,
                placement=placements.get(i),
                expert_axes=expert_axes,
                dispatch=dispatch,
                kernels=kernels,
            )
            for i, layer in enumerate(config.layers)
        )
        self.norm = NORMS[config.norm](config.hidden_size, config.norm_eps, param=param)
        if not config.tie_word_embeddings:
            self.lm_head = VocabTable(config.vocab_size, config.hidden_size, param=param, bias=config.lm_head_bias)

    @property
    def source(self) -> Path | None:
        """The checkpoint directory the model was loaded from; None for one with random weights."""
        return self._source.value

    @property
    def load_report(self) -> Any:
        """What `jaxmoe.load` read (a `jaxmoe.checkpoint.LoadReport`); None for a model with random weights."""
        return self._load_report.value

    @load_report.setter
    def load_report(self, report: Any) -> None:
        self._load_report.value = report

    def __call__(self, token_ids: jax.Array | np.ndarray | Sequence[Sequence[int]]) -> jax.Array:
        """Logits of every position.

        Args:
            token_ids: int32 [B, S], any B and S.

        Returns:
            float32 [B, S, vocab_size].

        Raises:
            ValueError: not two dims, no token, or an id outside the vocabulary.
        """
        if not isinstance(token_ids, jax.core.Tracer):
            token_ids = np.asarray(token_ids)
            check_token_ids(token_ids, self.config.vocab_size)
        B, S = token_ids.shape
        # Padded to a few sizes, so that a series of calls compiles a few programs.
        rows, length = self.padded_batch(B), bucket_length(S)
        tokens_BS = jnp.pad(jnp.asarray(token_ids, jnp.int32), ((0, rows - B), (0, length - S)))
        lengths_B = jnp.where(jnp.arange(rows) < B, S, 0)
        graphdef, state = nnx.split(self)
        return _all_logits(graphdef, state, tokens_BS, lengths_B)[:B, :S]

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty key/value cache for `batch_size` sequences (see `padded_batch`) of up to `max_length` tokens."""
        arrays = tuple(layer.attention.cache_arrays(batch_size, max_length) for layer in self.layers)
        return _empty(arrays, self.dtype, self.mesh, batch_axes(self.mesh, batch_size))

    def padded_batch(self, batch_size: int) -> int:
        """Rows to use for `batch_size` sequences, so that the batch splits evenly over the mesh."""
        return padded_batch(self.mesh, batch_size)

    def prefill(self, tokens_BS: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Run prompts and fill the cache.

        Args:
            tokens_BS: int32, padded on the right.
            lengths_B: int32, tokens of each prompt; 0 for a padding row.
            cache: from `init_cache`, of at least S positions.

        Returns:
            float32 [B, vocab_size], the logits after each prompt's last token, and the cache.
        """
        S = tokens_BS.shape[1]
        positions_BS, mask_BS = prompt_positions(lengths_B, S)
        x_BSD, cache = self._hidden(tokens_BS, positions_BS, mask_BS, cache)
        last_B1D = jnp.take_along_axis(x_BSD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)
        return self._logits(last_B1D)[:, 0], cache

    def decode(
        self, tokens_B: jax.Array, positions_B: jax.Array, cache: Cache, active_B: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Run one more token of each sequence.

        Args:
            tokens_B: int32.
            positions_B: int32, where each token stands; the cache holds all positions before.
            cache: as `prefill` left it.
            active_B: bool, False for rows that go to no routed expert; all are active by default.

        Returns:
            float32 [B, vocab_size], the logits after each token, and the cache.
        """
        mask_B1 = jnp.ones((len(tokens_B), 1), bool) if active_B is None else active_B[:, None]
        x_B1D, cache = self._hidden(tokens_B[:, None], positions_B[:, None], mask_B1, cache, decode=True)
        return self._logits(x_B1D)[:, 0], cache

    def _hidden(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        mask_BS: jax.Array,
        cache: Cache | None,
        *,
        decode: bool = False,
    ) -> tuple[jax.Array, Cache]:
        batch = batch_axes(self.mesh, tokens_BS.shape[0])
        x_BSD = self.embed.embed(tokens_BS, batch) * self.config.embedding_multiplier
        caches = []
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache[i]
            x_BSD, layer_cache = layer(x_BSD, positions_BS, mask_BS, layer_cache, batch, decode=decode)
            caches.append(layer_cache)
        return self.norm(x_BSD), tuple(caches)

    def _logits(self, x_BSD: jax.Array) -> jax.Array:
        table = self.embed if self.config.tie_word_embeddings else self.lm_head
        return table.logits(x_BSD, batch_axes(self.mesh, x_BSD.shape[0])) / self.config.logits_scaling


@partial(jax.jit, static_argnums=0)
def _all_logits(graphdef: nnx.GraphDef, state: nnx.State, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    positions_BS, mask_BS = prompt_positions(lengths_B, tokens_BS.shape[1])
    x_BSD, _ = model._hidden(tokens_BS, positions_BS, mask_BS, None)
    return model._logits(x_BSD)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(arrays: Any, dtype: jnp.dtype, mesh: Mesh, batch: tuple[str, ...]) -> Cache:
    def one(array: CacheArray) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.zeros(array.shape, dtype), named(mesh, batch, *array.dims))

    return jax.tree.map(one, arrays)


def prompt_positions(lengths_B: jax.Array, S: int) -> tuple[jax.Array, jax.Array]:
    """Positions of prompts padded to S, and a mask of their tokens; padding stands where the last token does.

    So a row's largest position tells the prompt's own length, which some position embeddings depend on.
    """
    index_S, lengths_B1 = jnp.arange(S), lengths_B[:, None]
    return jnp.minimum(index_S, jnp.maximum(lengths_B1 - 1, 0)), index_S < lengths_B1


def bucket_length(length: int, limit: int | None = None) -> int:
    """Round a length up, so that few different ones are ever compiled.

    Powers of two from 16 up; above 512 also the middle between two of them, so that a long cache
    is at most a third larger than needed.

    Args:
        length: tokens needed, at most `limit`.
        limit: never exceeded (a model's last position).

    Example:
        >>> [bucket_length(n, limit=4000) for n in (1, 17, 300, 600, 800, 3800)]
        [16, 32, 512, 768, 1024, 4000]
    """
    power = max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    middle = power * 3 // 4
    rounded = middle if power > 512 and length <= middle else power
    return rounded if limit is None else min(limit, rounded)


def check_token_ids(token_ids: np.ndarray, vocab_size: int) -> None:
    """Refuse what an embedding lookup would silently clip.

    Raises:
        ValueError: not whole numbers [B, S] with at least one token, all in 0..vocab_size-1.
    """
    if token_ids.ndim != 2 or token_ids.size == 0 or not np.issubdtype(token_ids.dtype, np.integer):
        raise ValueError(
            f"token ids are whole numbers [batch, sequence], at least one; got {token_ids.dtype} {token_ids.shape}"
        )
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise ValueError(
            f"token ids are 0..{vocab_size - 1}; got {token_ids.min()}..{token_ids.max()}; "
            f"use the tokenizer of this checkpoint"
        )


def check_tp(config: DecoderConfig, tp: int, expert_axes: tuple[str, ...]) -> None:
    """Refuse a tp that does not split heads and widths evenly.

    Raises:
        ValueError: names what does not divide, and every tp that would do.
    """

    def faults(tp: int) -> list[str]:
        found = []
        for layer in config.layers:
            heads, kv_heads = layer.attention.num_heads, layer.attention.num_kv_heads
            if heads % tp:
                found.append(f"num_attention_heads={heads}")
            if kv_heads % tp and tp % kv_heads:
                found.append(f"num_key_value_heads={kv_heads} (neither divides the other)")
            ffn = layer.feed_forward
            if isinstance(ffn, MoEConfig):
                if TP not in expert_axes and ffn.moe_intermediate_size % tp:
                    found.append(f"the expert width {ffn.moe_intermediate_size}")
            elif ffn.intermediate_size % tp:
                found.append(f"intermediate_size={ffn.intermediate_size}")
        return found

    if found := faults(tp):
        most = max(layer.attention.num_heads for layer in config.layers)
        would_do = [str(size) for size in range(1, most + 1) if not faults(size)]
        raise ValueError(
            f"heads and widths are split evenly over tp: tp={tp} does not divide {found[0]}; "
            f"tp can be {', '.join(would_do)}"
        )

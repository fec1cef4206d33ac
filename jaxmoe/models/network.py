"""The layers of a decoder on its mesh, and what they compute: pure functions of arrays, for programs to compile."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.checks import instance_of
from jaxmoe.config import DecoderConfig, LayerConfig, MoEConfig
from jaxmoe.dispatch import PhaseDispatch
from jaxmoe.layers import (
    NORMS,
    STREAMS,
    CacheArray,
    MoE,
    MoEStats,
    ParamFactory,
    VocabTable,
    check_expert_axes,
    check_usable,
)
from jaxmoe.mesh import TP, axes_size, batch_axes, check_mesh, named, padded_batch
from jaxmoe.models.checks import check_length, check_tp
from jaxmoe.models.decoder_layer import DecoderLayer, Passed
from jaxmoe.models.mtp import PredictionLayer
from jaxmoe.models.padding import prompt_positions
from jaxmoe.models.replay import of_layers
from jaxmoe.placement import ExpertPlacement, make_placements

# What every layer keeps of the tokens seen, first to last; None for a layer that keeps nothing.
Cache = tuple[Any, ...]


class DecoderNetwork(nnx.Module):
    """The layers of a `Decoder`, and what they compute.

    Every method is a pure function of the weights and its arguments, and may be traced. Arguments are as for `Decoder`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        mesh: Mesh,
        placement: str | ExpertPlacement | Sequence[str | ExpertPlacement],
        expert_axes: tuple[str, ...],
        dispatch: PhaseDispatch,
        kernels: str,
        dtype: Any,
        rngs: nnx.Rngs | None,
        one_of_alike: bool,
    ):
        instance_of("config", config, DecoderConfig, "a DecoderConfig")
        check_mesh(mesh)
        check_expert_axes(expert_axes)
        check_tp(config, mesh.shape[TP], expert_axes)
        self.config, self.mesh, self.dtype = config, mesh, jnp.dtype(dtype)
        self.dispatch, self.kernels = dispatch, kernels
        param = ParamFactory(mesh, dtype, rngs, kernels=kernels)
        experts = [ffn.num_experts for layer in config.layers if isinstance(ffn := layer.feed_forward, MoEConfig)]
        placements = dict(
            zip(
                config.moe_layers,
                make_placements(placement, experts, axes_size(mesh, expert_axes)),
                strict=True,
            )
        )
        self.embed = VocabTable(config.vocab_size, config.hidden_size, param=param)
        made: list[tuple[Any, DecoderLayer]] = []

        def make_layer(i: int, layer: LayerConfig) -> DecoderLayer:
            kind = DecoderLayer if i < config.num_main_layers else PredictionLayer
            alike = kind, layer, placements.get(i)
            if one_of_alike and (found := [own for other, own in made if other == alike]):
                return found[0]
            own = kind(
                layer,
                config,
                param=param,
                placement=placements.get(i),
                expert_axes=expert_axes,
                dispatch=dispatch,
                kernels=kernels,
            )
            made.append((alike, own))
            return own

        self.layers = nnx.List([make_layer(i, layer) for i, layer in enumerate(config.layers)])
        if config.streams is not None:
            _, one_of_all = STREAMS[type(config.streams)]
            self.hyper_head = one_of_all(config.streams, config.hidden_size, config.norm_eps, param=param)
        if config.final_norm:
            self.norm = NORMS[config.norm](config.hidden_size, config.norm_eps, param=param)
        if not config.tie_word_embeddings:
            self.lm_head = VocabTable(
                config.vocab_size, config.hidden_size, param=param, bias=config.lm_head_bias, embeds=False
            )

    @property
    def prediction_layers(self) -> list[PredictionLayer]:
        """The layers for multi-token prediction, which no token goes through on its way to the logits."""
        return [cast(PredictionLayer, layer) for layer in self.layers[self.config.num_main_layers :]]

    @property
    def moe_layers(self) -> list[MoE]:
        """The layers of routed experts, first to last, those for multi-token prediction too."""
        return [layer.moe for layer in self.layers if hasattr(layer, "moe")]

    @property
    def placements(self) -> list[ExpertPlacement]:
        """The placement of every MoE layer."""
        return [moe.placement for moe in self.moe_layers]

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for `batch_size` sequences (see `padded_batch`) of up to `max_length` tokens."""
        check_length(self.config, max_length)
        return self.empty_cache(self.layers[: self.config.num_main_layers], batch_size, max_length)

    def empty_cache(self, layers: Sequence[DecoderLayer], batch_size: int, max_length: int) -> Cache:
        """An empty cache for each of some layers."""
        arrays = tuple(layer.cache_arrays(batch_size, max_length) for layer in layers)
        return _empty(arrays, self.dtype, self.mesh, batch_axes(self.mesh, batch_size))

    def padded_batch(self, batch_size: int) -> int:
        """Rows to use for `batch_size` sequences, so that the batch splits evenly over the mesh."""
        return padded_batch(self.mesh, batch_size)

    def prefill(self, tokens_BS: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Run prompts and fill the cache.

        Args:
            tokens_BS: int32, padded on the right.
            lengths_B: int32, tokens of each prompt; 0 for a padding row.
            cache: cache from `init_cache`, of at least S positions.

        Returns:
            float32 [B, vocab_size], the logits after each prompt's last token, and the cache.
        """
        return self.prefill_and_stats(tokens_BS, lengths_B, cache)[:2]

    def prefill_and_stats(
        self,
        tokens_BS: jax.Array,
        lengths_B: jax.Array,
        cache: Cache,
        expert_ids_BSLK: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, tuple[MoEStats, ...]]:
        """`prefill`, and what each MoE layer did; with choices to take and adapters, as for `logits_and_stats`."""
        S = tokens_BS.shape[1]
        positions_BS, mask_BS = prompt_positions(lengths_B, S)
        x_BSD, cache, stats = self.hidden_and_stats(
            tokens_BS, positions_BS, mask_BS, cache, expert_ids_BSLK, adapter_ids_B
        )
        last_B1D = jnp.take_along_axis(x_BSD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)
        return self.logits_of(last_B1D)[:, 0], cache, stats

    def decode(
        self, tokens_B: jax.Array, positions_B: jax.Array, cache: Cache, active_B: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Run one more token of each sequence.

        Args:
            tokens_B: int32.
            positions_B: int32, where each token stands; the cache holds all positions before.
            cache: cache that `prefill` gave.
            active_B: bool, False for rows that go to no routed expert; all are active by default.

        Returns:
            float32 [B, vocab_size], the logits after each token, and the cache.
        """
        return self.decode_and_stats(tokens_B, positions_B, cache, active_B)[:2]

    def decode_and_stats(
        self,
        tokens_B: jax.Array,
        positions_B: jax.Array,
        cache: Cache,
        active_B: jax.Array | None = None,
        expert_ids_BLK: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, tuple[MoEStats, ...]]:
        """`decode`, and what each MoE layer did; with choices to take, one token's for each row, and adapters."""
        mask_B1 = jnp.ones((len(tokens_B), 1), bool) if active_B is None else active_B[:, None]
        ids_B1LK = None if expert_ids_BLK is None else expert_ids_BLK[:, None]
        x_B1D, cache, stats = self.hidden_and_stats(
            tokens_B[:, None], positions_B[:, None], mask_B1, cache, ids_B1LK, adapter_ids_B, decode=True
        )
        return self.logits_of(x_B1D)[:, 0], cache, stats

    def extend_and_stats(
        self,
        tokens_BS: jax.Array,
        first_B: jax.Array,
        lengths_B: jax.Array,
        cache: Cache,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, tuple[MoEStats, ...]]:
        """Run more tokens of prompts whose beginnings are in the cache; not for layers that take one token at a time.

        Args:
            tokens_BS: int32, padded on the right.
            first_B: int32, position of each row's first token; the cache has room for S from there on.
            lengths_B: int32, tokens of each row; 0 for a padding row.
            cache: cache that `prefill` or this has given.
            adapter_ids_B: adapters of the rows, as for `logits_and_stats`.

        Returns:
            float32 [B, vocab_size], the logits after each row's last token, the cache, and one `MoEStats` per MoE layer.
        """
        index_1S = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None]
        x_BSD, cache, stats = self.hidden_and_stats(
            tokens_BS,
            first_B[:, None] + index_1S,
            index_1S < lengths_B[:, None],
            cache,
            adapter_ids_B=adapter_ids_B,
            decode=True,
            lengths_B=lengths_B,
        )
        last_B1D = jnp.take_along_axis(x_BSD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)
        return self.logits_of(last_B1D)[:, 0], cache, stats

    def logits_and_stats(
        self,
        tokens_BS: jax.Array,
        lengths_B: jax.Array,
        expert_ids_BSLK: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[MoEStats, ...]]:
        """Logits of every position, and what each MoE layer did; pure and traceable, for training and measuring.

        Args:
            tokens_BS: int32, padded on the right, B a number that `padded_batch` gives.
            lengths_B: int32, tokens of each row; 0 for a padding row.
            expert_ids_BSLK: int32, choices to take instead of the routers' own, for the L MoE layers and the largest of
                their K, see `jaxmoe.MoE`; what it has of padding counts for nothing.
            adapter_ids_B: int32, adapter of each row as `adapter_ids` numbers them, -1 for none; None for none at all.

        Returns:
            float32 [B, S, vocab_size], and one `MoEStats` per MoE layer.
        """
        positions_BS, mask_BS = prompt_positions(lengths_B, tokens_BS.shape[1])
        x_BSD, _, stats = self.hidden_and_stats(tokens_BS, positions_BS, mask_BS, None, expert_ids_BSLK, adapter_ids_B)
        return self.logits_of(x_BSD), stats

    def embedded(self, tokens_BS: jax.Array) -> jax.Array:
        """Embed tokens, [B, S, D], as the first layer sees them."""
        return self.embed.embed(tokens_BS, batch_axes(self.mesh, len(tokens_BS))) * self.config.embedding_multiplier

    def hidden_and_stats(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        mask_BS: jax.Array,
        cache: Cache | None,
        expert_ids_BSLK: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
        *,
        decode: bool = False,
        lengths_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, tuple[MoEStats, ...]]:
        """Run tokens through the model's own layers and its last norm.

        Args:
            tokens_BS: int32.
            positions_BS: int32, as `TokenMixer` has them.
            mask_BS: bool, False for tokens that go to no routed expert.
            cache: cache that gets the tokens; None for none.
            expert_ids_BSLK: choices to take, as for `logits_and_stats`.
            adapter_ids_B: adapters of the rows, as for `logits_and_stats`.
            decode: whether the cache holds all positions before. With S > 1 it comes back with what `accepted` chooses from.
            lengths_B: int32, tokens of each row that count, with S > 1 in `decode`: the cache comes back as they left it.

        Returns:
            [B, S, D], the cache, and one `MoEStats` for each MoE layer that a token goes through.
        """
        check_usable(self)
        batch = batch_axes(self.mesh, tokens_BS.shape[0])
        x_BSD = self.embedded(tokens_BS)
        if self.config.streams is not None:
            x_BSD = jnp.repeat(x_BSD[:, :, None], self.config.streams.streams, axis=2)
        choices = iter(of_layers(expert_ids_BSLK, [moe.config for moe in self.moe_layers], tokens_BS.shape))
        caches, stats, passed = [], [], Passed()
        for i, layer in enumerate(self.layers[: self.config.num_main_layers]):
            layer_cache = None if cache is None else cache[i]
            ids_BSK = next(choices) if hasattr(layer, "moe") else None
            x_BSD, layer_cache, layer_stats, passed = layer(
                x_BSD,
                positions_BS,
                mask_BS,
                layer_cache,
                batch,
                expert_ids_BSK=ids_BSK,
                decode=decode,
                passed=passed,
                token_ids_BS=tokens_BS,
                lengths_B=lengths_B,
                adapter_ids_B=adapter_ids_B,
            )
            caches.append(layer_cache)
            if layer_stats is not None:
                stats.append(layer_stats)
        if self.config.streams is not None:
            x_BSD = self.hyper_head(x_BSD)
        return self.norm(x_BSD) if self.config.final_norm else x_BSD, tuple(caches), tuple(stats)

    def logits_of(self, x_BSD: jax.Array) -> jax.Array:
        """Project what the last norm gives, [B, S, D], to float32 [B, S, vocab_size]."""
        table = self.embed if self.config.tie_word_embeddings else self.lm_head
        logits_BSV = table.logits(x_BSD, batch_axes(self.mesh, x_BSD.shape[0])) / self.config.logits_scaling
        softcap = self.config.logits_softcap
        return logits_BSV if softcap is None else softcap * jnp.tanh(logits_BSV / softcap)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(arrays: Any, dtype: jnp.dtype, mesh: Mesh, batch: tuple[str, ...]) -> Cache:
    def one(array: CacheArray) -> jax.Array:
        return jax.lax.with_sharding_constraint(
            jnp.zeros(array.shape, array.dtype or dtype), named(mesh, *array.spec(batch))
        )

    return jax.tree.map(one, arrays)

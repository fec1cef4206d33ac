"""One layer of a decoder: a token mixer and a feed-forward part, each behind a norm and added to its input."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import ChosenByFunction, DecoderConfig, LayerConfig, MLPConfig, MoEConfig
from jaxmoe.dispatch import PhaseDispatch
from jaxmoe.layers import (
    MLP,
    NORMS,
    STREAMS,
    MoE,
    MoEStats,
    NGrams,
    ParamFactory,
    append_stream,
    join_streams,
    make_token_mixer,
)
from jaxmoe.layers.param import ones
from jaxmoe.mesh import named
from jaxmoe.placement import ExpertPlacement


class Passed(NamedTuple):
    """Arrays that a layer passes on to the ones after it, beside the residual stream.

    Attributes:
        chosen: positions that a layer has chosen to attend to, see `jaxmoe.layers.mixers.TokenMixer`; None where none has.
        shortcut: result of routed experts, [B, S, D], that is added behind the next layer; None for none.
    """

    chosen: jax.Array | None = None
    shortcut: jax.Array | None = None


_NOTHING = Passed()


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); a layer may have one of the two only.

    With `DecoderConfig.streams` x is several streams, and the sums are what their kind does instead (`STREAMS`). With
    `LayerConfig.experts_by_token` a table chooses a token's experts by its id, unless choices are given, or the config has a
    router function. With `LayerConfig.post_norms` a half's result is normalized before it is added, and without
    `LayerConfig.pre_norms` what goes into it is not. With `LayerConfig.parallel_mlp` the second half is
    norm(mlp(norm(x))) + norm(moe(norm(x))), and the router sees x itself. With `LayerConfig.shortcut_mlp` it is
    mlp(norm(x)), and moe(norm(x)) is added behind the next layer.
    """

    def __init__(
        self,
        config: LayerConfig,
        decoder: DecoderConfig,
        *,
        param: ParamFactory,
        placement: ExpertPlacement | None,
        expert_axes: tuple[str, ...],
        dispatch: PhaseDispatch,
        kernels: str,
    ):
        norm = NORMS[decoder.norm]
        hidden_size, eps = decoder.hidden_size, decoder.norm_eps
        self.residual_multiplier = decoder.residual_multiplier
        self.config, self.dispatch = config, dispatch
        if decoder.streams is not None:
            past_half, _ = STREAMS[type(decoder.streams)]
            for half in ("attention", "feed_forward"):
                if getattr(config, half) is not None:
                    setattr(self, f"{half}_hyper", past_half(decoder.streams, hidden_size, eps, param=param))
        if config.ngrams is not None:
            assert decoder.streams is not None
            self.ngrams = NGrams(config.ngrams, decoder.streams.streams, hidden_size, eps, param=param)
        if config.attention is not None:
            if config.pre_norms:
                self.attention_norm = norm(hidden_size, eps, param=param)
            self.attention = make_token_mixer(config.attention, hidden_size, eps, param=param)
        if config.pre_norms and config.feed_forward is not None:
            self.feed_forward_norm = norm(hidden_size, eps, param=param)
        if isinstance(config.feed_forward, MoEConfig):
            assert placement is not None
            self.moe = MoE(
                config.feed_forward,
                mesh=param.mesh,
                placement=placement,
                expert_axes=expert_axes,
                dispatch=dispatch.prefill,
                kernels=kernels,
                dtype=param.dtype,
                rngs=param.rngs,
            )
            self.moe.check_dispatch(dispatch.decode)
            if config.experts_by_token:
                table = (decoder.vocab_size, config.feed_forward.num_experts_per_tok)
                init = partial(_turns, num_experts=config.feed_forward.num_experts)
                self.token_experts = param(table, init=init, dtype=jnp.int32)
        if isinstance(dense := config.parallel_mlp or config.shortcut_mlp or config.feed_forward, MLPConfig):
            self.mlp = MLP(dense, param=param)
        if config.post_norms and config.attention is not None:
            self.attention_post_norm = norm(hidden_size, eps, param=param)
        if config.post_norms and config.feed_forward is not None:
            self.feed_forward_post_norm = norm(hidden_size, eps, param=param)
        if config.parallel_mlp is not None:
            self.mlp_post_norm = norm(hidden_size, eps, param=param)
            self.moe_norm = norm(hidden_size, eps, param=param)
            self.moe_post_norm = norm(hidden_size, eps, param=param)
        if config.output_scale:
            self.output_scale = param((1,), init=ones)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        mask_BS: jax.Array,
        cache: Any,
        batch: tuple[str, ...],
        *,
        expert_ids_BSK: jax.Array | None = None,
        decode: bool = False,
        passed: Passed = _NOTHING,
        token_ids_BS: jax.Array | None = None,
        lengths_B: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, MoEStats | None, Passed]:
        """Apply the layer; tokens where `mask_BS` is False reach no routed expert.

        `expert_ids_BSK` are choices to take instead of the router's own, see `jaxmoe.MoE`; `passed` is what the layer before
        has passed on. `token_ids_BS` are asked for where experts are chosen by token, or there are embeddings of n-grams.
        `lengths_B` says how many of several tokens in `decode` count, see `jaxmoe.layers.mixers.TokenMixer`.
        `adapter_ids_B` are the adapters of the rows, -1 for none; None for none at all.

        Returns:
            x as it came, [B, S, D] (with streams [B, S, n, D]), the layer's cache, what its routed experts did (None where
            it has none), and what it passes on.
        """
        stats, ngram_cache, chosen, shortcut = None, None, passed.chosen, None
        if self.config.ngrams is not None:
            assert token_ids_BS is not None
            cache, ngram_cache = (None, None) if cache is None else cache
            y_BSD, ngram_cache = self.ngrams(
                x_BSD, token_ids_BS, positions_BS, ngram_cache, batch, decode=decode, lengths_B=lengths_B
            )
            x_BSD = x_BSD + y_BSD
        if self.config.attention is not None:
            h_BSD, join = self._enter(x_BSD, "attention")
            normed_BSD = self.attention_norm(h_BSD) if self.config.pre_norms else h_BSD
            mix: Any = partial(
                self.attention,
                normed_BSD,
                positions_BS,
                cache,
                batch,
                decode=decode,
                lengths_B=lengths_B,
                adapter_ids_B=adapter_ids_B,
            )
            if self.config.attention.chooses_positions:
                y_BSD, cache, chosen = mix(chosen=chosen)
            else:
                y_BSD, cache = mix()
            if self.config.post_norms:
                y_BSD = self.attention_post_norm(y_BSD)
            x_BSD = join(y_BSD)
        if self.config.feed_forward is not None:
            dispatch = self.dispatch.decode if decode else self.dispatch.prefill
            if self.config.experts_by_token:
                expert_ids_BSK = self._experts_by_token(token_ids_BS, expert_ids_BSK)
            h_BSD, join = self._enter(x_BSD, "feed_forward")
            y_BSD, stats, shortcut = self._feed_forward(h_BSD, mask_BS, batch, expert_ids_BSK, dispatch, adapter_ids_B)
            if self.config.post_norms:
                y_BSD = self.feed_forward_post_norm(y_BSD)
            x_BSD = join(y_BSD)
        if passed.shortcut is not None:
            x_BSD = x_BSD + passed.shortcut * self.residual_multiplier
        if self.config.output_scale:
            x_BSD = x_BSD * jax.lax.broadcast_to_rank(self.output_scale[...], x_BSD.ndim)
        return x_BSD, cache if ngram_cache is None else (cache, ngram_cache), stats, Passed(chosen, shortcut)

    def _enter(self, x_BSD: jax.Array, half: str) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """The input of a half of the layer, and the function that brings its result into the residual stream."""
        if hasattr(self, f"{half}_hyper"):
            h_BSD, weights = getattr(self, f"{half}_hyper")(x_BSD)
            if self.config.starts_block and half == "attention":
                return h_BSD, partial(append_stream, x_BSD)
            return h_BSD, partial(join_streams, x_BSD, weights)
        return x_BSD, lambda y_BSD: x_BSD + y_BSD * self.residual_multiplier

    def _experts_by_token(self, token_ids_BS: jax.Array | None, given_BSK: jax.Array | None) -> jax.Array | None:
        """The choices that were given, and the table's where none were."""
        assert isinstance(self.config.feed_forward, MoEConfig)
        assert token_ids_BS is not None
        if isinstance(self.config.feed_forward.router.choice, ChosenByFunction):
            return given_BSK
        ids_BSK = self.token_experts[...][token_ids_BS]
        return ids_BSK if given_BSK is None else jnp.where(given_BSK < 0, ids_BSK, given_BSK)

    def _feed_forward(
        self,
        x_BSD: jax.Array,
        mask_BS: jax.Array,
        batch: tuple[str, ...],
        expert_ids_BSK: jax.Array | None,
        dispatch: str,
        adapter_ids_B: jax.Array | None,
    ) -> tuple[jax.Array, MoEStats | None, jax.Array | None]:
        """The second half without what it is added to, and the experts' part that comes behind the next layer."""
        normed_BSD = self.feed_forward_norm(x_BSD) if self.config.pre_norms else x_BSD
        if not isinstance(self.config.feed_forward, MoEConfig):
            return self.mlp(normed_BSD, batch, adapter_ids_B), None, None
        ids_BS = None if adapter_ids_B is None else jnp.broadcast_to(adapter_ids_B[:, None], mask_BS.shape)
        moe = partial(self.moe, token_mask=mask_BS, expert_ids=expert_ids_BSK, dispatch=dispatch, adapter_ids=ids_BS)
        if self.config.parallel_mlp is None:
            y_BSD, stats = moe(normed_BSD)
        else:
            y_BSD, stats = moe(self.moe_norm(x_BSD), router_x=x_BSD)
        y_BSD = jax.lax.with_sharding_constraint(y_BSD, named(self.moe.mesh, batch))
        if self.config.parallel_mlp is not None:
            y_BSD = self.mlp_post_norm(self.mlp(normed_BSD, batch, adapter_ids_B)) + self.moe_post_norm(y_BSD)
        if self.config.shortcut_mlp is not None:
            return self.mlp(normed_BSD, batch, adapter_ids_B), stats, y_BSD
        return y_BSD, stats, None

    def cache_arrays(self, batch_size: int, max_length: int) -> Any:
        """The layer's cache of the tokens seen, a pytree of `CacheArray`; None for a layer that looks at none."""
        arrays = None if self.config.attention is None else self.attention.cache_arrays(batch_size, max_length)
        return arrays if self.config.ngrams is None else (arrays, self.ngrams.cache_arrays(batch_size))


def _turns(key: jax.Array, shape: tuple[int, ...], dtype: Any, *, num_experts: int) -> jax.Array:
    """A table of experts that take turns, and that differ from each other in every row."""
    del key
    rows, columns = jnp.arange(shape[0], dtype=dtype)[:, None], jnp.arange(shape[1], dtype=dtype)[None]
    return (rows * shape[1] + columns) % num_experts

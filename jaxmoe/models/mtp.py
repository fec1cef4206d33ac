"""Layers for multi-token prediction: a decoder layer behind a projection that joins a hidden state and the next token.

DeepSeek-AI 2024 (arXiv:2412.19437), section 2.2. With h_i what the model gives at position i, and t the tokens, the layer
at depth k = 1, 2, ... computes

    h_i^k = layer(W [norm(embed(t_{i+k})); norm(h_i^{k-1})]),    logits = head(norm(h_i^k))

which are those of t_{i+k+1}. Embedding and head are the model's own; h^0 is what its last norm gives.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import DecoderConfig, LayerConfig
from jaxmoe.layers import NORMS, MoEStats, ParamFactory
from jaxmoe.mesh import named
from jaxmoe.models.decoder_layer import DecoderLayer


class PredictionInput(nnx.Module):
    """W [norm(e); norm(h)], and the norm behind the layer that takes it."""

    def __init__(self, decoder: DecoderConfig, *, param: ParamFactory):
        norm, D = NORMS[decoder.norm], decoder.hidden_size
        self.mesh = param.mesh
        self.embed_norm = norm(D, decoder.norm_eps, param=param)
        self.hidden_norm = norm(D, decoder.norm_eps, param=param)
        self.w_in = param((D, 2 * D))
        self.out_norm = norm(D, decoder.norm_eps, param=param)

    def __call__(self, embedding_BSD: jax.Array, hidden_BSD: jax.Array, batch: tuple[str, ...]) -> jax.Array:
        """Join the next token's embedding and the hidden state, [B, S, D]."""
        both = jnp.concatenate([self.embed_norm(embedding_BSD), self.hidden_norm(hidden_BSD)], axis=-1)
        return jax.lax.with_sharding_constraint(both @ self.w_in[...].T, named(self.mesh, batch))


class PredictionLayer(DecoderLayer):
    """A decoder layer that guesses a token further ahead; its last norm is its own, embedding and head are the model's."""

    def __init__(self, config: LayerConfig, decoder: DecoderConfig, *, param: ParamFactory, **layer: Any):
        assert decoder.mtp is not None, "a decoder without layers for multi-token prediction"
        super().__init__(config, decoder, param=param, **layer)
        self.passes = decoder.mtp.passes
        self.prediction = PredictionInput(decoder, param=param)

    def predict(
        self,
        hidden_BSD: jax.Array,
        embedding_BSD: jax.Array,
        positions_BS: jax.Array,
        mask_BS: jax.Array,
        cache: Any,
        batch: tuple[str, ...],
        *,
        decode: bool = False,
    ) -> tuple[jax.Array, jax.Array, Any, MoEStats | None]:
        """Apply the layer.

        Args:
            hidden_BSD: hidden states of the depth before.
            embedding_BSD: embeddings of the tokens that stand k behind each position.
            positions_BS, mask_BS, cache, batch, decode: arguments of `DecoderLayer`.

        Returns:
            [B, S, D] for the head, [B, S, D] for the next depth, the layer's cache and what its routed experts did.
        """
        x_BSD = self.prediction(embedding_BSD, hidden_BSD, batch)
        x_BSD, cache, stats, _ = self(x_BSD, positions_BS, mask_BS, cache, batch, decode=decode)
        normed_BSD = self.prediction.out_norm(x_BSD)
        passed = {"stream": x_BSD, "normed": normed_BSD, "main": hidden_BSD}[self.passes]
        return normed_BSD, passed, cache, stats

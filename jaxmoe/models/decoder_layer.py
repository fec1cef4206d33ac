"""One layer of a decoder: a token mixer and a feed-forward part, each behind a norm and added to its input."""

from typing import Any

import jax
from flax import nnx

from jaxmoe.config import DecoderConfig, LayerConfig, MoEConfig
from jaxmoe.layers import MLP, NORMS, MoE, MoEStats, ParamFactory, make_token_mixer
from jaxmoe.mesh import named
from jaxmoe.placement import ExpertPlacement


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); a layer may have one of the two only."""

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
        self.config = config
        if config.attention is not None:
            self.attention_norm = norm(hidden_size, eps, param=param)
            self.attention = make_token_mixer(config.attention, hidden_size, eps, param=param)
        if config.feed_forward is not None:
            self.feed_forward_norm = norm(hidden_size, eps, param=param)
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
        elif config.feed_forward is not None:
            self.mlp = MLP(config.feed_forward, param=param)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        mask_BS: jax.Array,
        cache: Any,
        batch: tuple[str, ...],
        *,
        decode: bool = False,
    ) -> tuple[jax.Array, Any, MoEStats | None]:
        """Apply the layer; tokens where `mask_BS` is False reach no routed expert.

        Returns:
            [B, S, D], the layer's cache, and what its routed experts did (None where it has none).
        """
        stats = None
        if self.config.attention is not None:
            attended, cache = self.attention(self.attention_norm(x_BSD), positions_BS, cache, batch, decode=decode)
            x_BSD = x_BSD + attended * self.residual_multiplier
        if isinstance(self.config.feed_forward, MoEConfig):
            y_BSD, stats = self.moe(self.feed_forward_norm(x_BSD), mask_BS)
            y_BSD = jax.lax.with_sharding_constraint(y_BSD, named(self.moe.mesh, batch))
            x_BSD = x_BSD + y_BSD * self.residual_multiplier
        elif self.config.feed_forward is not None:
            y_BSD = self.mlp(self.feed_forward_norm(x_BSD), batch)
            x_BSD = x_BSD + y_BSD * self.residual_multiplier
        return x_BSD, cache, stats

    def cache_arrays(self, batch_size: int, max_length: int) -> Any:
        """What the layer keeps of the tokens seen, a pytree of `CacheArray`; None for a layer that looks at none."""
        return None if self.config.attention is None else self.attention.cache_arrays(batch_size, max_length)

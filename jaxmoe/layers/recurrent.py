"""The common part of the recurrent layers in attention's place: a state and a convolution's inputs instead of a cache."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmoe.layers.cache import cache_specs
from jaxmoe.layers.linear import Linear
from jaxmoe.layers.weights import WeightSpecs
from jaxmoe.mesh import TP


class RecurrentCache(NamedTuple):
    """The arrays that a layer keeps of a sequence, however long; also holds their shapes or partition specs.

    Attributes:
        conv: [B, V, channels], V inputs of the convolution before the next token; those of one tp rank's channels
            or heads after those of the other.
        state: float32 [B, ...], state of every channel or head; None for a layer that has none.
    """

    conv: Any
    state: Any


class RecurrentMixer(nnx.Module):
    """A token mixer whose channels or heads are split over tp; a subclass says what a rank does with its own.

    The output projection is `w_out`, with `b_out` where it has a bias.

    Attributes:
        packable: names of the parameters that may be held packed.
        mesh: mesh that the layer is on.
        specs: specs of its weights.
        linear: product with its matrices.
    """

    packable: ClassVar[tuple[str, ...]] = ("w_out",)
    mesh: Mesh
    specs: WeightSpecs
    linear: Linear

    def cache_arrays(self, batch_size: int, max_length: int) -> RecurrentCache:
        """The layer's cache, as a `RecurrentCache` of `CacheArray`; see `TokenMixer`."""
        raise NotImplementedError

    def _run(
        self, w: dict[str, Any], x_BSD: jax.Array, lengths_B: jax.Array, before: RecurrentCache | None
    ) -> tuple[jax.Array, RecurrentCache]:
        """Compute the outputs of this rank's channels, and what they keep.

        Args:
            w: weights of this rank.
            x_BSD: activations, rows padded on the right; padding must leave no trace in what is kept.
            lengths_B: int32, number of tokens of each row.
            before: cache that the tokens before have left; None for the start of sequences.

        Returns:
            [B, S, channels] in x's dtype, before the output projection.
        """
        raise NotImplementedError

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        cache: RecurrentCache | None,
        batch: tuple[str, ...],
        *,
        decode: bool = False,
        lengths_B: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, RecurrentCache | None]:
        """Run a prompt from empty states, or new tokens from the cache's.

        Args:
            x_BSD: normed activations, the batch dim sharded over the axes `batch`.
            positions_BS: int32, positions as `TokenMixer` has them: they tell a prompt's tokens from its padding.
            cache: cache before the tokens; None for none.
            batch: mesh axes of the batch dim.
            decode: whether the cache holds what the tokens before have left.
            lengths_B: int32, tokens of each row that count in `decode`; None for all of them.
            adapter_ids_B: int32, adapter of each row, -1 for none; None for none at all.

        Returns:
            [B, S, D], and the cache after each row's last token; of several tokens in `decode` after each, [B, S, ...],
            unless `lengths_B` says which is the last.
        """
        weights, specs = self.specs.weights(self, adapter_ids_B, batch)
        cache_spec = None if cache is None else cache_specs(self.cache_arrays(1, 1), batch)
        several = decode and cache is not None and x_BSD.shape[1] > 1 and lengths_B is None
        out_spec = jax.tree.map(lambda spec: P(spec[0], None, *spec[1:]), cache_spec) if several else cache_spec

        def local(
            w: dict[str, Any],
            x_BSD: jax.Array,
            positions_BS: jax.Array,
            cache: RecurrentCache | None,
            lengths_B: jax.Array | None,
        ) -> tuple[jax.Array, RecurrentCache | None]:
            if several and cache is not None:
                y_BSA, kept = self._run_each(w, x_BSD, cache)
            else:
                if lengths_B is None:
                    lengths_B = jnp.ones(len(x_BSD), jnp.int32) if decode else jnp.max(positions_BS, axis=1) + 1
                y_BSA, kept = self._run(w, x_BSD, lengths_B, cache if decode else None)
            y_BSD = self.linear(y_BSA, w["w_out"], jnp.float32)
            y_BSD = jax.lax.psum(y_BSD, TP).astype(x_BSD.dtype)
            y_BSD = y_BSD + w["b_out"][None, None] if "b_out" in w else y_BSD
            return y_BSD, None if cache is None else RecurrentCache(kept.conv.astype(cache.conv.dtype), kept.state)

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs, P(batch), P(batch), cache_spec, P(batch)),
            out_specs=(P(batch), out_spec),
            check_vma=False,
        )(weights, x_BSD, positions_BS, cache, lengths_B)

    def _run_each(self, w: dict[str, Any], x_BSD: jax.Array, cache: RecurrentCache) -> tuple[jax.Array, RecurrentCache]:
        """Run tokens one after the other, and keep what each of them leaves, [B, S, ...]."""
        lengths_B = jnp.ones(len(x_BSD), jnp.int32)

        def one(before: RecurrentCache, x_BD: jax.Array) -> tuple[RecurrentCache, tuple[jax.Array, RecurrentCache]]:
            y_B1A, kept = self._run(w, x_BD[:, None], lengths_B, before)
            kept = RecurrentCache(kept.conv.astype(before.conv.dtype), kept.state)
            return kept, (y_B1A[:, 0], kept)

        _, each = jax.lax.scan(one, cache, jnp.moveaxis(x_BSD, 1, 0))
        return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), each)


def is_token(S: int, lengths_B: jax.Array) -> jax.Array:
    """Tell tokens from padding: bool [B, S, 1], False for padding."""
    return (jnp.arange(S, dtype=jnp.int32)[None] < lengths_B[:, None])[..., None]

"""Token embedding and output projection, both with the vocabulary split over tp."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmoe.layers.param import ParamFactory, RowMap, zeros
from jaxmoe.layers.weights import Weight, WeightSpecs
from jaxmoe.mesh import TP


class VocabTable(nnx.Module):
    """A [vocabulary, D] table, its rows split over tp; a vocabulary that does not divide is padded with zero rows.

    It serves as embedding (`embed`), as output projection (`logits`), or as both where they are tied; where `embeds` is
    False, as the projection alone.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        param: ParamFactory,
        bias: bool = False,
        embeds: bool = True,
        parts: int | None = None,
    ):
        tp = param.mesh.shape[TP]
        padded = -(-vocab_size // tp) * tp
        rows = RowMap(vocab_size, padding=padded - vocab_size) if padded > vocab_size else None
        self.weight = param((padded, hidden_size), TP, None, rows=rows, parts=parts)
        if bias:
            self.bias = param((padded,), TP, init=zeros, rows=rows)
        self.vocab_size, self.specs = vocab_size, WeightSpecs.of(self)
        self.mesh: Mesh = param.mesh
        self.linear = param.linear
        # Rows are looked up in plain numbers.
        self.packable = () if embeds else ("weight",)

    def embed(self, tokens_BS: jax.Array, batch: tuple[str, ...]) -> jax.Array:
        """Look up rows of the table, [B, S, D]; each tp rank looks up what it holds and one psum adds the parts up."""

        def local(weight_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
            rows = weight_VD.shape[0]
            local_BS = tokens_BS - jax.lax.axis_index(TP) * rows
            held_BS = (local_BS >= 0) & (local_BS < rows)
            x_BSD = jnp.take(weight_VD, jnp.where(held_BS, local_BS, 0), axis=0, mode="clip")
            return jax.lax.psum(jnp.where(held_BS[..., None], x_BSD, 0), TP)

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(self.specs.spec(self, "weight"), P(batch, None)),
            out_specs=P(batch),
            check_vma=False,
        )(self.weight[...], tokens_BS)

    def logits(self, x_BSD: jax.Array, batch: tuple[str, ...]) -> jax.Array:
        """Compute x @ table.T + bias in float32, [B, S, vocabulary], the vocabulary split over tp until it is used."""

        def local(weight_VD: Weight, x_BSD: jax.Array) -> jax.Array:
            return self.linear(x_BSD, weight_VD, jnp.float32)

        logits_BSV = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(self.specs.spec(self, "weight"), P(batch)),
            out_specs=P(batch, None, TP),
            check_vma=False,
        )(self.specs.value(self, "weight"), x_BSD)
        if hasattr(self, "bias"):
            logits_BSV += self.bias[...].astype(jnp.float32)[None, None]
        return logits_BSV[..., : self.vocab_size]

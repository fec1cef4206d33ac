"""The dense gated MLP of layers without routed experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmoe.config import MLPConfig
from jaxmoe.kernels.grouped_matmul import ACTIVATIONS
from jaxmoe.layers.param import ParamFactory
from jaxmoe.mesh import TP


class MLP(nnx.Module):
    """down(act(gate x) · up x), its width split over tp; one psum brings the parts together."""

    def __init__(self, config: MLPConfig, *, param: ParamFactory):
        hidden, width = config.hidden_size, config.intermediate_size
        self.w_gate = param((width, hidden), TP, None)
        self.w_up = param((width, hidden), TP, None)
        self.w_down = param((hidden, width), None, TP)
        self.config = config
        self.mesh = param.mesh

    def __call__(self, x_BSD: jax.Array, batch: tuple[str, ...]) -> jax.Array:
        """Map x [B, S, D], its batch dim sharded over the axes `batch`, to [B, S, D]."""
        activation = ACTIVATIONS[self.config.activation]

        def local(x_BSD: jax.Array, w_gate_FD: jax.Array, w_up_FD: jax.Array, w_down_DF: jax.Array) -> jax.Array:
            gate_BSF = jnp.einsum("bsd,fd->bsf", x_BSD, w_gate_FD)
            up_BSF = jnp.einsum("bsd,fd->bsf", x_BSD, w_up_FD)
            h_BSF = activation(gate_BSF) * up_BSF
            y_BSD = jnp.einsum("bsf,df->bsd", h_BSF, w_down_DF, preferred_element_type=jnp.float32)
            return jax.lax.psum(y_BSD, TP).astype(x_BSD.dtype)

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(P(batch), P(TP, None), P(TP, None), P(None, TP)),
            out_specs=P(batch),
            check_vma=False,
        )(x_BSD, self.w_gate[...], self.w_up[...], self.w_down[...])

"""The dense MLP of layers without routed experts, and of the experts that serve every token."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmoe.config import MLPConfig
from jaxmoe.kernels.grouped_matmul import combine_halves
from jaxmoe.layers.param import ParamFactory, zeros
from jaxmoe.layers.weights import WeightSpecs
from jaxmoe.mesh import auto_mesh
from jaxmoe.numerics import sum_dtype


class MLP(nnx.Module):
    """down(act(gate x) · up x), its width split over tp; one psum brings the parts together."""

    packable = ("w_gate", "w_up", "w_down")

    def __init__(self, config: MLPConfig, *, param: ParamFactory):
        hidden, width, tp = config.hidden_size, config.intermediate_size, param.axes.tp or None
        if config.gated:
            self.w_gate = param((width, hidden), tp, None)
        self.w_up = param((width, hidden), tp, None)
        self.w_down = param((hidden, width), None, tp)
        if config.bias:
            if config.gated:
                self.b_gate = param((width,), tp, init=zeros)
            self.b_up = param((width,), tp, init=zeros)
            self.b_down = param((hidden,), init=zeros)
        self.config, self.specs, self.linear = config, WeightSpecs.of(self), param.linear
        self.mesh, self.tp_axes = auto_mesh(param.mesh), param.axes.tp

    def __call__(self, x_BSD: jax.Array, batch: tuple[str, ...], adapter_ids_B: jax.Array | None = None) -> jax.Array:
        """Map x [B, S, D], its batch dim sharded over the axes `batch`, to [B, S, D], each row with its adapter."""
        config = self.config
        combine = combine_halves(config.activation, config.activation_limit, gated=config.gated)
        weights, specs = self.specs.weights(self, adapter_ids_B, batch)

        def local(w: dict[str, Any], x_BSD: jax.Array) -> jax.Array:
            def project(name: str) -> jax.Array:
                y_BSF = self.linear(x_BSD, w[f"w_{name}"])
                return y_BSF + w[f"b_{name}"][None, None] if self.config.bias else y_BSF

            h_BSF = combine.halves(project("gate"), project("up")) if config.gated else combine.halves(project("up"))
            y_BSD = self.linear(h_BSF, w["w_down"], sum_dtype(x_BSD.dtype))
            y_BSD = jax.lax.psum(y_BSD, self.tp_axes).astype(x_BSD.dtype)
            return y_BSD + w["b_down"][None, None] if self.config.bias else y_BSD

        return jax.shard_map(local, mesh=self.mesh, in_specs=(specs, P(batch)), out_specs=P(batch), check_vma=False)(
            weights, x_BSD
        )

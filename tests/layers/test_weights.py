"""The specs that a module notes of its parameters, and its weights as the computation takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxmoe import MoE, MoEConfig
from jaxmoe.config import MLPConfig
from jaxmoe.layers import MLP, ParamFactory
from jaxmoe.layers.experts import ExpertStacks
from jaxmoe.layers.latent import LatentProjection
from jaxmoe.layers.weights import WeightSpecs, held
from tests.support.meshes import mesh_of

D = 8
CONFIG = MoEConfig(
    num_experts=4,
    num_experts_per_tok=2,
    hidden_size=D,
    moe_intermediate_size=4,
    shared=MLPConfig(hidden_size=D, intermediate_size=4),
)


def make_mlp(rngs: nnx.Rngs | None) -> MLP:
    config = MLPConfig(hidden_size=D, intermediate_size=4, bias=True)
    return MLP(config, param=ParamFactory(mesh_of(1, 2, 1), jnp.float32, rngs))


# Values, shapes without values, and values of a program that is being traced.
MAKERS = {
    "random": lambda: make_mlp(nnx.Rngs(0)),
    "abstract": lambda: make_mlp(None),
    "eval_shape": lambda: nnx.eval_shape(lambda: make_mlp(nnx.Rngs(0))),
    "vmap": lambda: nnx.split_rngs(splits=3)(nnx.vmap(make_mlp))(nnx.Rngs(0)),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_specs_are_those_of_the_arrays_however_the_module_is_made(maker) -> None:
    arrays = {name: param.get_value() for name, param in nnx.state(make_mlp(nnx.Rngs(0)), nnx.Param).items()}
    assert dict(MAKERS[maker]().specs.by_name) == {name: array.sharding.spec for name, array in arrays.items()}


def test_weights_by_name_and_in_tuples() -> None:
    layer = MoE(CONFIG, mesh=mesh_of(1, 2, 2), rngs=nnx.Rngs(0))
    noted = WeightSpecs.of(layer)
    stacks, specs = noted.values_as(layer, ExpertStacks), noted.specs_as(layer, ExpertStacks)
    np.testing.assert_array_equal(stacks.w_down, layer.w_down[...])
    assert specs == ExpertStacks(P(("ep",), None, ("tp",), None), P(("ep",), None, ("tp",)))
    assert (stacks.b_gate_up, stacks.b_down) == (None, None)
    assert held(layer, LatentProjection) == (None,) * len(LatentProjection._fields)
    weights, of_shared = layer.shared.specs.weights(layer.shared)
    assert weights.keys() == of_shared.keys() == {"w_gate", "w_up", "w_down"}


@pytest.mark.full
def test_a_state_from_a_mesh_of_other_names_goes_in() -> None:
    """`nnx.update` brings the metadata of the other layer's parameters along, and the axes there are not this layer's."""
    layer = MoE(CONFIG, mesh=mesh_of(1, 2, 2), rngs=nnx.Rngs(0))
    mesh = jax.make_mesh(
        (2, 2), ("model", "expert"), axis_types=(AxisType.Auto,) * 2, devices=list(layer.mesh.devices.flat)
    )
    other = MoE(CONFIG, mesh=mesh, axis_names={"tp": "model", "ep": "expert"}, rngs=nnx.Rngs(1))
    nnx.update(other, nnx.state(layer))
    x = np.random.default_rng(0).normal(size=(6, D)).astype(np.float32)
    np.testing.assert_allclose(other(x)[0], layer(x)[0], atol=1e-5)

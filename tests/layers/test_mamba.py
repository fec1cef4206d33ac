"""Both Mamba layers: states continue where prompts end, padding leaves no trace, and every tp gives the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import Mamba2Config, MambaConfig, TokenMixerConfig
from jaxmoe.layers import ParamFactory, make_token_mixer
from jaxmoe.layers.specs import param_specs, params_by_path
from jaxmoe.mesh import batch_axes, named
from tests.support.meshes import mesh_id, mesh_of

pytestmark = pytest.mark.covering(most=3)

D, B, S = 12, 4, 9

# Two groups: ranks share one where tp is 4. Every size differs from the others.
CONFIGS = {
    "mamba": MambaConfig(num_channels=24, state_size=5, dt_rank=7, conv_kernel_size=3, bias=True),
    "mamba2": Mamba2Config(num_heads=8, head_dim=3, num_groups=2, state_size=5, conv_kernel_size=4, bias=True),
    "without biases": Mamba2Config(
        num_heads=4, head_dim=6, num_groups=1, state_size=5, conv_kernel_size=2, conv_bias=False
    ),
}


def make_layer(mesh, config: TokenMixerConfig):
    """A layer with the same values on every mesh, as a checkpoint gives them."""
    layer = make_token_mixer(config, D, 1e-6, param=ParamFactory(mesh, jnp.float32, nnx.Rngs(0)))
    specs = {spec.path: spec for spec in param_specs(layer)}
    for i, (path, param) in enumerate(params_by_path(layer).items()):
        spec = specs[path]
        rows, groups = spec.rows or (0,), spec.source_groups or 1
        shape = (spec.shape[0] // len(rows) * groups, *spec.shape[1:])
        value = np.random.default_rng(i).normal(0, 0.5, shape).astype(np.float32)
        value = np.concatenate([np.split(value, groups)[row] for row in rows])
        param.set_value(jax.device_put(value, spec.sharding))
    return layer


def empty_cache(layer):
    axes = batch_axes(layer.mesh, B)
    return jax.tree.map(
        lambda array: jax.device_put(jnp.zeros(array.shape), named(layer.mesh, axes, *array.dims)),
        layer.cache_arrays(B, S),
    )


def inputs() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(B, S, D)).astype(np.float32)


def whole_prompts(layer) -> tuple[np.ndarray, np.ndarray]:
    """Outputs for prompts of full length, and the states after them."""
    call = jax.jit(lambda x, at, cache: layer(x, at, cache, batch_axes(layer.mesh, B)))
    y_BSD, cache = call(inputs(), np.tile(np.arange(S), (B, 1)), empty_cache(layer))
    return np.asarray(y_BSD), np.asarray(cache.state)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 2)], ids=mesh_id)
@pytest.mark.parametrize("kind", CONFIGS)
def test_decoding_continues_prompts_of_different_lengths(kind, mesh_shape):
    layer = make_layer(mesh_of(*mesh_shape), CONFIGS[kind])
    batch, x_BSD = batch_axes(layer.mesh, B), inputs()
    whole, state = whole_prompts(layer)
    # The padding of shorter prompts must leave no trace.
    lengths = np.array([1, 6, 3, 5])
    padded = np.where(np.arange(S)[None, :, None] < lengths[:, None, None], x_BSD, 7.0)
    positions = np.minimum(np.arange(S), lengths[:, None] - 1)
    prompt = jax.jit(lambda x, at, cache: layer(x, at, cache, batch))
    step = jax.jit(lambda x, at, cache: layer(x, at, cache, batch, decode=True))
    y_BSD, cache = prompt(padded.astype(np.float32), positions, empty_cache(layer))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(y_BSD[row, :length], whole[row, :length], rtol=2e-4, atol=2e-5)
    rows = np.arange(B)
    for i in range(S - 1):
        # A row at its end takes its last token again; only the one that ends last is compared there.
        at = np.minimum(lengths + i, S - 1)
        y_B1D, cache = step(x_BSD[rows, at][:, None], at[:, None], cache)
        going_on = lengths + i < S
        np.testing.assert_allclose(np.asarray(y_B1D)[going_on, 0], whole[rows, at][going_on], rtol=2e-4, atol=2e-5)
        for row in np.flatnonzero(lengths + i == S - 1):
            np.testing.assert_allclose(np.asarray(cache.state)[row], state[row], rtol=2e-4, atol=2e-5)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "tp"), [("mamba", 8), ("mamba2", 2), ("mamba2", 4), ("without biases", 4)])
def test_every_tp_gives_the_same(kind, tp):
    alone, split = make_layer(mesh_of(1, 1, 1), CONFIGS[kind]), make_layer(mesh_of(1, tp, 1), CONFIGS[kind])
    for one, other in zip(whole_prompts(alone), whole_prompts(split), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-4, atol=2e-5)
    (array,) = (array for array in jax.tree.leaves(split.cache_arrays(B, S)) if array.dtype == "float32")
    state = jax.tree.leaves(empty_cache(split))[-1]
    assert state.sharding.shard_shape(state.shape)[1] == array.shape[1] // tp


@pytest.mark.full
def test_steps_are_at_least_the_smallest():
    """With one far above what softplus gives, every decay is the same."""
    config = Mamba2Config(num_heads=2, head_dim=3, num_groups=1, state_size=5, conv_kernel_size=2, min_step=50.0)
    layer = make_layer(mesh_of(1, 1, 1), config)
    layer.a_log.set_value(jnp.zeros(2))
    _, state = whole_prompts(layer)
    x_BSD = inputs()
    x_BSD[:, : S - 2] = 0  # the last token's convolution sees the one before it; nothing older is left after e^-50
    call = nnx.jit(lambda layer, *inputs: layer(*inputs, batch_axes(layer.mesh, B)))
    _, cache = call(layer, x_BSD, np.tile(np.arange(S), (B, 1)), empty_cache(layer))
    np.testing.assert_allclose(cache.state, state, rtol=1e-5, atol=1e-6)


def test_what_does_not_split_over_tp():
    assert CONFIGS["mamba"].tp_faults(5) == ["the Mamba width 24"]
    assert CONFIGS["mamba2"].tp_faults(3) == ["mamba_num_heads=8", "the Mamba groups 2 (neither divides the other)"]
    assert CONFIGS["mamba2"].tp_faults(8) == []


def test_groups_have_equally_many_heads():
    with pytest.raises(ValueError, match=r"num_heads=8 is no multiple of num_groups=3"):
        Mamba2Config(num_heads=8, head_dim=3, num_groups=3, state_size=5, conv_kernel_size=4)

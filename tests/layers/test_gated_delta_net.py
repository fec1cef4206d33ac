"""The gated delta net as a layer: what it keeps, padding, the two forms of its projections, and its heads over tp."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import GatedDeltaNetConfig
from jaxmoe.layers import ParamFactory, params_by_path
from jaxmoe.layers.gated_delta_net import GatedDeltaNet
from jaxmoe.layers.recurrent import RecurrentCache
from jaxmoe.mesh import named
from jaxmoe.models.padding import prompt_positions
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering

D, BATCH = 12, ("dp", "ep")
CONFIG = GatedDeltaNetConfig(
    num_key_heads=2, num_value_heads=6, key_head_dim=4, value_head_dim=5, conv_kernel_size=4, fused_projections=False
)


def make_layer(mesh, config=CONFIG, dtype=jnp.float32):
    return GatedDeltaNet(config, D, 1e-6, param=ParamFactory(mesh, dtype, nnx.Rngs(0)))


def empty_cache(layer, mesh, rows):
    arrays = layer.cache_arrays(rows, 1000)
    return jax.tree.map(
        lambda one: jax.device_put(jnp.zeros(one.shape, one.dtype or jnp.float32), named(mesh, BATCH, *one.dims)),
        arrays,
    )


def prefill(layer, mesh, x_BSD, lengths):
    positions_BS, _ = prompt_positions(jnp.asarray(lengths), x_BSD.shape[1])
    return call(layer, jnp.asarray(x_BSD, jnp.float32), positions_BS, empty_cache(layer, mesh, len(x_BSD)))


@partial(nnx.jit, static_argnames="decode")
def call(layer, x_BSD, positions_BS, cache, decode=False):
    return layer(x_BSD, positions_BS, cache, BATCH, decode=decode)


def draw(rows, length):
    return np.random.default_rng(rows * length).normal(size=(rows, length, D)).astype(np.float32)


@pytest.mark.full
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_decode_after_prefill_is_one_long_prefill(shape):
    """Prompts of all lengths in one batch, some shorter than the convolution; padding changes nothing."""
    mesh = mesh_of(*shape)
    layer = make_layer(mesh)
    lengths, new = np.array([1, 2, 2, 70]), 2
    x = draw(len(lengths), 70 + new)
    # Each row with no padding at all, the same in every row of a batch.
    alone = [
        prefill(layer, mesh, x[i : i + 1, : length + new].repeat(len(lengths), 0), [length + new] * len(lengths))
        for i, length in enumerate(lengths)
    ]
    expected = [np.asarray(y)[0] for y, _ in alone]

    padded = np.where(np.arange(70)[:, None] < lengths[:, None, None], x[:, :70], 1e3)
    y, cache = prefill(layer, mesh, padded, lengths)
    for row, whole, length in zip(np.asarray(y), expected, lengths, strict=True):
        np.testing.assert_allclose(row[:length], whole[:length], rtol=1e-4, atol=1e-5)
    for step in range(new):
        position_B1 = jnp.asarray(lengths + step)[:, None]
        token_B1D = jnp.take_along_axis(jnp.asarray(x), position_B1[..., None], axis=1)
        y, cache = call(layer, token_B1D, position_B1, cache, decode=True)
        for row, whole, length in zip(np.asarray(y), expected, lengths, strict=True):
            np.testing.assert_allclose(row[0], whole[length + step], rtol=1e-4, atol=1e-5)
    for i, (_, after) in enumerate(alone):
        np.testing.assert_allclose(cache.state[i], after.state[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(cache.conv[i], after.conv[0], rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_cache_has_the_layers_own_dtypes_and_shardings():
    mesh = mesh_of(2, 2, 2)
    layer = make_layer(mesh, dtype=jnp.bfloat16)
    arrays = layer.cache_arrays(4, 1000)
    assert arrays.state.dtype == "float32"
    assert arrays.conv.dtype is None
    assert arrays.state.shape == (4, 6, 4, 5)
    assert arrays.conv.shape == (4, 3, 2 * 8 + 30)
    empty = empty_cache(layer, mesh, 4)
    cache = RecurrentCache(empty.conv.astype(jnp.bfloat16), empty.state)
    positions_BS, _ = prompt_positions(jnp.array([5, 1, 3, 0]), 5)
    y, cache = call(layer, jnp.asarray(draw(4, 5), jnp.bfloat16), positions_BS, cache)
    assert (y.dtype, cache.conv.dtype, cache.state.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert cache.state.sharding.is_equivalent_to(named(mesh, BATCH, "tp"), 4)
    assert cache.conv.sharding.is_equivalent_to(named(mesh, BATCH, None, "tp"), 3)


@pytest.mark.full
def test_fused_projections_are_the_same_layer():
    """Rows of a key head and of its value heads together: [q | k | v | z] and [b | a] of one head after the other."""
    mesh = mesh_of(2, 2, 2)
    layer = make_layer(mesh)
    fused = make_layer(mesh, GatedDeltaNetConfig(**{**vars(CONFIG), "fused_projections": True}))
    theirs = {path: np.asarray(param[...]) for path, param in params_by_path(layer).items()}

    def by_key_head(*parts):
        return np.concatenate([theirs[f"w_in_{part}"].reshape(2, -1, D) for part in parts], axis=1).reshape(-1, D)

    theirs |= {"w_in_qkvz": by_key_head(*"qkvz"), "w_in_ba": by_key_head(*"ba")}
    for path, param in params_by_path(fused).items():
        param.set_value(jax.device_put(theirs[path], param[...].sharding))
    x = draw(4, 9)
    expected, found = (prefill(one, mesh, x, [9, 4, 2, 1])[0] for one in (layer, fused))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_every_tp_rank_has_whole_heads():
    layers = [make_layer(mesh) for mesh in (mesh_of(1, 1, 1), mesh_of(1, 2, 1))]
    one, two = (params_by_path(layer) for layer in layers)
    for path, param in two.items():
        param.set_value(jax.device_put(np.asarray(one[path][...]), param[...].sharding))
        halves = 1 if path == "out_norm" else 2
        assert param[...].addressable_shards[0].data.size * halves == one[path][...].size, path
    x = draw(4, 9)
    expected, found = (prefill(layer, layer.mesh, x, [9, 4, 2, 1])[0] for layer in layers)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_a_config_refuses():
    with pytest.raises(ValueError, match=r"num_value_heads=3 is no multiple of num_key_heads=2"):
        GatedDeltaNetConfig(num_key_heads=2, num_value_heads=3, key_head_dim=4, value_head_dim=4, conv_kernel_size=4)
    with pytest.raises(ValueError, match=r"key_head_dim is an integer of at least 1; got 0"):
        GatedDeltaNetConfig(num_key_heads=2, num_value_heads=2, key_head_dim=0, value_head_dim=4, conv_kernel_size=4)
    assert [CONFIG.tp_faults(tp) for tp in (1, 2, 3)] == [[], [], ["linear_num_key_heads=2"]]

"""Latent attention: its two ways of computing agree, and its cache is the latents alone."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxmoe.config import DecoderConfig, LayerConfig, MLAConfig, MLPConfig
from jaxmoe.layers import ParamFactory
from jaxmoe.layers.mla import LatentAttention, LatentCache, attend_absorbed, attend_expanded
from jaxmoe.mesh import batch_axes, named
from jaxmoe.models import Decoder
from jaxmoe.rotary import RopeConfig
from tests.support.meshes import mesh_id, mesh_of
from tests.support.runs import examples

pytestmark = pytest.mark.covering(most=3)

D, H, L, N, R, V = 32, 8, 12, 10, 4, 6


def mla_config(**changes: Any) -> MLAConfig:
    """Sizes that differ from each other, so that no dim can stand for another."""
    rope = RopeConfig(frequencies=(0.5, 0.01), interleaved=True)
    sizes = {"num_heads": H, "kv_rank": L, "q_rank": 20, "nope_head_dim": N, "v_head_dim": V}
    return MLAConfig(**{**sizes, "rope": rope, "scale": 0.3, "bias": True, **changes})


def expected(q_nope, q_rope, cache: LatentCache, w_kv, positions, scale: float) -> np.ndarray:
    """One head of one token after the other, in float64."""
    B, S, heads, n = q_nope.shape
    out = np.zeros((B, S, heads, w_kv.shape[1] - n))
    for b, s, head in np.ndindex(B, S, heads):
        seen = slice(0, positions[b, s] + 1)
        keys = cache.latent[b, seen] @ w_kv[head, :n].T
        scores = keys @ q_nope[b, s, head] + cache.rope_key[b, seen] @ q_rope[b, s, head]
        weights = np.exp(scale * (scores - scores.max()))
        out[b, s, head] = weights / weights.sum() @ (cache.latent[b, seen] @ w_kv[head, n:].T)
    return out


@settings(max_examples=examples(2, 8))
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 8),
    seed=st.integers(0, 99),
)
@example(sizes=(2, 520, 1, 523, 3, 2, 4, 5), seed=0)  # more queries than are taken at a time
def test_absorbed_is_expanded_attention(sizes, seed):
    B, S, heads, C, latent, n, r, v = sizes
    rng = np.random.default_rng(seed)
    q_nope, q_rope = rng.normal(size=(B, S, heads, n)), rng.normal(size=(B, S, heads, r))
    cache = LatentCache(rng.normal(size=(B, C, latent)), rng.normal(size=(B, C, r)))
    w_kv, positions = rng.normal(size=(heads, n + v, latent)), rng.integers(0, C, (B, S))
    wanted = expected(q_nope, q_rope, cache, w_kv, positions, 0.4)
    arrays = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), (q_nope, q_rope, cache, w_kv))
    for attend in (attend_expanded, attend_absorbed):
        found = jax.jit(partial(attend, scale=0.4))(*arrays, jnp.asarray(positions, jnp.int32))
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


def make_layer(mesh, config: MLAConfig) -> LatentAttention:
    """A layer whose norms and biases matter too."""
    layer = LatentAttention(config, D, 1e-6, param=ParamFactory(mesh, jnp.float32, nnx.Rngs(0)))
    for i, param in enumerate(jax.tree.leaves(nnx.state(layer), is_leaf=lambda leaf: isinstance(leaf, nnx.Param))):
        if param[...].ndim == 1:
            noise = np.random.default_rng(i).normal(1, 0.3, param[...].shape)
            param.set_value(jax.device_put(noise.astype(np.float32), param[...].sharding))
    return layer


def empty_cache(layer: LatentAttention, B: int, C: int) -> LatentCache:
    mesh, axes = layer.mesh, batch_axes(layer.mesh, B)
    return jax.tree.map(
        lambda array: jax.device_put(jnp.zeros(array.shape), named(mesh, axes, *array.dims)), layer.cache_arrays(B, C)
    )


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("q_rank", [20, None])
@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 2)], ids=mesh_id)
def test_decoding_continues_prompts_of_different_lengths(mesh_shape, q_rank):
    mesh = mesh_of(*mesh_shape)
    layer = make_layer(mesh, mla_config(q_rank=q_rank))
    B, S, C = 4, 9, 12
    batch = batch_axes(mesh, B)
    x_BSD = np.random.default_rng(1).normal(size=(B, S, D)).astype(np.float32)
    prompt = jax.jit(lambda x, at, cache: layer(x, at, cache, batch))
    step = jax.jit(lambda x, at, cache: layer(x, at, cache, batch, decode=True))
    whole, _ = prompt(x_BSD, np.tile(np.arange(S), (B, 1)), empty_cache(layer, B, C))
    # Rows go on after prompts of their own lengths, whose padding must leave no trace.
    lengths = np.array([1, 6, 3, 5])
    padded = np.where(np.arange(S)[None, :, None] < lengths[:, None, None], x_BSD, 7.0)
    positions = np.minimum(np.arange(S), lengths[:, None] - 1)
    _, cache = prompt(padded.astype(np.float32), positions, empty_cache(layer, B, C))
    for i in range(3):
        at = lengths + i
        y_B1D, cache = step(x_BSD[np.arange(B), at][:, None], at[:, None], cache)
        np.testing.assert_allclose(y_B1D[:, 0], np.asarray(whole)[np.arange(B), at], rtol=2e-4, atol=2e-5)


@pytest.mark.full
def test_the_cache_is_the_latents_alone_on_every_tp_rank(mesh):
    layer = LayerConfig(attention=mla_config(), feed_forward=MLPConfig(hidden_size=D, intermediate_size=16))
    config = DecoderConfig(
        model_type="any",
        vocab_size=16,
        hidden_size=D,
        layers=(layer,) * 2,
        norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    model = Decoder(config, mesh=mesh, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    B, C = 8, 24
    cache = model.init_cache(B, C)
    batch = batch_axes(mesh, B)
    ways = math.prod(mesh.shape[axis] for axis in batch)
    assert ways == mesh.shape["dp"] * mesh.shape["ep"]
    per_device = dict.fromkeys(mesh.device_ids.ravel().tolist(), 0)
    for array in jax.tree.leaves(cache):
        assert array.sharding.is_equivalent_to(named(mesh, batch), array.ndim)
        for shard in array.addressable_shards:
            per_device[shard.device.id] += shard.data.nbytes
    # bfloat16; no factor of heads anywhere.
    assert set(per_device.values()) == {2 * (B // ways) * C * (L + R) * 2}
    written = jax.eval_shape(model.prefill, jnp.ones((B, 16), jnp.int32), jnp.full(B, 16), cache)[1]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), written) == jax.tree.map(lambda a: (a.shape, a.dtype), cache)


@pytest.mark.full
def test_decoding_makes_no_heads_keys_or_values():
    layer = make_layer(mesh_of(1, 1, 1), mla_config())
    B, C = 2, 37

    def largest(S: int, decode: bool) -> int:
        """Elements of the largest array over the C positions in the compiled program."""
        call = jax.jit(lambda x, at, cache: layer(x, at, cache, ("dp", "ep"), decode=decode))
        compiled = call.lower(jnp.zeros((B, S, D)), jnp.zeros((B, S), jnp.int32), empty_cache(layer, B, C)).compile()
        shapes = [list(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())]
        return max(math.prod(shape) for shape in shapes if C in shape)

    assert largest(1, decode=True) == B * C * max(L, H)
    assert largest(C, decode=False) >= B * C * H * (N + R)


def test_heads_that_do_not_split_over_tp():
    assert mla_config(num_heads=6).tp_faults(4) == ["num_attention_heads=6"]
    assert mla_config(num_heads=6).tp_faults(3) == []


@pytest.mark.parametrize("name", ["num_heads", "kv_rank", "q_rank", "nope_head_dim", "v_head_dim"])
def test_sizes_are_integers(name):
    with pytest.raises(ValueError, match=rf"MLAConfig\.{name} is an integer of at least 1; got 0"):
        mla_config(**{name: 0})


def test_weights_lie_by_heads_or_whole():
    layer = make_layer(mesh_of(1, 8, 1), mla_config())
    specs = {name: param[...].sharding.spec for name, param in vars(layer).items() if isinstance(param, nnx.Param)}
    by_heads = {"w_q_b": P("tp", None), "w_kv_b": P("tp", None), "w_o": P(None, "tp")}
    assert {name: spec for name, spec in specs.items() if "tp" in tuple(spec)} == by_heads

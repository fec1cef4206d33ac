"""Attention to a window and compressed entries: rings, entries against a loop, and decoding that continues prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmoe.config import CompressedAttentionConfig, CompressionConfig, IndexerConfig
from jaxmoe.layers import ParamFactory
from jaxmoe.layers.compressed_attention import CompressedAttention, CompressedCache
from jaxmoe.layers.compressor import Compressor, CompressorWeights
from jaxmoe.layers.ring import ring_of_prompt, ring_positions, ring_slice, write_ring
from jaxmoe.mesh import batch_axes, named
from jaxmoe.rotary import RopeConfig
from jaxmoe.rotary.apply import apply_rope, rotate_tail, turn_back_tail
from tests.support.meshes import mesh_id, mesh_of

pytestmark = pytest.mark.covering

B, S, D, TOPK = 4, 19, 24, 2
ROPE = RopeConfig(frequencies=(0.5, 0.01), interleaved=True)
# Every kind of layer: a window alone, entries of all that is before, and chosen entries with an overlap.
KINDS = {
    "window": None,
    "heavy": CompressionConfig(rate=5, overlap=False),
    "sparse": CompressionConfig(
        rate=3, overlap=True, indexer=IndexerConfig(num_heads=9, head_dim=10, topk=TOPK, rope=ROPE)
    ),
}


def layer_of(mesh, kind: str) -> CompressedAttention:
    """A layer whose norms, biases and sinks matter too."""
    config = CompressedAttentionConfig(
        num_heads=8,
        head_dim=12,
        q_rank=7,
        output_groups=4,
        output_rank=3,
        window=4,
        rope=ROPE,
        compression=KINDS[kind],
    )
    layer = CompressedAttention(config, D, 1e-6, param=ParamFactory(mesh, jnp.float32, nnx.Rngs(0)))
    for i, param in enumerate(jax.tree.leaves(nnx.state(layer), is_leaf=lambda leaf: isinstance(leaf, nnx.Param))):
        noise = np.random.default_rng(i).normal(0, 0.3, param[...].shape).astype(np.float32)
        param.set_value(jax.device_put(np.asarray(param[...]) + noise, param[...].sharding))
    return layer


def empty_cache(layer: CompressedAttention, length: int) -> CompressedCache:
    axes = batch_axes(layer.mesh, B)
    # What is not written yet may be anything finite.
    return jax.tree.map(
        lambda array: jax.device_put(jnp.full(array.shape, 9.0), named(layer.mesh, axes, *array.dims)),
        layer.cache_arrays(B, length),
    )


def test_a_ring_holds_the_last_tokens():
    x_BSA = np.arange(2 * 9, dtype=np.float32).reshape(2, 9, 1)
    lengths = jnp.array([9, 2])
    ring = ring_of_prompt(jnp.asarray(x_BSA), lengths, 4)
    np.testing.assert_array_equal(ring_positions(lengths - 1, 4), [[8, 5, 6, 7], [0, 1, -2, -1]])
    np.testing.assert_array_equal(ring[0, :, 0], [8, 5, 6, 7])
    np.testing.assert_array_equal(ring[1, :2, 0], [9, 10])
    ring = write_ring(ring, jnp.full((2, 1, 1), -1.0), lengths)
    np.testing.assert_array_equal(ring[0, :, 0], [8, -1, 6, 7])
    np.testing.assert_array_equal(ring[1, :3, 0], [9, 10, -1])
    np.testing.assert_array_equal(ring_slice(ring, jnp.array([7, 1]), 2)[..., 0], [[7, 8], [10, -1]])


def test_trailing_dims_are_rotated_and_turned_back():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 7)).astype(np.float32)
    at = jnp.arange(6).reshape(2, 3)
    turned = rotate_tail(jnp.asarray(x), at, ROPE)
    np.testing.assert_array_equal(turned[..., :3], x[..., :3])
    np.testing.assert_allclose(turned[..., 3:], apply_rope(jnp.asarray(x[..., 3:]), at, ROPE))
    np.testing.assert_allclose(turn_back_tail(turned, at, ROPE), x, atol=1e-6)


@pytest.mark.parametrize("kind", ["heavy", "sparse"])
def test_entries_are_a_loop_over_runs(kind):
    config = KINDS[kind]
    h, length, rate = 6, 11, config.rate
    compressor = Compressor(config, h, ROPE, 1e-6)
    rng = np.random.default_rng(2)
    A = compressor.projected
    w = CompressorWeights(*(rng.normal(size=shape) for shape in ((A, D), (A, D), (rate, A), (h,))))
    x = rng.normal(size=(2, length, D))
    arrays = jax.tree.map(jnp.float32, w)
    found, _ = compressor.of_prompt(arrays, jnp.float32(x), jnp.full(2, length), None)
    assert found.shape == (2, -(-length // rate), h)
    kv, gate = x @ w.w_kv.T, x @ w.w_gate.T
    for b, run in np.ndindex(2, length // rate):
        here = slice(run * rate, (run + 1) * rate)
        values, gates = kv[b, here, -h:], (gate[b, here] + w.bias)[:, -h:]
        if config.overlap and run:
            before = slice((run - 1) * rate, run * rate)
            values = np.concatenate([kv[b, before, :h], values])
            gates = np.concatenate([(gate[b, before] + w.bias)[:, :h], gates])
        shares = np.exp(gates) / np.exp(gates).sum(0)
        entry = (values * shares).sum(0)
        entry = jnp.float32(w.norm * entry / np.sqrt((entry**2).mean() + 1e-6))
        expected = rotate_tail(entry[None, None, None], jnp.array([[run * rate]]), ROPE)[0, 0, 0]
        np.testing.assert_allclose(found[b, run], expected, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(
        compressor.last_entry(jnp.array([[0, rate - 2, rate - 1, 2 * rate]])), [[-1, -1, 0, 1]]
    )


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 2)], ids=mesh_id)
def test_decoding_continues_prompts_of_different_lengths(mesh_shape, kind):
    mesh = mesh_of(*mesh_shape)
    layer = layer_of(mesh, kind)
    batch = batch_axes(mesh, B)
    x_BSD = np.random.default_rng(1).normal(size=(B, S, D)).astype(np.float32)
    prompt = jax.jit(lambda x, at, cache: layer(x, at, cache, batch))
    step = jax.jit(lambda x, at, cache: layer(x, at, cache, batch, decode=True))
    whole, _ = prompt(x_BSD, np.tile(np.arange(S), (B, 1)), None)
    lengths = np.array([1, 11, 3, 6])
    padded = np.where(np.arange(S)[None, :, None] < lengths[:, None, None], x_BSD, 7.0)
    positions = np.minimum(np.arange(S), lengths[:, None] - 1)
    _, cache = prompt(padded.astype(np.float32), positions, empty_cache(layer, S))
    for i in range(8):
        at = lengths + i
        y_B1D, cache = step(x_BSD[np.arange(B), at][:, None], at[:, None], cache)
        np.testing.assert_allclose(y_B1D[:, 0], np.asarray(whole)[np.arange(B), at], rtol=2e-4, atol=2e-5)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_sees_its_window_and_runs_that_have_ended(kind):
    """A change of one token reaches no token before it, and beyond the window only those after the end of its run."""
    layer = layer_of(mesh_of(1, 1, 1), kind)
    call = jax.jit(lambda x: layer(x, jnp.arange(S)[None], None, ("dp",))[0])
    x_1SD = np.random.default_rng(3).normal(size=(1, S, D)).astype(np.float32)
    changed = x_1SD.copy()
    changed[0, 7] += 1
    moved = np.abs(np.asarray(call(changed) - call(x_1SD)))[0].max(-1) > 1e-6
    assert moved[7:11].all()
    if kind == "window":
        assert moved.sum() == 4
    elif kind == "heavy":
        assert moved[11:].all()  # the run of 5 to 9 has ended
    assert not moved[:7].any()


@pytest.mark.full
def test_the_cache_is_a_window_and_entries_on_every_tp_rank():
    layer = layer_of(mesh_of(1, 2, 4), "sparse")
    cache = layer.cache_arrays(8, 100)
    assert (cache.window.shape, cache.window.spec(("dp",))) == ((8, 4, 12), P(("dp",)))
    assert (cache.entries.entries.shape, cache.entries.kv.shape) == ((8, 34, 12), (8, 6, 24))
    assert (cache.scored.entries.shape, cache.scored.gate.shape) == ((8, 34, 10), (8, 6, 20))
    assert layer_of(mesh_of(1, 1, 1), "window").cache_arrays(8, 100).entries is None
    assert layer.config.tp_faults(8) == ["o_groups=4"]


@pytest.mark.parametrize("changes", [{"rope": None}, {"pool_size": 2}], ids=str)
def test_an_indexer_of_entries_rotates_and_has_no_pools(changes):
    indexer = IndexerConfig(**{"num_heads": 9, "head_dim": 10, "topk": TOPK, "rope": ROPE, **changes})
    with pytest.raises(ValueError, match="rotates its keys and chooses entries one by one"):
        CompressionConfig(rate=3, overlap=True, indexer=indexer)

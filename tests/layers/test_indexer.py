"""The indexer: its scores against a loop, its choice with equal scores, and attention to what it chose."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import IndexerConfig, MLAConfig
from jaxmoe.layers import ParamFactory
from jaxmoe.layers.indexer import IndexerQueries, choose_for_prompt, choose_for_token, index_scores, largest
from jaxmoe.layers.mla import LatentAttention, LatentCache
from jaxmoe.mesh import batch_axes, named
from jaxmoe.rotary import RopeConfig
from tests.support.meshes import mesh_id, mesh_of

pytestmark = pytest.mark.covering

B, S, D, TOPK = 4, 13, 32, 4


def config_of(*, topk: int = TOPK, reuses: bool = False) -> MLAConfig:
    """Sizes that differ from each other, so that no dim can stand for another."""
    rope = RopeConfig(frequencies=(0.5, 0.01), interleaved=True)
    halves = RopeConfig(frequencies=(0.5, 0.01))
    return MLAConfig(
        num_heads=8,
        kv_rank=12,
        q_rank=20,
        nope_head_dim=10,
        v_head_dim=6,
        rope=rope,
        scale=0.3,
        indexer=IndexerConfig(num_heads=9, head_dim=14, topk=topk, rope=halves, reuses=reuses),
    )


def layer_of(mesh, config: MLAConfig) -> LatentAttention:
    return LatentAttention(config, D, 1e-6, param=ParamFactory(mesh, jnp.float32, nnx.Rngs(0)))


def empty_cache(layer: LatentAttention, length: int) -> LatentCache:
    axes = batch_axes(layer.mesh, B)
    return jax.tree.map(
        lambda array: jax.device_put(jnp.zeros(array.shape), named(layer.mesh, axes, *array.dims)),
        layer.cache_arrays(B, length),
    )


def test_scores_are_a_loop_over_heads_and_positions():
    rng = np.random.default_rng(0)
    q, heads, k = rng.normal(size=(2, 5, 3, 6)), rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 7, 6))
    positions = np.array([[0, 1, 2, 3, 6], [4, 0, 6, 2, 2]])
    found = index_scores(IndexerQueries(jnp.float32(q), jnp.float32(heads)), jnp.float32(k), jnp.asarray(positions))
    for b, s, c in np.ndindex(2, 5, 7):
        score = sum(heads[b, s, i] * max(0.0, q[b, s, i] @ k[b, c] / np.sqrt(6)) for i in range(3))
        expected = score if c <= positions[b, s] else -np.inf
        np.testing.assert_allclose(found[b, s, c], expected, rtol=1e-5, atol=1e-6)


def test_of_equal_scores_the_first_are_chosen():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (50, 2, 9)).astype(np.float32)
    scores[:, 1, 5:] = -np.inf
    for count in (1, 4, 7, 9):
        mask = np.asarray(largest(jnp.asarray(scores), count))
        order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
        expected = np.zeros(scores.shape, bool)
        np.put_along_axis(expected, order, True, axis=-1)
        np.testing.assert_array_equal(mask, expected)


def test_a_prompt_and_a_token_choose_alike():
    """Also where there are more queries than are taken at a time."""
    rng = np.random.default_rng(1)
    length = 600
    q, heads, k = rng.normal(size=(1, length, 2, 4)), rng.normal(size=(1, length, 2)), rng.normal(size=(1, length, 4))
    queries = IndexerQueries(jnp.float32(q), jnp.float32(heads))
    masks = choose_for_prompt(queries, jnp.float32(k), jnp.arange(length)[None], TOPK)
    assert masks.shape == (1, length, length)
    for t in (0, 2, TOPK, 300, 511, 512, 599):
        one = IndexerQueries(queries.q[:, t : t + 1], queries.heads[:, t : t + 1])
        chosen = np.asarray(choose_for_token(one, jnp.float32(k), jnp.full((1, 1), t), TOPK))[0, 0]
        seen = np.flatnonzero(np.asarray(masks)[0, t])
        assert {c for c in chosen if c <= t} == {c for c in seen if c <= t}
        assert sum(chosen <= t) == min(t + 1, TOPK)


@pytest.mark.full
@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 2)], ids=mesh_id)
def test_decoding_continues_prompts_on_both_sides_of_the_limit(mesh_shape):
    mesh = mesh_of(*mesh_shape)
    layer = layer_of(mesh, config_of())
    batch = batch_axes(mesh, B)
    x_BSD = np.random.default_rng(1).normal(size=(B, S, D)).astype(np.float32)
    prompt = jax.jit(lambda x, at, cache: layer(x, at, cache, batch))
    step = jax.jit(lambda x, at, cache: layer(x, at, cache, batch, decode=True))
    whole, _, _ = prompt(x_BSD, np.tile(np.arange(S), (B, 1)), empty_cache(layer, S))
    lengths = np.array([1, 9, TOPK - 1, TOPK])
    padded = np.where(np.arange(S)[None, :, None] < lengths[:, None, None], x_BSD, 7.0)
    positions = np.minimum(np.arange(S), lengths[:, None] - 1)
    _, cache, _ = prompt(padded.astype(np.float32), positions, empty_cache(layer, S))
    assert cache.index_key.shape == (B, S, 14)
    for i in range(4):
        at = lengths + i
        y_B1D, cache, chosen = step(x_BSD[np.arange(B), at][:, None], at[:, None], cache)
        assert chosen.shape == (B, 1, TOPK)
        np.testing.assert_allclose(y_B1D[:, 0], np.asarray(whole)[np.arange(B), at], rtol=2e-4, atol=2e-5)


def test_a_layer_attends_to_chosen_positions_alone():
    """What is not chosen may be anything; up to the limit all are, and nothing is scored."""
    mesh = mesh_of(1, 1, 1)
    layer = layer_of(mesh, config_of())
    call = jax.jit(partial(layer, batch=("dp",)))
    x_BSD = np.random.default_rng(2).normal(size=(B, S, D)).astype(np.float32)
    positions = np.tile(np.arange(S), (B, 1))
    y_BSD, _, chosen = call(x_BSD, positions, None)
    assert (np.asarray(chosen).sum(-1) == TOPK).all()
    reusing = layer_of(mesh, config_of(reuses=True))
    nnx.update(reusing, {name: value for name, value in nnx.state(layer).items() if "index" not in name})
    # With the choice of another layer, and no indexer of its own.
    again, _, same = jax.jit(partial(reusing, batch=("dp",)))(x_BSD, positions, None, chosen=chosen)
    np.testing.assert_array_equal(same, chosen)
    np.testing.assert_allclose(again, y_BSD, rtol=1e-5, atol=1e-6)
    everything, _, none = call(x_BSD[:, :TOPK], positions[:, :TOPK], None)
    assert none is None
    assert "top_k" not in str(jax.make_jaxpr(call)(x_BSD[:, :TOPK], positions[:, :TOPK], None))
    dense, _, _ = jax.jit(partial(reusing, batch=("dp",)))(x_BSD, positions, None)
    np.testing.assert_allclose(everything, dense[:, :TOPK], rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(dense - y_BSD))[:, TOPK:].max() > 0.01


def test_a_layer_that_reuses_a_choice_has_no_indexer():
    layer = layer_of(mesh_of(1, 1, 1), config_of(reuses=True))
    assert not [name for name, value in vars(layer).items() if "index" in name and value is not None]
    assert layer.cache_arrays(1, 8).index_key is None

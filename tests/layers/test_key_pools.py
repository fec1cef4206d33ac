"""Pools of positions that an indexer chooses by one key each, against loops, step by step, and on several tp ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import IndexerConfig, MLAConfig
from jaxmoe.layers import ParamFactory
from jaxmoe.layers.indexer import IndexerQueries
from jaxmoe.layers.key_pools import choose_pools_for_prompt, choose_pools_for_token, pool_keys
from jaxmoe.layers.mla import LatentAttention
from jaxmoe.rotary import RopeConfig
from tests.support.layers import fill
from tests.support.meshes import mesh_of

B, C, HEADS, WIDTH, D = 2, 11, 12, 4, 8
INDEXER = {"num_heads": HEADS, "head_dim": 6, "rope": None, "pool_size": 3}


def test_the_key_of_a_pool_is_the_sum_of_its_keys_by_their_gates():
    rng = np.random.default_rng(0)
    packed, bias = rng.normal(size=(B, C, 2 * WIDTH)), rng.normal(size=(3, WIDTH))
    found = pool_keys(jnp.float32(packed), jnp.float32(bias))
    assert found.shape == (B, C // 3, WIDTH)
    for b, pool, i in np.ndindex(*found.shape):
        keys, gates = packed[b, pool * 3 : pool * 3 + 3, i], packed[b, pool * 3 : pool * 3 + 3, WIDTH + i]
        shares = np.exp(gates + bias[:, i])
        np.testing.assert_allclose(found[b, pool, i], (shares * keys).sum() / shares.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "count"), [(3, 1), (3, 2), (1, 4), (4, 2)])
def test_the_best_pools_and_the_tail_are_chosen_alike_for_a_prompt_and_for_a_token(size, count):
    rng = np.random.default_rng(0)
    q, heads = rng.normal(size=(B, C, HEADS, WIDTH)), rng.normal(size=(B, C, HEADS))
    k = rng.normal(size=(B, C // size, WIDTH))
    positions = np.stack([np.arange(C), np.arange(C)[::-1]])
    queries, k_BWh = IndexerQueries(jnp.float32(q), jnp.float32(heads)), jnp.float32(k)
    how = {"size": size, "count": count, "length": C}
    mask = choose_pools_for_prompt(queries, k_BWh, jnp.asarray(positions), **how)
    assert mask.shape == (B, C, C)
    for s in range(C):
        one = IndexerQueries(queries.q[:, s : s + 1], queries.heads[:, s : s + 1])
        at = np.asarray(choose_pools_for_token(one, k_BWh, jnp.asarray(positions[:, s : s + 1]), **how))
        assert at.shape == (B, 1, count * size + size - 1)
        for b in range(B):
            seen = positions[b, s] + 1
            whole = seen // size
            scores = np.maximum(q[b, s] @ k[b, :whole].T, 0).T @ heads[b, s]
            pools = np.argsort(-scores, kind="stable")[:count]
            expected = {pool * size + i for pool in pools for i in range(size)} | set(range(whole * size, seen))
            assert set(np.flatnonzero(mask[b, s, :seen])) == expected
            # Each once: two of a position would count twice in a softmax.
            assert sorted(index for index in at[b, 0] if index < seen) == sorted(expected)


def layer_of(tp: int, *, topk: int) -> LatentAttention:
    config = MLAConfig(
        num_heads=4,
        kv_rank=6,
        q_rank=10,
        nope_head_dim=5,
        v_head_dim=3,
        rope=None,
        shared_key_dim=0,
        scale=0.4,
        indexer=IndexerConfig(**INDEXER, topk=topk),
    )
    layer = LatentAttention(config, D, 1e-6, param=ParamFactory(mesh_of(1, tp, 1), jnp.float32, None))
    fill(layer)
    return layer


def run(tp: int, *, topk: int = 3, steps: int = 0, room: int = 1) -> np.ndarray:
    """Outputs of one prompt, the last `steps` of its tokens one by one from the cache, which has room for some more."""
    layer = layer_of(tp, topk=topk)
    x = np.random.default_rng(3).normal(size=(1, C, D)).astype(np.float32)
    cache = jax.tree.map(lambda array: jnp.zeros(array.shape), layer.cache_arrays(1, C + room))
    prompt = jax.jit(lambda x, cache: layer(x, np.arange(x.shape[1])[None], cache, ()))
    y, cache, _ = prompt(x[:, : C - steps], cache)
    outputs = [y]
    step = jax.jit(lambda x, at, cache: layer(x, at, cache, (), decode=True))
    for at in range(C - steps, C):
        y, cache, chosen = step(x[:, at : at + 1], jnp.full((1, 1), at, jnp.int32), cache)
        assert chosen is None or chosen.shape == (1, 1, topk + 2)
        outputs.append(y)
    return np.concatenate(outputs, axis=1)


def test_every_tp_rank_makes_the_same_choice_and_a_step_that_of_a_prompt():
    """Also in a cache whose last place is that of the last token."""
    expected = run(1)
    np.testing.assert_allclose(run(4, steps=9, room=0), expected, atol=1e-4)


def test_up_to_the_limit_all_are_seen():
    """Ten positions are three pools and a tail, all of which nine positions of pools allow; the eleventh token sees less."""
    pools, dense = run(1, topk=6), run(1, topk=12)
    np.testing.assert_allclose(pools[:, :8], dense[:, :8], atol=1e-5)
    assert np.abs(pools - dense)[:, 8:].max() > 1e-3
    np.testing.assert_allclose(run(1, topk=9), dense, atol=1e-5)


def test_chosen_positions_fill_pools():
    with pytest.raises(ValueError, match=r"fill pools of pool_size=3 .*; got topk=4"):
        IndexerConfig(**INDEXER, topk=4)
    with pytest.raises(ValueError, match="pool_size"):
        IndexerConfig(**{**INDEXER, "pool_size": 0}, topk=4)
    with pytest.raises(ValueError, match="head_dim=6"):
        IndexerConfig(**{**INDEXER, "rope": RopeConfig(frequencies=(1.0,) * 4)}, topk=3)

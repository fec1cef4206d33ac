"""Blocks of keys that an indexer chooses by their mean, against a loop, step by step, and on several tp ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import PooledBlockAttentionConfig
from jaxmoe.layers import ParamFactory
from jaxmoe.layers.pooled_blocks import PooledBlockAttention, choose_whole_blocks
from jaxmoe.rotary import RopeConfig
from tests.support.layers import fill
from tests.support.meshes import mesh_of

B, C, HEADS, WIDTH, D = 2, 11, 3, 4, 8
CONFIG = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": RopeConfig(frequencies=(1.0, 0.1))}
INDEXER = {"index_heads": 12, "index_head_dim": 6, "block_size": 3, "top_blocks": 1}


@pytest.mark.parametrize(("size", "top"), [(3, 1), (3, 2), (1, 4), (4, 9), (16, 1)])
def test_whole_blocks_are_those_with_the_best_keys(size, top):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(B, C, HEADS, WIDTH)), rng.normal(size=(B, C // size, WIDTH))
    positions = np.stack([np.arange(C), np.arange(C)[::-1]])
    found = choose_whole_blocks(
        jnp.float32(q), jnp.asarray(positions), k_Bbi=jnp.float32(k), block_size=size, top_blocks=top, count=C
    )
    assert found.shape == (B, 1, C, C)
    for b, s in np.ndindex(B, C):
        seen = positions[b, s] + 1
        whole = seen // size
        scores = np.maximum(np.float32(q[b, s]) @ np.float32(k[b, :whole]).T, 0).sum(0)
        best = sorted(range(whole), key=lambda block, scores=scores: (-scores[block], block))[:top]
        expected = {key for block in best for key in range(block * size, block * size + size)}
        assert set(np.flatnonzero(found[b, 0, s, :seen])) == expected | set(range(whole * size, seen))


def run(tp: int, *, steps: int = 0) -> np.ndarray:
    """Outputs of one prompt, the last `steps` of its tokens one by one from the cache, which has room for one more."""
    config = PooledBlockAttentionConfig(**CONFIG, **INDEXER)
    attention = PooledBlockAttention(config, D, 1e-6, param=ParamFactory(mesh_of(1, tp, 1), jnp.float32, None))
    fill(attention)
    x = np.random.default_rng(3).normal(size=(1, C, D)).astype(np.float32)
    cache = jax.tree.map(lambda array: jnp.zeros(array.shape), attention.cache_arrays(1, C + 1))
    y, cache = jax.jit(lambda x, cache: attention(x, np.arange(x.shape[1])[None], cache, ()))(x[:, : C - steps], cache)
    outputs = [y]
    step = jax.jit(lambda x, at, cache: attention(x, at, cache, (), decode=True))
    for at in range(C - steps, C):
        y, cache = step(x[:, at : at + 1], jnp.full((1, 1), at, jnp.int32), cache)
        outputs.append(y)
    return np.concatenate(outputs, axis=1)


def test_every_tp_rank_makes_the_same_choice_and_a_step_that_of_a_prompt():
    expected = run(1)
    np.testing.assert_allclose(run(4, steps=5), expected, atol=1e-4)


def test_a_head_is_as_wide_as_what_rotates():
    with pytest.raises(ValueError, match="in their first 4 dims; got index_head_dim=2"):
        PooledBlockAttentionConfig(**CONFIG, **{**INDEXER, "index_head_dim": 2})

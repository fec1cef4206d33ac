"""Blocks of keys that an indexer chooses, against a loop over tokens and heads, and on several tp ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import BlockSparseAttentionConfig
from jaxmoe.layers import ParamFactory
from jaxmoe.layers.attention import attend
from jaxmoe.layers.block_sparse import BlockSparseAttention, ChosenKeys, choose_blocks
from jaxmoe.rotary import RopeConfig
from tests.support.layers import fill
from tests.support.meshes import mesh_of

B, G, C, WIDTH = 2, 2, 11, 4
CONFIG = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": RopeConfig(frequencies=(1.0, 0.1))}
INDEXER = {"index_head_dim": 4, "block_size": 3, "top_blocks": 2, "local_blocks": 1}


def expected_keys(q: np.ndarray, k: np.ndarray, position: int, *, size: int, top: int, local: int) -> set[int]:
    """The keys that one head of one token sees, block after block."""
    seen = k[: position + 1] @ q
    best = {block: seen[block * size : (block + 1) * size].max() for block in range(position // size + 1)}
    near = [block for block in best if position // size - block < local]
    far = sorted((block for block in best if block not in near), key=lambda block: -best[block])
    chosen = [*near, *far][:top]
    return {key for block in chosen for key in range(block * size, min((block + 1) * size, len(k)))}


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(("size", "top", "local"), [(3, 2, 1), (1, 4, 0), (4, 2, 2), (3, 9, 1), (16, 1, 1)])
def test_blocks_are_those_with_the_best_keys(size, top, local):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(B, C, G, WIDTH)), rng.normal(size=(B, C, WIDTH))
    positions = np.stack([np.arange(C), np.arange(C)[::-1]])
    options = {"block_size": size, "top_blocks": top, "local_blocks": local}
    found = np.asarray(choose_blocks(jnp.float32(q), jnp.asarray(positions), k_BCi=jnp.float32(k), **options))
    assert found.shape == (B, G, C, C)
    for b, g, s in np.ndindex(B, G, C):
        keys = expected_keys(q[b, s, g], k[b], positions[b, s], size=size, top=top, local=local)
        assert set(np.flatnonzero(found[b, g, s])) == keys


@pytest.mark.full
def test_more_queries_than_are_taken_at_a_time():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.float32(rng.normal(size=shape)) for shape in ((1, 515, 1, 2), (1, 1, 515, 2), (1, 1, 515, 2)))
    index_q, index_k = (jnp.float32(rng.normal(size=shape)) for shape in ((1, 515, 1, 3), (1, 515, 3)))
    positions = jnp.arange(515)[None]
    options = {"k_BCi": index_k, "block_size": 8, "top_blocks": 3, "local_blocks": 1}
    chosen = ChosenKeys(index_q, lambda q, positions: choose_blocks(q, positions, **options))
    out = attend(q, k, v, positions, scale=1.0, chosen=chosen)
    seen = np.asarray(choose_blocks(index_q, positions, **options))[0, 0] & np.tri(515, dtype=bool)
    weights = np.where(seen, np.exp(np.float64(q[0, :, 0]) @ np.float64(k[0, 0]).T), 0)
    np.testing.assert_allclose(out[0, :, 0], weights / weights.sum(1, keepdims=True) @ np.float64(v[0, 0]), atol=2e-6)


def test_a_key_value_head_has_its_choice_on_every_rank_that_uses_it():
    config = BlockSparseAttentionConfig(**{**CONFIG, "num_kv_heads": 1}, **INDEXER)
    x, positions = np.random.default_rng(3).normal(size=(1, C, 8)).astype(np.float32), np.arange(C)[None]

    def run(tp: int) -> np.ndarray:
        attention = BlockSparseAttention(config, 8, 1e-6, param=ParamFactory(mesh_of(1, tp, 1), jnp.float32, None))
        fill(attention)
        return np.asarray(jax.jit(lambda x: attention(x, positions, None, ())[0])(x))

    np.testing.assert_allclose(run(2), run(1), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_blocks": 3}, "are among the 2 that it sees; got local_blocks=3"),
        ({"index_head_dim": 2}, "in their first 4 dims; got index_head_dim=2"),
        ({"top_blocks": 0}, "top_blocks"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        BlockSparseAttentionConfig(**CONFIG, **{**INDEXER, **changes})

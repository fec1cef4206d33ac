"""Several new tokens of a row at once: every layer that takes them gives what it gives for one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    IndexerConfig,
    KDAConfig,
    Mamba2Config,
    MambaConfig,
    MLAConfig,
    ShortConvConfig,
    SlidingWindow,
    TokenMixerConfig,
)
from jaxmoe.layers import ParamFactory, accepted, make_token_mixer
from jaxmoe.mesh import batch_axes, named
from jaxmoe.models.padding import prompt_positions
from jaxmoe.rotary import RopeConfig
from tests.support.meshes import mesh_of

D, B, PROMPT, NEW, ROOM = 32, 4, 9, 3, 16
ROPE = RopeConfig(frequencies=(0.5, 0.01))

CONFIGS: dict[str, TokenMixerConfig] = {
    "window and sinks": AttentionConfig(
        num_heads=8, num_kv_heads=2, head_dim=8, rope=ROPE, mask=SlidingWindow(size=4), sinks=True
    ),
    "indexer": MLAConfig(
        num_heads=8,
        kv_rank=12,
        q_rank=20,
        nope_head_dim=10,
        v_head_dim=6,
        rope=RopeConfig(frequencies=(0.5, 0.01), interleaved=True),
        scale=0.3,
        indexer=IndexerConfig(num_heads=3, head_dim=14, topk=4, rope=ROPE),
    ),
    "pools of keys": MLAConfig(
        num_heads=8,
        kv_rank=12,
        q_rank=20,
        nope_head_dim=10,
        v_head_dim=6,
        rope=None,
        shared_key_dim=0,
        scale=0.3,
        indexer=IndexerConfig(num_heads=12, head_dim=14, topk=4, rope=None, pool_size=2),
    ),
    "delta net": GatedDeltaNetConfig(
        num_key_heads=2, num_value_heads=4, key_head_dim=4, value_head_dim=5, conv_kernel_size=4, fused_projections=True
    ),
    "Kimi delta attention": KDAConfig(num_heads=4, head_dim=5, conv_kernel_size=4, decay_rank=5, gate_rank=5),
    "mamba": MambaConfig(num_channels=24, state_size=5, dt_rank=7, conv_kernel_size=3, bias=True),
    "mamba2": Mamba2Config(num_heads=8, head_dim=3, num_groups=2, state_size=5, conv_kernel_size=4, bias=True),
    "convolution": ShortConvConfig(width=D, conv_kernel_size=3, bias=False),
}


@pytest.mark.covering
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_they_are_one_after_the_other(kind, shape) -> None:
    """Rows start at positions of their own; wrong tokens that are gone back on leave nothing that is seen later."""
    mesh = mesh_of(*shape)
    layer = make_token_mixer(CONFIGS[kind], D, 1e-6, param=ParamFactory(mesh, jnp.float32, nnx.Rngs(0)))
    batch = batch_axes(mesh, B)
    arrays = layer.cache_arrays(B, ROOM)
    empty = jax.tree.map(
        lambda one: jax.device_put(jnp.zeros(one.shape, one.dtype or jnp.float32), named(mesh, batch, *one.dims)),
        arrays,
    )
    x = np.random.default_rng(0).normal(size=(B, PROMPT + 2 * NEW, D)).astype(np.float32)
    lengths, right = np.array([PROMPT, 1, 4, 7], np.int32), np.array([2, 0, 1, 2], np.int32)

    def at(first_B: np.ndarray, count: int) -> jax.Array:
        positions_BS = first_B[:, None] + np.arange(count)
        return jnp.take_along_axis(jnp.asarray(x), positions_BS[..., None], axis=1)

    @jax.jit
    def prefill() -> jax.Array:
        positions_BS, _ = prompt_positions(jnp.asarray(lengths), PROMPT)
        return layer(jnp.asarray(x[:, :PROMPT]), positions_BS, empty, batch)[1]

    @jax.jit
    def decode(x_BSD, first_B, cache):
        positions_BS = first_B[:, None] + jnp.arange(x_BSD.shape[1], dtype=jnp.int32)[None]
        return layer(x_BSD, positions_BS, cache, batch, decode=True)[:2]

    cache = prefill()
    together, kept = decode(at(lengths, NEW), jnp.asarray(lengths), cache)
    kept = jax.jit(lambda kept: accepted(arrays, kept, jnp.asarray(right)))(kept)
    # The next tokens begin behind the last right one of each row, over what the wrong ones have left.
    again, _ = decode(at(lengths + right + 1, NEW), jnp.asarray(lengths + right + 1), kept)

    alone = []
    for ahead in range(2 * NEW):
        y, cache = decode(at(lengths + ahead, 1), jnp.asarray(lengths + ahead), cache)
        alone.append(np.asarray(y)[:, 0])
    expected = np.stack(alone, axis=1)
    np.testing.assert_allclose(together, expected[:, :NEW], rtol=2e-4, atol=2e-5)
    for row, first in enumerate(right + 1):
        np.testing.assert_allclose(again[row], expected[row, first : first + NEW], rtol=2e-4, atol=2e-5)

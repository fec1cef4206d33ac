"""The gated short convolution against a loop over tokens, at once and with its last token apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import ShortConvConfig
from jaxmoe.layers import ParamFactory
from jaxmoe.layers.short_conv import ShortConv
from tests.support.layers import fill
from tests.support.meshes import mesh_of

B, S, D, W = 2, 6, 8, 3


@pytest.mark.parametrize(("tp", "bias"), [(1, False), (2, True)])
def test_it_is_a_loop_over_tokens(tp, bias):
    config = ShortConvConfig(width=D, conv_kernel_size=W, bias=bias)
    mixer = ShortConv(config, D, 1e-6, param=ParamFactory(mesh_of(1, tp, 1), jnp.float32, None))
    fill(mixer)
    x = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
    lengths = np.array([S, S - 2])
    positions = np.minimum(np.arange(S), lengths[:, None] - 1)
    w = {name: np.asarray(getattr(mixer, name)[...], np.float64) for name, _ in mixer.specs.by_name}

    def project(part: str) -> np.ndarray:
        return x @ w[f"w_in_{part}"].T + w.get(f"b_in_{part}", 0)

    inputs = np.pad(project("b") * project("x"), [(0, 0), (W - 1, 0), (0, 0)])
    mixed = np.stack([(inputs[:, t : t + W] * w["conv"][:, 0].T).sum(1) for t in range(S)], axis=1)
    expected = (project("c") * (mixed + w.get("b_conv", 0))) @ w["w_out"].T + w.get("b_out", 0)

    cache = jax.tree.map(lambda array: jnp.zeros(array.shape), mixer.cache_arrays(B, S))
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [(B, W - 1, D)]
    y, kept = jax.jit(lambda x: mixer(x, positions, cache, ()))(x)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(y[row, :length], expected[row, :length], rtol=1e-4, atol=1e-4)
        # The inputs before the padding, which leaves no trace.
        np.testing.assert_allclose(kept.conv[row], inputs[row, length : length + W - 1], rtol=1e-4, atol=1e-4)
    before = jax.jit(lambda x: mixer(x, positions[:1, : S - 1], cache, ())[1])(x[:1, : S - 1])
    last, _ = jax.jit(lambda x: mixer(x, positions[:1, -1:], before, (), decode=True))(x[:1, -1:])
    np.testing.assert_allclose(last[0, 0], expected[0, -1], rtol=1e-4, atol=1e-4)

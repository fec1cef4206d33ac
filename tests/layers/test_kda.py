"""Kimi delta attention against a loop over tokens in NumPy: prompts, padding, decoding, and heads over tp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import KDAConfig
from jaxmoe.layers import ParamFactory, param_specs
from jaxmoe.layers.kda import KimiDeltaAttention
from jaxmoe.layers.recurrent import RecurrentCache
from tests.support.layers import fill
from tests.support.meshes import mesh_of

B, S, D, H, K, W, EPS = 3, 70, 8, 2, 5, 3, 1e-6
# By way of latents and without a bound, as in Kimi Linear; straight and bounded, as in Ling 3.
KIMI = KDAConfig(num_heads=H, head_dim=K, conv_kernel_size=W, decay_rank=3, gate_rank=4, wide_rates=True)
LING = KDAConfig(num_heads=H, head_dim=K, conv_kernel_size=W, least_log_decay=-5.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def expected(config, w, x):
    """Outputs [S, D], inputs of the convolution [S, 3 H K], and the memory [H, K, K] after one row's tokens x."""

    def by_head(part):
        weight = w[f"w_{part}"] if f"w_{part}" in w else w[f"w_{part}_b"] @ w[f"w_{part}_a"]
        return (x @ weight.T).reshape(-1, H, K)

    inputs = np.concatenate([x @ w[f"w_{part}"].T for part in "qkv"], axis=1)
    taps = np.concatenate([w[f"conv_{part}"] for part in "qkv"])[:, 0]
    padded = np.pad(inputs, [(W - 1, 0), (0, 0)])
    mixed = np.stack([(padded[t : t + W] * taps.T).sum(0) for t in range(len(x))])
    q, k, v = np.split((mixed * sigmoid(mixed)).reshape(-1, 3 * H, K), 3, axis=1)
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    f, rate = by_head("f") + w["dt_bias"].reshape(H, K), np.exp(w["a_log"]).reshape(H, 1)
    bound = config.least_log_decay
    decay = np.exp(-rate * np.logaddexp(0, f) if bound is None else bound * sigmoid(rate * f))
    strength = sigmoid(x @ w["w_b"].T)

    memory, out = np.zeros((H, K, K)), np.zeros((len(x), H, K))
    for t, h in np.ndindex(len(x), H):
        faded = decay[t, h][:, None] * memory[h]
        memory[h] = faded + strength[t, h] * np.outer(k[t, h], v[t, h] - faded.T @ k[t, h])
        out[t, h] = memory[h].T @ q[t, h] / np.sqrt(K)
    out = w["out_norm"] * out / np.sqrt((out**2).mean(-1, keepdims=True) + EPS) * sigmoid(by_head("g"))
    return out.reshape(len(x), -1) @ w["w_out"].T, inputs, memory


@pytest.mark.parametrize(("tp", "config"), [(1, KIMI), (2, LING)])
def test_it_is_a_loop_over_tokens(tp, config):
    mixer = KimiDeltaAttention(config, D, EPS, param=ParamFactory(mesh_of(1, tp, 1), jnp.float32, None))
    fill(mixer)
    w = {name: np.asarray(getattr(mixer, name)[...], np.float64) for name, _ in mixer.specs.by_name}
    for name, _ in mixer.specs.by_name:
        # A rank has its heads, and all of the latents.
        param, halves = getattr(mixer, name)[...], 1 if name.endswith("_a") or name == "out_norm" else tp
        assert param.addressable_shards[0].data.size * halves == param.size, name
    x = np.random.default_rng(0).normal(size=(B, S + 1, D)).astype(np.float32)
    lengths = np.array([S, 1, 2])
    padded = np.where(np.arange(S)[:, None] < lengths[:, None, None], x[:, :S], 1e3)
    positions = np.minimum(np.arange(S), lengths[:, None] - 1)
    cache = jax.tree.map(lambda array: jnp.zeros(array.shape), mixer.cache_arrays(B, S))

    y, kept = jax.jit(lambda x: mixer(x, positions, cache, ()))(padded)
    tokens = x[np.arange(B), lengths][:, None]
    last, after = jax.jit(lambda x: mixer(x, lengths[:, None], kept, (), decode=True))(tokens)
    for row, length in enumerate(lengths):
        row_x = np.concatenate([x[row, :length], tokens[row]]).astype(np.float64)
        outputs, inputs, memory = expected(config, w, row_x)
        np.testing.assert_allclose(y[row, :length], outputs[:-1], rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(last[row, 0], outputs[-1], rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(after.state[row], memory, rtol=2e-4, atol=2e-4)
        # Padding leaves no trace in what is kept; the ranks' channels lie one after the other.
        _, _, before = expected(config, w, row_x[:-1])
        np.testing.assert_allclose(kept.state[row], before, rtol=2e-4, atol=2e-4)
        by_rank = inputs.reshape(-1, 3, tp, H // tp * K).swapaxes(1, 2).reshape(len(inputs), -1)
        recent = np.pad(by_rank, [(W - 1, 0), (0, 0)])[-(W - 1) :]
        np.testing.assert_allclose(after.conv[row], recent, rtol=1e-4, atol=1e-4)


def test_states_are_float32_whatever_the_weights_are():
    mixer = KimiDeltaAttention(KIMI, D, EPS, param=ParamFactory(mesh_of(1, 1, 1), jnp.bfloat16, None))
    exact = {spec.path for spec in param_specs(mixer) if spec.dtype == jnp.float32}
    assert exact == {"a_log", "dt_bias", "conv_q", "conv_k", "conv_v"}
    fill(mixer)
    arrays = mixer.cache_arrays(1, 1000)
    assert (arrays.state.dtype, arrays.conv.dtype) == ("float32", None)
    cache = RecurrentCache(jnp.zeros(arrays.conv.shape, jnp.bfloat16), jnp.zeros(arrays.state.shape))
    y, kept = jax.jit(lambda x: mixer(x, np.arange(4)[None], cache, ()))(jnp.ones((1, 4, D), jnp.bfloat16))
    assert (y.dtype, kept.conv.dtype, kept.state.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_what_a_config_refuses():
    with pytest.raises(ValueError, match=r"its logarithm is below 0; got least_log_decay=0"):
        KDAConfig(num_heads=2, head_dim=4, conv_kernel_size=4, least_log_decay=0.0)
    with pytest.raises(ValueError, match=r"decay_rank is an integer of at least 1; got 0"):
        KDAConfig(num_heads=2, head_dim=4, conv_kernel_size=4, decay_rank=0)
    assert [KIMI.tp_faults(tp) for tp in (1, 2, 3)] == [[], [], ["linear_num_heads=2"]]

"""Attention against a loop over heads and tokens, the norm over all heads on several ranks, and writing to the cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import AttentionConfig, Chunks, QueryKeyNorm, SlidingWindow
from jaxmoe.layers import Attention, ParamFactory, params_by_path
from jaxmoe.layers.attention import attend
from jaxmoe.layers.cache import write_prompt, write_token
from jaxmoe.rotary import RopeConfig
from tests.support.layers import fill
from tests.support.meshes import mesh_of

B, H, G, C, WIDTH = 2, 4, 2, 9, 6


def expected(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, scale: float, **rules: Any
) -> np.ndarray:
    """One head of one token after the other, in float64."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, s, head in np.ndindex(*q.shape[:3]):
        position, group = positions[b, s], head // (q.shape[2] // k.shape[1])
        first = 0
        if isinstance(mask := rules.get("mask"), SlidingWindow):
            first = max(0, position + 1 - mask.size)
        elif isinstance(mask, Chunks):
            first = position - position % mask.size
        weights = np.exp(scale * k[b, group, first : position + 1] @ q[b, s, head])
        sink = np.exp(rules["sinks_H"][head]) if "sinks_H" in rules else 0
        out[b, s, head] = weights / (weights.sum() + sink) @ v[b, group, first : position + 1]
    return out


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"mask": SlidingWindow(size=1)},
        {"mask": SlidingWindow(size=4)},
        {"mask": Chunks(size=4)},
        {"sinks_H": np.array([0.5, -1.0, 3.0, 0.0])},
        {"mask": SlidingWindow(size=3), "sinks_H": np.array([0.5, -1.0, 3.0, 0.0])},
    ],
    ids="-".join,
)
def test_attend_is_a_loop_over_heads_and_tokens(rules):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, C, H, WIDTH))
    k, v = rng.normal(size=(B, G, C, WIDTH)), rng.normal(size=(B, G, C, 5))
    positions = np.stack([np.arange(C), np.arange(C)[::-1]])
    out = attend(*map(jnp.float32, (q, k, v)), jnp.asarray(positions), scale=0.3, **rules)
    np.testing.assert_allclose(out, expected(q, k, v, positions, 0.3, **rules), atol=2e-6)


def test_more_queries_than_are_taken_at_a_time():
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(1, 515, 1, 2)), rng.normal(size=(1, 1, 515, 2)), rng.normal(size=(1, 1, 515, 2))
    positions = np.arange(515)[None]
    out = attend(*map(jnp.float32, (q, k, v)), jnp.asarray(positions), scale=1.0, mask=SlidingWindow(size=7))
    np.testing.assert_allclose(out, expected(q, k, v, positions, 1.0, mask=SlidingWindow(size=7)), atol=2e-6)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_a_norm_over_all_heads_is_the_same_on_every_tp(kv_heads):
    config = AttentionConfig(
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=4,
        rope=RopeConfig(frequencies=(1.0, 0.1)),
        qk_norm=QueryKeyNorm(over="full"),
    )
    x, positions = np.random.default_rng(3).normal(size=(1, 5, 8)).astype(np.float32), np.arange(5)[None]

    def run(tp: int) -> np.ndarray:
        attention = Attention(config, 8, 1e-6, param=ParamFactory(mesh_of(1, tp, 1), jnp.float32, None))
        fill(attention)
        return np.asarray(jax.jit(lambda x: attention(x, positions, None, ())[0])(x))

    np.testing.assert_allclose(run(2), run(1), atol=1e-4)


def test_values_may_be_narrower_than_keys():
    config = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, v_head_dim=4, rope=None, value_scale=0.5)
    attention = Attention(config, 8, 1e-6, param=ParamFactory(mesh_of(1, 2, 1), jnp.float32, None))
    assert [array.shape for array in attention.cache_arrays(3, 7)] == [(3, 2, 7, 6), (3, 2, 7, 4)]
    fill(attention)
    x, positions = np.random.default_rng(5).normal(size=(1, 5, 8)).astype(np.float32), np.arange(5)[None]
    found = jax.jit(lambda x: attention(x, positions, None, ())[0])(x)

    w_q, w_k, w_v, w_o = (np.asarray(getattr(attention, f"w_{part}")[...], np.float64) for part in "qkvo")
    q, k, v = ((x @ w.T).reshape(1, 5, -1, width) for w, width in ((w_q, 6), (w_k, 6), (0.5 * w_v, 4)))
    out = expected(q, k.swapaxes(1, 2), v.swapaxes(1, 2), positions, 6**-0.5)
    np.testing.assert_allclose(found, out.reshape(1, 5, -1) @ w_o.T, rtol=1e-4, atol=1e-4)
    for beside in ({"values_are_keys": True}, {"v_norm": True}, {"output_gate": True}):
        with pytest.raises(ValueError, match="values of a width of their own .* got v_head_dim=4"):
            AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, v_head_dim=4, rope=None, **beside)


def test_gates_of_a_projection_of_their_own_are_those_beside_the_queries():
    sizes: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "rope": None, "output_gate": True}
    x, positions = np.random.default_rng(5).normal(size=(1, 5, 8)).astype(np.float32), np.arange(5)[None]

    def make(tp: int, **own: Any) -> Attention:
        attention = Attention(
            AttentionConfig(**sizes, **own), 8, 1e-6, param=ParamFactory(mesh_of(1, tp, 1), jnp.float32, None)
        )
        fill(attention)
        return attention

    apart = make(2, gate_projection=True)
    beside = make(1)
    for name, param in params_by_path(apart).items():
        if name not in ("w_q", "w_gate"):
            getattr(beside, name).set_value(jax.device_put(np.asarray(param[...]), beside.mesh.devices.item()))
    both = np.stack([np.asarray(w[...]).reshape(4, 1, 4, 8) for w in (apart.w_q, apart.w_gate)], axis=1)
    beside.w_q.set_value(jax.device_put(both.reshape(32, 8), beside.mesh.devices.item()))
    found, expected = (
        np.asarray(jax.jit(lambda x, layer=layer: layer(x, positions, None, ())[0])(x)) for layer in (apart, beside)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(ValueError, match="gate_projection is of the gates that output_gate=True gives"):
        AttentionConfig(**{**sizes, "output_gate": False}, gate_projection=True)


def test_rows_are_written_to_the_cache_where_each_of_them_stands():
    rng = np.random.default_rng(4)
    prompt, token = rng.normal(size=(B, G, 3, 5)).astype(np.float32), rng.normal(size=(B, G, 1, 5)).astype(np.float32)
    wanted = np.zeros((B, G, 7, 5), np.float32)
    wanted[:, :, :3] = prompt
    cache = write_prompt(jnp.zeros((B, G, 7, 5)), jnp.asarray(prompt))
    np.testing.assert_array_equal(cache, wanted)
    wanted[0, :, 2], wanted[1, :, 5] = token[0, :, 0], token[1, :, 0]
    np.testing.assert_array_equal(write_token(cache, jnp.asarray(token), jnp.array([2, 5])), wanted)

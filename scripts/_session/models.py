"""Qwen3-30B-A3B with random weights in bfloat16: a decode step at several batch sizes, and a prefill."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxmoe
from jaxmoe.models import Decoder, read_model_config
from scripts._bench.report import check_finite, reason
from scripts._session.inside import TINY, check_alive, device, emit, while_time

CONFIGS = Path(__file__).resolve().parents[2] / "docs" / "configs"
# Positions of the cache in decoding, and tokens of the prefill.
CACHE, PROMPT = (16, 8) if TINY else (1024, 4096)
BATCHES = (1,) if TINY else (1, 8, 32)
STEPS = 4 if TINY else 32


def model_4(kernel: str) -> None:
    """Emit the times of the first 4 layers."""
    _measure(kernel, 4)


def model_48(kernel: str) -> None:
    """Emit the times of all 48 layers."""
    _measure(kernel, 48)


def _measure(kernel: str, layers: int) -> None:
    model = random_model(kernel, 2 if TINY else layers)
    graph, state = model.split_network()
    wanted = [("decode", batch) for batch in BATCHES] + [("prefill", 1)]
    for step, batch in while_time(wanted):
        try:
            seconds = (_decode_seconds if step == "decode" else _prefill_seconds)(model, graph, state, batch)
        except Exception as refusal:  # one step; others may do
            check_alive()
            emit("model_refused", left_out=f"{layers} layers, {step} of {batch}: {reason(refusal)}")
            continue
        count = 1 if step == "decode" else PROMPT
        emit(
            "model",
            layers=len(model.layers),
            step=step,
            batch=batch,
            tokens=count,
            kernels=kernel,
            seconds=seconds,
            tokens_per_second=batch * count / seconds,
            peak_bytes=(device().memory_stats() or {}).get("peak_bytes_in_use"),
            clock=f"the wall's, over {STEPS} steps that follow each other" if step == "decode" else "the wall's",
        )


def random_model(kernel: str, layers: int) -> Decoder:
    """Qwen3-30B-A3B's first layers, filled matrix by matrix so that nothing is ever there twice."""
    config = read_model_config(CONFIGS / "Qwen3-30B-A3B")[1]
    config = dataclasses.replace(config, layers=config.layers[:layers])
    if TINY:
        config = tiny_config(layers)
    mesh = jaxmoe.make_mesh(devices=[device()])
    model = Decoder(config, mesh=mesh, kernels=kernel, dtype=jnp.bfloat16)
    state = nnx.state(model)
    leaves, tree = jax.tree.flatten(state)
    nnx.update(model, jax.tree.unflatten(tree, [_filled(leaf, seed) for seed, leaf in enumerate(leaves)]))
    return model


def tiny_config(layers: int) -> Any:
    """The same family with small sizes."""
    import json
    import tempfile

    raw = json.loads((CONFIGS / "Qwen3-30B-A3B" / "config.json").read_text())
    raw |= {
        "num_hidden_layers": layers,
        "hidden_size": 64,
        "vocab_size": 256,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    raw |= {"moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return read_model_config(folder)[1]


def _filled(leaf: Any, seed: int) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if len(leaf.shape) < 2:
        return jnp.ones(leaf.shape, leaf.dtype, device=leaf.sharding)
    return _random(leaf.shape, leaf.dtype, leaf.sharding)(seed)


@cache  # layers are alike, and each program takes a compiler a good part of a second
def _random(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[[int], jax.Array]:
    bound = (3 / shape[-1]) ** 0.5

    def draw(seed: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.key(seed), shape, dtype, -bound, bound)

    return jax.jit(draw, out_shardings=sharding)


def _decode_seconds(model: Decoder, graph: nnx.GraphDef, state: nnx.State, batch: int) -> float:
    """Seconds of a step, each of which waits for the one before on the device alone."""

    def step(state: nnx.State, tokens: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        logits, cache = nnx.merge(graph, state).decode(tokens, jnp.full_like(tokens, position), cache)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    compiled = jax.jit(step, donate_argnums=3)
    cache = model.init_cache(batch, CACHE)
    tokens = jnp.ones(batch, jnp.int32)
    # The first call compiles, and the second may once more: for its own results, which lie on the mesh.
    for position in range(2):
        tokens, cache = compiled(state, tokens, jnp.int32(position), cache)
    jax.block_until_ready(tokens)
    start = time.perf_counter()
    for position in range(CACHE // 2, CACHE // 2 + STEPS):
        tokens, cache = compiled(state, tokens, jnp.int32(position), cache)
    jax.block_until_ready(tokens)
    return (time.perf_counter() - start) / STEPS


def _prefill_seconds(model: Decoder, graph: nnx.GraphDef, state: nnx.State, batch: int) -> float:
    compiled = jax.jit(
        lambda state, tokens, lengths, cache: nnx.merge(graph, state).prefill(tokens, lengths, cache), donate_argnums=3
    )
    tokens = jax.random.randint(jax.random.key(0), (batch, PROMPT), 0, model.config.vocab_size, jnp.int32)
    seconds = []
    for _ in range(4):
        cache = model.init_cache(batch, PROMPT)
        jax.block_until_ready(cache)
        start = time.perf_counter()
        logits, _ = compiled(state, tokens, jnp.full(batch, PROMPT, jnp.int32), cache)
        check_finite(float(jnp.linalg.norm(logits)))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])

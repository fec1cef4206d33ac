"""What the simulated devices of this machine do at once, and steps of a model on them.

Simulated devices share the cores: with n of them at work each has an n-th of the rates. So each rate is measured with all of
them at work, and is that of one device; work that is done once on every device then costs n times what it costs once.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxmoe
from jaxmoe.config import DecoderConfig
from jaxmoe.generation.programs import Programs, Shape
from jaxmoe.hardware import GPU, GPUS, Links
from jaxmoe.models import Decoder
from scripts._bench.timing import take_turns

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
# Elements of a device's part of a copy, rows and columns of its product, and bytes of the two collectives.
COPIED, SQUARE, SMALL, LARGE = 2**22, 384, 2**10, 2**22
# Collectives that follow each other in a program, so that its start counts little.
REPEATS = 8


def measure_device(devices: int, clock: str, rounds: int = 7) -> GPU:
    """Describe a simulated device by measured rates: of a copy, a product, and an all-reduce over all devices.

    Args:
        devices: simulated devices, all of which work at once.
        clock: key of `CLOCKS`.
        rounds: turns, of which the fastest counts.
    """
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("all",))

    def turn(local: Callable[[jax.Array], jax.Array], *shape: int) -> Callable[[], Any]:
        call = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("all"), out_specs=P("all"), check_vma=False))
        x = jax.device_put(jnp.ones((devices, *shape), jnp.float32), jax.NamedSharding(mesh, P("all")))
        jax.block_until_ready(call(x))
        return lambda: jax.block_until_ready(call(x))

    def sums(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, REPEATS, lambda _, x: jax.lax.pmean(x, "all"), x)

    turns = {
        "nothing": turn(lambda x: x, 1),
        "copy": turn(lambda x: -x, COPIED),
        "product": turn(lambda x: jnp.einsum("aij,ajk->aik", x, x), SQUARE, SQUARE),
        "small": turn(sums, SMALL // 4),
        "large": turn(sums, LARGE // 4),
    }
    taken = {
        name: min(all_) for name, all_ in take_turns(turns, rounds=rounds, budget_s=20, clock=CLOCKS[clock]).items()
    }
    work = {name: max(seconds - taken["nothing"], 1e-9) for name, seconds in taken.items()}
    small, large = work["small"] / REPEATS, work["large"] / REPEATS
    speed = 2 * (LARGE - SMALL) * (devices - 1) / devices / max(large - small, 1e-9)
    return as_gpu(
        memory_bandwidth=2 * 4 * COPIED / work["copy"],
        flops=2 * SQUARE**3 / work["product"],
        links=Links(within=speed, between=speed, latency=small),
    )


def as_gpu(*, memory_bandwidth: float, flops: float, links: Links) -> GPU:
    """A simulated device as the model of time sees devices."""
    return dataclasses.replace(
        GPUS["h100"], name="simulated device", memory_bandwidth=memory_bandwidth, flops=flops, links=links
    )


def step_turns(
    config: DecoderConfig,
    sizes: Mapping[str, int],
    expert_axes: tuple[str, ...],
    *,
    batch_size: int,
    prompt_length: int,
    max_length: int,
) -> dict[str, Callable[[], Any]]:
    """The prefill and a decode step of a model with random weights on a mesh, as `jaxmoe.generate` runs them.

    Args:
        config: config of the model.
        sizes: sizes of the mesh axes.
        expert_axes: mesh axes that share the experts.
        batch_size: sequences.
        prompt_length: tokens of each in the prefill.
        max_length: tokens of each that the cache is for; a step is one at half of them.

    Returns:
        {"decode" or "prefill": function that runs one and waits for its end}; both have run.
    """
    mesh = jaxmoe.make_mesh(**sizes)
    model = Decoder(config, mesh=mesh, expert_axes=expert_axes, dtype=jnp.float32, rngs=nnx.Rngs(0))
    programs = Programs(mesh)
    leaves = programs.bind(model)
    shape = Shape(model.padded_batch(batch_size), prompt_length, max_length)
    caches = {"now": programs.init_cache(leaves, shape)(leaves)}
    prefill, decode = programs.prefill(leaves, shape, "nothing"), programs.decode(leaves, shape, "nothing")
    rng, real = np.random.default_rng(0), np.arange(shape.rows) < batch_size
    tokens = programs.put(rng.integers(config.vocab_size, size=(shape.rows, prompt_length), dtype=np.int32))
    lengths = programs.put(np.where(real, prompt_length, 0).astype(np.int32))
    token = programs.put(rng.integers(config.vocab_size, size=shape.rows, dtype=np.int32))
    position = programs.put(np.full(shape.rows, max_length // 2, np.int32))
    active = programs.put(real)

    def run(step: Callable[..., Any], *inputs: jax.Array) -> None:
        logits, caches["now"], _ = step(leaves, *inputs, None, None, caches["now"])
        jax.block_until_ready((logits, caches["now"]))

    turns = {"prefill": partial(run, prefill, tokens, lengths), "decode": partial(run, decode, token, position, active)}
    for turn in turns.values():
        turn()
    return turns

"""Several GPUs: the speed of collectives alone, the rates that follow, and every dispatch over numbers of tokens."""

import datetime
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmoe.dispatch import DISPATCHES
from jaxmoe.dispatch.rates import write_rates
from jaxmoe.hardware import Links
from scripts import bench_layer
from scripts._bench.ceilings import measure_ceilings
from scripts._bench.report import check_finite, machine, reason
from scripts._session.inside import GPUS, TINY, check_alive, device, emit, shapes, tokens, while_time

# Collectives that follow each other in one program, so that the host's clock sees little of its own calls.
REPEATS = 4 if TINY else 32
# Bytes of a device's operand.
SIZES = (2**12, 2**20) if TINY else (2**12, 2**16, 2**20, 2**22, 2**24, 2**26, 2**28)

# One collective of each device's [n, C] over the axis "ep", with a result of that shape.
COLLECTIVES: dict[str, Callable[[jax.Array], jax.Array]] = {
    # A single jax.lax.all_to_all is one call of NCCL's on GPUs: what jaxmoe's own exchange is to be held against.
    "all_to_all": lambda x: jax.lax.all_to_all(x, "ep", 0, 0, tiled=True),
    "all_gather": lambda x: jax.lax.all_gather(x[0], "ep"),
    "all_reduce": lambda x: jax.lax.pmean(x, "ep"),
}


def exchange() -> None:
    """Emit the speed of collectives alone over sizes, and write the rates that "auto" goes by.

    Raises:
        RuntimeError: there are fewer devices than asked for.
    """
    mesh = Mesh(np.asarray(needed_devices()), ("ep",))
    seconds = {}
    for name, nbytes in while_time([(name, nbytes) for name in COLLECTIVES for nbytes in SIZES]):
        try:
            taken = _seconds(mesh, COLLECTIVES[name], nbytes)
        except Exception as refusal:  # one size; others may do
            check_alive()
            emit("exchange_refused", left_out=f"{name} of {nbytes} bytes: {reason(refusal)}")
            continue
        seconds[name, nbytes] = taken
        sent = nbytes * (GPUS - 1) / GPUS * (2 if name == "all_reduce" else 1)
        emit("exchange", collective=name, bytes=nbytes, seconds=taken, sent_per_second=sent / taken, devices=GPUS)
    of_exchange = {nbytes: taken for (name, nbytes), taken in seconds.items() if name == "all_to_all"}
    links = fit_links(of_exchange, GPUS)
    here = machine(device())
    driver = Path("/proc/driver/nvidia/version")
    belongs = {
        "versions": here["versions"],
        "machine": here["machine"],
        "driver": driver.read_text().splitlines()[0] if driver.exists() else device().client.platform_version,
        "date": f"{datetime.date.today():%Y-%m-%d}",
    }
    memory = measure_ceilings("bfloat16", device(), quick=TINY).bytes_per_second
    file = write_rates(device().device_kind, GPUS, memory_bandwidth=memory, links=links, machine=belongs)
    emit("rates", memory_bandwidth=memory, within=links.within, latency=links.latency, file=file.name)


def fit_links(seconds: dict[int, float], devices: int) -> Links:
    """The latency and speed that give an exchange's times: of the smallest one, and of the largest without the latency.

    Args:
        seconds: time of an all-to-all by bytes of a device's operand, two sizes at least.
        devices: devices that take part; each keeps its own share.

    Raises:
        ValueError: there are fewer sizes, or the largest takes no longer than the smallest.
    """
    smallest, largest = min(seconds, default=0), max(seconds, default=0)
    longer = seconds.get(largest, 0.0) - seconds.get(smallest, 0.0)
    if longer <= 0:
        raise ValueError(f"two sizes or more give a speed, and the larger has to take longer; got {seconds}")
    speed = (largest - smallest) * (devices - 1) / devices / longer
    return Links(within=speed, between=speed, latency=seconds[smallest])


def _seconds(mesh: Mesh, collective: Callable[[jax.Array], jax.Array], nbytes: int) -> float:
    n = mesh.size
    shape = (n * n, max(1, nbytes // n // 2))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False)
    def many(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, REPEATS, lambda _, x: collective(x), x)

    x = jax.device_put(jnp.ones(shape, jnp.bfloat16), jax.NamedSharding(mesh, P("ep")))
    jax.block_until_ready(many(x))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(many(x))
        times.append(time.perf_counter() - start)
    return min(times) / REPEATS


def dispatches(kernel: str) -> None:
    """Emit the times of a whole layer over all devices by every dispatch, with what "auto" takes and models."""
    needed_devices()
    for name, shape in shapes("qwen3-30b-a3b").items():
        module: Any = bench_layer.make_layer(shape, f"ep={GPUS}", "bfloat16")
        module.kernels = kernel
        cases = [(T, dispatch) for T in tokens(128, 4096, 8, 32, 1024, 16384) for dispatch in DISPATCHES]
        # Those that "auto" never takes, for XLA has known faults in them, come last: one that hangs ends the job.
        for T, dispatch in while_time(sorted(cases, key=lambda case: not DISPATCHES[case[1]].auto)):
            choice = module.explain_dispatch(T)
            what = {"shape": name, "tokens": T, "dispatch": dispatch, "devices": GPUS, "kernels": kernel}
            try:
                taken = _layer_seconds(module, dispatch, T, shape.width)
            except Exception as refusal:  # one way, or one number of tokens; others may do
                check_alive()
                emit("dispatch_refused", left_out=f"{name}, {T} tokens, {dispatch}: {reason(refusal)}")
                continue
            modeled = choice.seconds.get(dispatch)
            emit("dispatch", **what, seconds=taken, modeled_seconds=modeled, auto=choice.name == dispatch)


def _layer_seconds(module: Any, dispatch: str, T: int, width: int) -> float:
    graph, state = nnx.split(module)
    call = jax.jit(lambda state, x_TD: nnx.merge(graph, state)(x_TD, dispatch=dispatch)[0])
    x_TD = jax.random.normal(jax.random.key(T), (T, width), jnp.bfloat16)
    check_finite(float(jnp.linalg.norm(call(state, x_TD).astype(jnp.float32))))
    calls, times = REPEATS // 2, []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([call(state, x_TD) for _ in range(calls)])
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def needed_devices() -> list[jax.Device]:
    """The devices that take part.

    Raises:
        RuntimeError: there are fewer of them.
    """
    if len(jax.devices()) < GPUS:
        raise RuntimeError(f"--gpus {GPUS} wants as many devices; jax sees {len(jax.devices())}")
    return jax.devices()[:GPUS]

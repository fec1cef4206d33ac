"""Rows and matrices to multiply, several of each to take turns with, and what comes out in float64."""

import dataclasses
import os
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scripts._bench.cases import Case, Shape, draw_group_sizes

# Calls of one turn. Each has rows and group sizes of its own; matrices of its own as far as memory goes.
VARIANTS = 4
# Matrices may fill so much of the memory that is free.
MEMORY_SHARE = 0.25
# Groups whose results are compared with float64, and how many of the rows of each: all that there are, up to so many.
SAMPLED_GROUPS, SAMPLED_ROWS = 4, 64


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's experts: gate and up [G, 2F, D], down [G, D, F]."""

    up: jax.Array
    down: jax.Array

    def matrices(self, operation: str) -> list[jax.Array]:
        """The stacks [G, N, K] that an operation multiplies by, in order."""
        return {"up": [self.up], "down": [self.down], "mlp": [self.up, self.down]}[operation]

    def transposed(self, operation: str) -> list[jax.Array]:
        """Copies [G, K, N] of them, made once, for those who cannot do with torch's order."""
        names = {"up": ["up_GKN"], "down": ["down_GKN"], "mlp": ["up_GKN", "down_GKN"]}[operation]
        return [getattr(self, name) for name in names]

    @cached_property
    def up_GKN(self) -> jax.Array:  # noqa: N802
        """[G, D, 2F]."""
        return jnp.asarray(self.up.swapaxes(1, 2))

    @cached_property
    def down_GKN(self) -> jax.Array:  # noqa: N802
        """[G, F, D]."""
        return jnp.asarray(self.down.swapaxes(1, 2))


class Variant(NamedTuple):
    """What one call gets. `host_sizes` are `group_sizes` on the host."""

    rows: jax.Array
    layer: Layer
    group_sizes: jax.Array
    host_sizes: np.ndarray


def free_memory(device: jax.Device) -> int:
    """Bytes that can still be had on a device, of the machine's memory where that is the CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _matrix(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Uniform numbers of variance 1/K, which are cheaper to draw for a billion than normal ones."""
    bound = (3 / shape[-1]) ** 0.5
    return jax.random.uniform(jax.random.key(seed), shape, dtype, -bound, bound)


def make_layers(shape: Shape, dtype: str, device: jax.Device) -> list[Layer]:
    """As many layers as variants, fewer where memory is short, one at least.

    Raises:
        MemoryError: there is not even room for one.
    """
    G, D, F = shape.experts, shape.width, shape.expert_width
    nbytes, free = 3 * G * D * F * jnp.dtype(dtype).itemsize, free_memory(device)
    if 2 * nbytes > free:
        raise MemoryError(f"one layer takes {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: use --scale")
    copies = max(1, min(VARIANTS, int(MEMORY_SHARE * free / nbytes)))
    return [
        Layer(_matrix(2 * copy, (G, 2 * F, D), dtype), _matrix(2 * copy + 1, (G, D, F), dtype))
        for copy in range(copies)
    ]


def make_variants(case: Case, layers: list[Layer]) -> list[Variant]:
    """The calls of one turn; the same ones whenever it is asked for the same case."""
    rng = np.random.default_rng([case.tokens, len(case.routing)])
    variants = []
    for number in range(VARIANTS):
        sizes_G = draw_group_sizes(case.routing, case.shape, case.tokens, rng)
        rows_RK = _normal(number, (case.rows, case.row_widths[0]), case.dtype)
        variants.append(Variant(rows_RK, layers[number % len(layers)], jnp.asarray(sizes_G), sizes_G))
    return variants


class Sample(NamedTuple):
    """Some rows of the first variant's result: their places [r], and what they should be [r, N] in float64."""

    rows: np.ndarray
    exact: np.ndarray

    def error(self, actual: np.ndarray) -> float:
        """‖actual − exact‖ / ‖exact‖; NaN where `actual` has any."""
        return float(np.linalg.norm(actual - self.exact) / np.linalg.norm(self.exact))


def exact_sample(case: Case, variant: Variant, *, most_rows: int = SAMPLED_ROWS) -> Sample:
    """The operation in float64 for rows of a few groups, the largest among them: all rows, or many from first to last.

    Args:
        case: the operation.
        variant: its arrays.
        most_rows: rows of a group that are enough.
    """
    ends_G = np.cumsum(variant.host_sizes)
    filled = np.flatnonzero(variant.host_sizes)
    groups = {
        int(np.argmax(variant.host_sizes)),
        *filled[np.linspace(0, len(filled) - 1, SAMPLED_GROUPS - 1).astype(int)],
    }
    rows, exact = [], []
    for group in sorted(map(int, groups)):
        own = np.arange(ends_G[group] - variant.host_sizes[group], ends_G[group])
        if len(own) > most_rows:
            own = np.unique(own[np.linspace(0, len(own) - 1, most_rows).astype(int)])
        rows.append(own)
        exact.append(_exact_rows(case, to_float64(variant.rows, own), variant.layer, group))
    return Sample(np.concatenate(rows), np.concatenate(exact))


def _exact_rows(case: Case, rows_rK: np.ndarray, layer: Layer, group: int) -> np.ndarray:
    def times(rows_rK: np.ndarray, matrices_GNK: jax.Array) -> np.ndarray:
        return rows_rK @ to_float64(matrices_GNK, group).T

    if case.operation == "down":
        return times(rows_rK, layer.down)
    up_rN = times(rows_rK, layer.up)
    if case.operation == "up":
        return up_rN
    gate, up = np.split(up_rN, 2, axis=-1)
    return times(gate / (1 + np.exp(-gate)) * up, layer.down)


def to_float64(array: "jax.Array", index: np.ndarray | int) -> np.ndarray:
    """A part of an array of jax or torch along its first dim."""
    part = array[index]
    if hasattr(part, "detach"):
        return part.detach().double().cpu().numpy()
    return np.asarray(part.astype(jnp.float32)).astype(np.float64)

"""Tiles on Blackwell, where they differ from Hopper's, and the GPUs that are Blackwells."""

import re

from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import (
    RESERVED_BYTES,
    SHARED_BYTES,
    Problem,
    Tiles,
    inner_tile,
)

# Outputs of a tile, of each half: rows of the tensor core's first operand, and lanes of tensor memory.
OUTPUTS = 128
# Tiles whose sums have room in tensor memory, and pieces of results in shared memory.
SLOTS = 2
# Columns of tensor memory, each a float32 of every lane.
TENSOR_COLUMNS = 512
# Sums that a thread has in registers at a time, of all halves.
_THREAD_SUMS = 64


def is_blackwell(device_kind: str | None) -> bool:
    """Tell whether a GPU of that `jax.Device.device_kind` is a Blackwell of data centers; consumers' GPUs are not.

    >>> [is_blackwell(kind) for kind in ("NVIDIA B200", "NVIDIA GB300", "NVIDIA H200", None)]
    [True, True, False, False]
    """
    return re.search(r"\b(B100|B200|GB200|B300|GB300)\b", device_kind or "") is not None


def piece_rows(m: int, halves: int) -> int:
    """Rows of a tile of `m` rows that are turned into results at a time."""
    return min(m, _THREAD_SUMS // halves)


class BlackwellProblem(Problem):
    """A problem on Blackwell, where all tiles are `swapped`."""

    @property
    def rows_may_lead(self) -> bool:
        """Never: see `blackwell`."""
        return False

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Rows that a tile may have, as many as the second operand takes and tensor memory gives out."""
        return (16, 32, 64, 128, 256)

    @property
    def inner_sizes(self) -> tuple[int, ...]:
        """The widest inner tile."""
        return (inner_tile(self),)

    def split_sizes(self, k: int) -> tuple[int, ...]:
        """One: the kernel has no parts of the inner dimension."""
        return (1,)

    def clusters(self, tiles: Tiles) -> tuple[int, ...]:
        """One block: the kernel has no clusters."""
        return (1,)

    def cost(self, tiles: Tiles) -> tuple[float, ...]:
        """Rank tiles, the best lowest: the more rows the better, up to twice those of a group, for want of a model."""
        rows = self.R / self.G
        most = next((m for m in self.row_sizes if rows <= m // 2), self.row_sizes[-1])
        return tiles.m > most, -tiles.m

    def least_stages(self, tiles: Tiles) -> int:
        """Stages that are needed to go on: the tensor core gives each back by itself."""
        return 1

    def shared_bytes(self, tiles: Tiles) -> int:
        """Shared memory that those tiles need."""
        stage = (tiles.m + self.halves * OUTPUTS) * tiles.k * self.row_bytes
        results = SLOTS * piece_rows(tiles.m, self.halves) * OUTPUTS * self.out_bytes
        return tiles.stages * stage + results + RESERVED_BYTES

    def fits(self, tiles: Tiles) -> bool:
        """Tell whether a block has the shared memory and the tensor memory."""
        columns = SLOTS * self.halves * tiles.m
        return tiles.n == OUTPUTS and columns <= TENSOR_COLUMNS and self.shared_bytes(tiles) <= SHARED_BYTES

    def check(self, tiles: Tiles) -> None:
        """Refuse tiles that the kernel would not work with.

        Raises:
            ValueError: they do not divide what they must, or do not fit.
            NotImplementedError: no tiles would work, see `inner_tile`.
        """
        sizes = [m for m in self.row_sizes if SLOTS * self.halves * m <= TENSOR_COLUMNS]
        if not tiles.swapped or tiles.n != OUTPUTS or tiles.m not in sizes:
            raise ValueError(f"on Blackwell tiles are swapped, m is one of {sizes} and n is {OUTPUTS}; got {tiles}")
        super().check(tiles)

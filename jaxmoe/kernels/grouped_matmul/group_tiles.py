"""Tiles of rows that are sorted by group and stay where they are, as a kernel finds them from the sizes of the groups.

A tile begins at a multiple of 8 rows, for the tensor memory accelerator copies rows in blocks of 8, so a group's first tile
may begin with up to 7 rows of the group before: which of a tile's rows are its group's own is told beside where it begins.

Each block of a kernel for Hopper finds its tiles itself. A map of them that XLA makes beforehand is several small kernels,
six for 128 groups, of some two microseconds each, while a block adds up 128 sizes in one or two. Letters here, beside the
common ones of docs/concepts/letters.md: G groups, I tiles, m rows of a tile.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ALIGNMENT = 8
# Sizes that are read while as many before them are added up: that takes about as long as the second level of cache does.
_AHEAD = 16


@dataclasses.dataclass(frozen=True)
class GroupTiles:
    """The tiles of groups, in a kernel: references to memory, and what is known when it is compiled.

    Attributes:
        sizes: int32 [G], rows of each group; rows beyond R have none.
        offsets: int32 `offsets_shape(G)`, memory of the block that `fill` fills: the rows and the tiles before each group.
        R: rows.
        m: rows of a tile, a multiple of 8.
    """

    sizes: Any
    offsets: Any
    R: int
    m: int

    def fill(self) -> None:
        """Add up the sizes. One warpgroup does it, for all of a block; every thread of it stores the same numbers."""
        G = self.sizes.shape[0]

        def read(i: Any) -> list[Any]:
            # Behind the last group stand sizes that nobody asks for.
            groups = [jnp.minimum(i, (G - 1) // _AHEAD) * _AHEAD + j for j in range(_AHEAD)]
            return [self.sizes[jnp.minimum(group, G - 1) if G % _AHEAD else group] for group in groups]

        def some(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            row, tile, *sizes = carry
            following = read(i + 1)
            for j, size in enumerate(sizes):
                self.offsets[0, i * _AHEAD + j] = row
                self.offsets[1, i * _AHEAD + j] = tile
                end = jnp.minimum(row + size, self.R)
                rows = end - (row & -ALIGNMENT)
                tile += jnp.where(end > row, lax.div(rows + self.m - 1, self.m), 0)
                row = end
            return row, tile, *following

        lax.fori_loop(0, self.offsets.shape[1] // _AHEAD, some, (jnp.int32(0), jnp.int32(0), *read(0)))

    @property
    def used(self) -> Any:
        """Number of tiles: those of all groups with rows."""
        return self.offsets[1, self.sizes.shape[0]]

    def rows_of(self, group: Any) -> tuple[Any, Any]:
        """First row of a group, and the one after its last."""
        return self.offsets[0, group], self.offsets[0, group + 1]

    def group_of(self, number: Any) -> Any:
        """Group of the tile of that number, which is less than `used`."""
        G = self.sizes.shape[0]
        group = jnp.int32(0)
        # The last group that begins at or before the tile; behind all of them stands `used`, which is too many.
        for power in reversed(range((G - 1).bit_length())):
            further = jnp.minimum(group + (1 << power), G)
            group = jnp.where(self.offsets[1, further] <= number, further, group)
        return group

    def place(self, number: Any, group: Any) -> tuple[Any, Any, Any]:
        """Row that a tile of a group begins at, the first of its rows that is the group's own, and the end of those."""
        start, end = self.rows_of(group)
        block = lax.div(start, ALIGNMENT) + (number - self.offsets[1, group]) * (self.m // ALIGNMENT)
        row = block * ALIGNMENT
        return row, jnp.maximum(start - row, 0), jnp.minimum(end - row, self.m)


def offsets_shape(G: int) -> tuple[int, int]:
    """Shape of `GroupTiles.offsets` for G groups."""
    return 2, (G // _AHEAD + 1) * _AHEAD


def offsets_bytes(G: int) -> int:
    """Bytes of `GroupTiles.offsets`."""
    rows, columns = offsets_shape(G)
    return rows * columns * 4


class TileMap(NamedTuple):
    """The same tiles as arrays, for kernels on Blackwell: a warp of its own reads no number of shared memory (jax 0.12).

    Those beyond the `used` first ones have nothing to do.

    Attributes:
        groups: int32 [I], the group of each tile.
        blocks: int32 [I], the row that each tile begins at, in units of `ALIGNMENT`.
        skips: int32 [I], rows of each tile that belong to groups before.
        sizes: int32 [I], rows of each tile that are its group's own; they follow those.
        used: int32 [1], number of tiles with rows of their own.
    """

    groups: jax.Array
    blocks: jax.Array
    skips: jax.Array
    sizes: jax.Array
    used: jax.Array


def map_tiles(group_sizes_G: jax.Array, R: int, m: int) -> TileMap:
    """Tiles of `m` rows, a multiple of 8, over R rows in groups of those sizes.

    A group of s rows takes at most ceil((s + 7) / m) tiles, so there are never more than (R + 7 G) / m + G of them.
    """
    G = group_sizes_G.shape[0]
    I = (R + (ALIGNMENT - 1) * G) // m + G  # noqa: E741
    ends_G = jnp.minimum(jnp.cumsum(group_sizes_G, dtype=jnp.int32), R)
    starts_G = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G[:-1]])
    aligned_G = starts_G // ALIGNMENT * ALIGNMENT
    tiles_G = jnp.where(ends_G > starts_G, -(-(ends_G - aligned_G) // m), 0)
    tile_ends_G = jnp.cumsum(tiles_G, dtype=jnp.int32)
    # All comparisons at once: a search would be a loop of small kernels.
    group_I = jnp.minimum(
        jnp.searchsorted(tile_ends_G, jnp.arange(I, dtype=jnp.int32), side="right", method="compare_all"), G - 1
    )
    row_I = aligned_G[group_I] + (jnp.arange(I, dtype=jnp.int32) - (tile_ends_G - tiles_G)[group_I]) * m
    first_I = jnp.maximum(row_I, starts_G[group_I])
    size_I = jnp.clip(jnp.minimum(row_I + m, ends_G[group_I]) - first_I, 0, m)
    # A sum and not the last of the running ones, which would be sliced by a kernel of its own.
    used = jnp.sum(tiles_G, keepdims=True)
    columns = (group_I, row_I // ALIGNMENT, first_I - row_I, size_I, used)
    return TileMap(*(column.astype(jnp.int32) for column in columns))

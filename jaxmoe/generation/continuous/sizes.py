"""`Sizes`: all numbers that the compiled programs of continuous batching and its cache depend on."""

from typing import NamedTuple

# Tokens of a prefill, and positions to look back at, below which a smaller program would save next to nothing.
SMALLEST_CHUNK, SMALLEST_LENGTH = 16, 32


class Sizes(NamedTuple):
    """Sizes of the programs and of the cache.

    Attributes:
        groups: parts of the mesh that have slots and pages of their own.
        slots: slots of a group.
        page: tokens of a page.
        pages: pages of a group.
        rows: most prompts of a group that begin in one prefill.
        chunk: most tokens of a prefill that goes on, or in which several prompts begin.
        chunks: tokens that a prefill from the beginning is padded to, ascending; multiples of `page`.
        lengths: positions that other programs look back at, ascending; multiples of `page`.
        max_length: most tokens of prompt and output together.
        goes_on: whether a prompt may be prefilled in several chunks; otherwise `chunks` go up to `max_length`.
        shares: whether pages of equal beginnings are shared.
    """

    groups: int
    slots: int
    page: int
    pages: int
    rows: int
    chunk: int
    chunks: tuple[int, ...]
    lengths: tuple[int, ...]
    max_length: int
    goes_on: bool = True
    shares: bool = True

    @property
    def later_chunks(self) -> tuple[int, ...]:
        """Tokens that a prefill that goes on is padded to: every other of `chunks`, the largest among them."""
        return self.chunks[::-2][::-1] if self.goes_on else ()

    def row_of(self, place: tuple[int, int]) -> int:
        """Row of the slots of all groups that a group and a slot of it are."""
        group, slot = place
        return group * self.slots + slot

    def pages_of(self, positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // self.page)

    def chunk_for(self, left: int, begins: bool) -> int:
        """Tokens that a prefill is padded to which has so many left to do."""
        among = self.chunks if begins else self.later_chunks
        return next((size for size in among if size >= left), among[-1])

    def length_for(self, positions: int) -> int:
        """Positions to look back at where so many are needed."""
        return next(length for length in self.lengths if length >= positions)

    @property
    def prefills(self) -> list[tuple[int, int, int]]:
        """Rows of a group, tokens and positions looked back at, for every prefill program."""
        begin = [
            (rows, size, 0)
            for size in self.chunks
            for rows in sorted({1, self.rows})
            if rows == 1 or size <= self.chunk
        ]
        return [*begin, *((1, size, history) for size in self.later_chunks for history in self.lengths)]


def _parts(whole: int, page: int, smallest: int) -> set[int]:
    """The whole, a half, a quarter and an eighth in whole pages, without those that are too small to be worth a program."""
    return {-(-whole // (parts * page)) * page for parts in (1, 2, 4, 8) if parts == 1 or whole >= parts * smallest}


def make_sizes(
    *,
    groups: int,
    slots: int,
    page: int,
    pages: int,
    chunk: int,
    rows: int,
    max_length: int,
    goes_on: bool,
    shares: bool,
) -> Sizes:
    """Work out the sizes of programs from what an engine is asked for.

    Args:
        groups, slots, page, pages, rows, chunk, max_length, goes_on, shares: fields of `Sizes`; `chunk` is rounded up to
            pages.
    """
    chunk = min(-(-chunk // page) * page, -(-max_length // page) * page)
    chunks = _parts(chunk, page, SMALLEST_CHUNK)
    if not goes_on:
        size = chunk
        while size < max_length:
            size *= 2
            chunks.add(min(size, -(-max_length // page) * page))
    lengths = _parts(max_length, page, SMALLEST_LENGTH)
    return Sizes(
        groups=groups,
        slots=slots,
        page=page,
        pages=pages,
        rows=min(rows, slots),
        chunk=chunk,
        chunks=tuple(sorted(chunks)),
        lengths=tuple(sorted(lengths)),
        max_length=max_length,
        goes_on=goes_on,
        shares=shares,
    )

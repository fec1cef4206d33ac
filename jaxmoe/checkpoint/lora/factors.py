"""The factors of a model's parameters, from the updates that an adapter makes to the tensors of its checkpoint.

A block says which part of a tensor fills which part of a parameter, rows to outputs and columns to inputs. So the rows of B
and the columns of A go the way of the tensor's own: to repeated heads, to slots, to gate and up that were one tensor.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxmoe.checkpoint.boxes import Box, box_shape
from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.lora.update import LowRankUpdate
from jaxmoe.checkpoint.mapping import Block
from jaxmoe.layers import ParamSpec


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A part of a parameter's factors: B's rows and A's columns for one matrix, by one update.

    Attributes:
        lead: index of the matrix along the slots of a stack; () of a parameter that is one matrix.
        outs: rows of the parameter that the update reaches, for each dim between slots and inputs.
        rows: rows of the adapter's B for these, of the same extents.
        ins: columns of the parameter.
        columns: columns of the adapter's A for these.
        update: the update.
        swapped: whether the parameter's A is the transpose of the adapter's B, and the reverse.
    """

    lead: tuple[int, ...]
    outs: tuple[np.ndarray, ...]
    rows: np.ndarray
    ins: np.ndarray
    columns: np.ndarray
    update: LowRankUpdate
    swapped: bool

    @property
    def pair(self) -> tuple[str, int | None, int]:
        """The pair of factors that it is of: entries with the same one share A."""
        update = self.update
        return update.a, update.rank_a.start, update.out_start if self.swapped else update.in_start

    def sides(self, factors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The parameter's A and B in float32, all rows and columns of them."""
        a = factors[self.update.a][self.update.rank_a].astype(np.float32)
        b = factors[self.update.b][:, self.update.rank_b].astype(np.float32)
        return (b.T, a.T) if self.swapped else (a, b)


class ParamFactors:
    """The factors that an adapter has for one parameter."""

    def __init__(self, spec: ParamSpec, entries: Sequence[_Entry]) -> None:
        self._spec, self._entries = spec, entries
        self._starts: dict[tuple[int, ...], dict[tuple[str, int | None, int], int]] = {}
        for entry in entries:
            starts = self._starts.setdefault(entry.lead, {})
            starts.setdefault(entry.pair, len(starts))

    @property
    def pairs(self) -> int:
        """The most pairs of factors that one matrix of the parameter has: gate and up have one each."""
        return max(map(len, self._starts.values()))

    @property
    def rank(self) -> int:
        """The highest rank of a pair."""
        return max(_rank(entry.update) for entry in self._entries)

    def values(self, factors: Mapping[str, np.ndarray], rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Give A [..., rank, K] and B [..., N, rank] in float32, the scale in B; slots of a stack are the first dim.

        Args:
            factors: the adapter's tensors by name.
            rank: rank that there is room for, at least `pairs` times that of each pair.
        """
        *outs, K = self._spec.shape
        lead = outs[: len(self._entries[0].lead)]
        a = np.zeros((*lead, rank, K), np.float32)
        b = np.zeros((*outs, rank), np.float32)
        room = rank // self.pairs
        for entry in self._entries:
            update, start = entry.update, self._starts[entry.lead][entry.pair] * room
            own = range(start, start + _rank(update))
            side_a, side_b = entry.sides(factors)
            a[entry.lead][np.ix_(own, entry.ins)] = side_a[:, entry.columns]
            b[entry.lead][np.ix_(*entry.outs, own)] = np.float32(update.scale) * side_b[entry.rows]
        return a, b


def factors_of_params(
    updates: Iterable[LowRankUpdate], blocks: Iterable[Block], specs: Mapping[str, ParamSpec]
) -> dict[str, ParamFactors]:
    """Find what an adapter has for each parameter of a model.

    Args:
        updates: updates from `find_updates`.
        blocks: blocks of the checkpoint's tensors.
        specs: specs of the parameters that may have adapters beside them, as plain arrays.

    Returns:
        Factors by path of the parameter.

    Raises:
        CheckpointError: an update is of a tensor that fills another parameter.
    """
    by_tensor: dict[str, list[LowRankUpdate]] = {}
    for update in updates:
        by_tensor.setdefault(update.target, []).append(update)
    entries: dict[str, list[_Entry]] = {}
    for block in blocks:
        own = by_tensor.get(block.tensor or "")
        if own is None:
            continue
        if block.param not in specs:
            raise CheckpointError(
                "an adapter beside the weights is of matrices of attention, MLPs and experts; this one changes "
                f"{block.tensor!r}, which is used in another way; merge it: jaxmoe.load(..., adapter=DIR)"
            )
        entries.setdefault(block.param, []).extend(_entries(block, own, stack=len(specs[block.param].shape) > 2))
    return {path: ParamFactors(specs[path], found) for path, found in entries.items() if found}


def _rank(update: LowRankUpdate) -> int:
    assert update.rank_a.stop is not None
    return update.rank_a.stop - (update.rank_a.start or 0)


def _entries(block: Block, updates: Sequence[LowRankUpdate], *, stack: bool) -> Iterable[_Entry]:
    """The parts of a parameter's factors by one block and the updates of its tensor that meet it."""
    for slot in range(*block.param_box[0]) if stack else [None]:
        box = block.param_box if slot is None else ((slot, slot + 1), *block.param_box[1:])
        coordinates = _coordinates(block, box)
        # Mostly the expert's: one number, by which most updates of a tensor of all experts are none of this slot's.
        fixed = [(dim, int(found.item())) for dim, found in enumerate(coordinates) if found.size == 1]
        for update in updates:
            if all(update.box[dim][0] <= at < update.box[dim][1] for dim, at in fixed):
                entry = _entry(box, coordinates, update, lead=() if slot is None else (slot,))
                if entry is not None:
                    yield entry


def _entry(box: Box, coordinates: Sequence[np.ndarray], update: LowRankUpdate, lead: tuple[int, ...]) -> _Entry | None:
    """The part that an update has of the matrix, or the region of it, in `box`; None where it has none."""
    dims = range(len(coordinates))
    out_dim, in_dim = [dims[dim] for dim in ((-1, -2) if update.transposed else (-2, -1))]
    # A parameter that PEFT has read the other way round has the transposed product: there A and B change places.
    swapped = coordinates[out_dim].shape[-1] > 1
    row_dim, column_dim = (in_dim, out_dim) if swapped else (out_dim, in_dim)
    assert all(coordinates[dim].shape[-1] == 1 for dim in dims if dim != column_dim), f"{update.target}: no matrix"
    firsts = {dim: -update.box[dim][0] for dim in dims}
    firsts[out_dim] += update.out_start
    firsts[in_dim] += update.in_start
    columns = np.broadcast_to(coordinates[column_dim].reshape(-1), box[-1][1] - box[-1][0])
    shape = box_shape(box)[:-1]
    reached = np.ones(shape, bool)
    for dim in dims:
        if dim != column_dim:
            reached &= _within(coordinates[dim][..., 0], update.box[dim])
    ins = np.flatnonzero(_within(columns, update.box[column_dim]))
    if not reached.any() or not len(ins):
        return None
    # What is reached is a product of ranges, for a coordinate follows dims of the parameter.
    places = [np.unique(found) for found in np.nonzero(reached)]
    assert reached.sum() == np.prod([len(found) for found in places]), f"{update.target}: no product of ranges"
    rows = np.broadcast_to(coordinates[row_dim][..., 0], shape)[np.ix_(*places)]
    places = [found + start for found, (start, _) in zip(places, box, strict=False)]
    return _Entry(
        lead=lead,
        outs=tuple(places[len(lead) :]),
        rows=(rows[0] if lead else rows) + firsts[row_dim],
        ins=ins + box[-1][0],
        columns=columns[ins] + firsts[column_dim],
        update=update,
        swapped=swapped,
    )


def _within(coordinate: np.ndarray, edges: tuple[int, int]) -> np.ndarray:
    return (coordinate >= edges[0]) & (coordinate < edges[1])


def _coordinates(block: Block, box: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """For each dim of the tensor, the coordinate there of every element of the parameter in `box`, to be broadcast."""
    split = block.tensor_split or tuple([(size,) for size in block.tensor_shape])
    places = iter(zip(block.tensor_start, block.dims, strict=True))
    found = []
    for sizes in split:
        coordinate = np.zeros([1] * len(box), np.int64)
        for at, (start, dim) in enumerate(itertools.islice(places, len(sizes))):
            stride = int(np.prod(sizes[at + 1 :]))
            index = np.full([1] * len(box), start)
            if dim is not None:
                shape = [-1 if other == dim else 1 for other in range(len(box))]
                index = (np.arange(*box[dim]) - block.param_start[dim] + start).reshape(shape)
            coordinate = coordinate + stride * index
        found.append(coordinate)
    return found

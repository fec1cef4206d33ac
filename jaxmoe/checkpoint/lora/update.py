r"""Low-rank updates of checkpoint tensors (LoRA, Hu et al. 2021), computed for the part of a tensor that is needed.

An adapted weight is :math:`W + s B A` with A [r, in] and B [out, r]. A device that holds a part of W needs the same
part of the product alone, which is rows of B times columns of A.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from jaxmoe.checkpoint.boxes import Box, box_shape, first_extended, intersect, join_dims
from jaxmoe.checkpoint.formats import Split


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LowRankUpdate:
    """One matrix of a checkpoint tensor to which scale·B·A, or its transpose, is added.

    Attributes:
        target: the checkpoint tensor.
        box: the matrix in it: of extent 1 in all dims but the last two.
        expert: the logical expert it belongs to, None if to none.
        a: name of the adapter's tensor A [rank rows, in].
        b: name of B [out, rank columns].
        rank_a: the rows of `a` that count.
        rank_b: the columns of `b` that count, in the same order.
        scale: the factor s.
        out_start: the row of `b` that makes the first output in the matrix.
        in_start: the column of `a` that makes the first input.
        transposed: whether the matrix is stored [in, out].
    """

    target: str
    box: Box
    expert: int | None
    a: str
    b: str
    rank_a: slice
    rank_b: slice
    scale: float
    out_start: int = 0
    in_start: int = 0
    transposed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class TensorDelta:
    """All updates of one tensor, and what computing them takes.

    Attributes:
        updates: updates of that tensor.
        factors: the adapter's tensors by name.
        dim_order: order of its dims in the file, as in `TensorInfo`: boxes and values here are in the order of the file.
        split: dims that the tensor's dims are split in, in those boxes; the updates know nothing of it.
    """

    updates: tuple[LowRankUpdate, ...]
    factors: Mapping[str, np.ndarray]
    dim_order: tuple[int, ...] | None = None
    split: Split = ()

    def of(self, box: Box) -> np.ndarray | None:
        """The float32 update of a region of the tensor, None where there is none."""
        order = self.dim_order or tuple(range(len(box)))
        part = tuple([dim for _, dim in sorted(zip(order, box, strict=True))])
        joined = join_dims(part, self.split) if self.split else part
        touching = [update for update in self.updates if intersect(joined, update.box) is not None]
        if not touching:
            return None
        values = delta_weight(touching, joined, self.factors)
        return (_cut(values, part, self.split) if self.split else values).transpose(order)


def _cut(values: np.ndarray, part: Box, split: Split) -> np.ndarray:
    """The values of `part`, of those of `join_dims(part, split)`."""
    dims = iter(part)
    shape: list[int] = []
    places: list[slice] = []
    for sizes in split:
        inner = [next(dims) for _ in sizes]
        outer = first_extended(inner) + 1
        shape += [*box_shape(tuple(inner[:outer])), *sizes[outer:]]
        places += [*[slice(None)] * outer, *[slice(*edges) for edges in inner[outer:]]]
    return values.reshape(shape)[tuple(places)]


def delta_weight(updates: Iterable[LowRankUpdate], box: Box, factors: Mapping[str, np.ndarray]) -> np.ndarray:
    r"""Compute :math:`\Delta W` of a region of a tensor.

    Args:
        updates: those of that tensor; of others they would be wrong. One that does not touch the region costs nothing.
        box: the region.
        factors: the adapter's tensors by name.

    Returns:
        float32, of the shape of the region; computed in float32 whatever the factors are.
    """
    result = np.zeros(box_shape(box), np.float32)
    for update in updates:
        part = intersect(box, update.box)
        if part is None:
            continue
        outs, ins = (_shifted(part, update.box, dim) for dim in ((-1, -2) if update.transposed else (-2, -1)))
        a = factors[update.a][update.rank_a, update.in_start + ins[0] : update.in_start + ins[1]]
        b = factors[update.b][update.out_start + outs[0] : update.out_start + outs[1], update.rank_b]
        # B takes the scale, and not the product: that would be one more array of the size of the region.
        delta = (np.float32(update.scale) * b.astype(np.float32)) @ a.astype(np.float32)
        place = [slice(*_shifted(part, box, dim)) for dim in range(len(box))]
        result[tuple(place)] += delta.T if update.transposed else delta
    return result


def _shifted(part: Box, box: Box, dim: int) -> tuple[int, int]:
    """The range of `part` along `dim`, counted from the corner of `box`."""
    start, stop = part[dim]
    return start - box[dim][0], stop - box[dim][0]

"""Blocks: pairs of a region of a checkpoint tensor and the region of a parameter that it fills."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from jaxmoe.checkpoint.boxes import Box, runs
from jaxmoe.checkpoint.formats import Split, TensorInfo
from jaxmoe.layers.param import ParamSpec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One region of one parameter and the region of one tensor that fills it.

    The two regions hold the same elements; tensor dim j runs along parameter dim ``dims[j]``, so that increasing
    `dims` keep the order of the elements and others transpose. A dim of extent 1 needs no partner on the other side:
    ``None`` in `dims`, or a parameter dim that `dims` does not name.

    Where one dim of a tensor holds what are several dims of a parameter, `tensor_split` says so: columns in which gate
    and up alternate are a dim 2F that is split in (F, 2). `tensor_start`, `dims` and `tensor_box` then count split dims.

    Attributes:
        param: path of the parameter.
        param_start: first element of the region, global.
        shape: extent of the region along each dim of the parameter.
        tensor: name of the tensor; None fills the region with zeros.
        tensor_shape: the shape that tensor must have.
        tensor_start: first element of the region of the tensor.
        dims: parameter dim that each tensor dim runs along.
        tensor_split: dims that each dim of `tensor_shape` is split in, outermost first; () where none is split.
            All blocks of a tensor split it alike.

    Example:
        Expert 7's down projection [D, F] into slot 3 of ``w_down`` [P, D, F]:

        >>> block = Block(
        ...     param="layers.0.moe.w_down", param_start=(3, 0, 0), shape=(1, 64, 32),
        ...     tensor="model.layers.0.mlp.experts.7.down_proj.weight", tensor_shape=(64, 32),
        ...     tensor_start=(0, 0), dims=(1, 2),
        ... )
        >>> block.tensor_box
        ((0, 64), (0, 32))
    """

    param: str
    param_start: tuple[int, ...]
    shape: tuple[int, ...]
    tensor: str | None = None
    tensor_shape: tuple[int, ...] = ()
    tensor_start: tuple[int, ...] = ()
    dims: tuple[int | None, ...] = ()
    tensor_split: Split = ()

    @property
    def split_shape(self) -> tuple[int, ...]:
        """The shape of the tensor with its dims split, that which `tensor_box` is in."""
        return tuple(itertools.chain(*self.tensor_split)) if self.tensor_split else self.tensor_shape

    @property
    def param_box(self) -> Box:
        """The region of the parameter."""
        return tuple([(start, start + size) for start, size in zip(self.param_start, self.shape, strict=True)])

    @property
    def tensor_box(self) -> Box:
        """The region of the tensor, its dims split."""
        return tuple(
            [
                (start, start + (1 if dim is None else self.shape[dim]))
                for start, dim in zip(self.tensor_start, self.dims, strict=True)
            ]
        )


def whole_tensor_blocks(
    spec: ParamSpec, name: str, info: TensorInfo | None = None, *, joined: tuple[int, int] | None = None
) -> list[Block]:
    """Blocks of a parameter that is one checkpoint tensor, or rows of it (`ParamSpec.rows`).

    Args:
        spec: the parameter, of shape [rows·g, ...] where the tensor has shape [source_groups·g, ...].
        name: the tensor.
        info: tensor that the checkpoint has under that name. It is asked only whether that has dims of size 1 more
            or less than the parameter; that it is there and has the right shape is checked by the plan.
        joined: (first row, rows in all) of a tensor that holds other parameters beside this one; None for one of its
            own.

    Returns:
        One block per run of consecutive rows that is also a run in the tensor.
    """
    shape = spec.shape
    regions = [(0, 0, *spec.shape[:1])]
    if spec.rows is not None:
        assert spec.source_groups is not None, f"{spec.path}: rows without source_groups"
        group = spec.shape[0] // len(spec.rows)
        shape = (spec.source_groups * group, *spec.shape[1:])
        regions = [(start * group, row * group, count * group) for start, row, count in runs(spec.rows)]
    dims: tuple[int | None, ...] = tuple(range(len(shape)))
    first_row = 0
    if joined is not None:
        first_row, shape = joined[0], (joined[1], *shape[1:])
    elif info is not None and info.shape != shape:
        shape, dims = _align(info.shape, shape) or (shape, dims)

    blocks = []
    for start, source, *size in regions:  # a scalar has no dim 0 and so no size
        region = Block(
            param=spec.path,
            param_start=(start, *[0] * len(spec.shape[1:])) if size else (),
            shape=(*size, *spec.shape[1:]),
        )
        if source >= 0:
            tensor_start = tuple([first_row + source if dim == 0 else 0 for dim in dims])
            region = dataclasses.replace(region, tensor=name, tensor_shape=shape, tensor_start=tensor_start, dims=dims)
        blocks.append(region)
    return blocks


def chunk_blocks(spec: ParamSpec, chunks: Sequence[tuple[int, TensorInfo]]) -> list[Block]:
    """Blocks of a parameter whose rows are in chunks, each a tensor: those of `whole_tensor_blocks`, cut where chunks end.

    Args:
        spec: parameter.
        chunks: first row of each chunk, and its tensor; in the order of rows.
    """
    blocks = []
    for block in whole_tensor_blocks(spec, spec.path):
        if block.tensor is None or not block.shape:
            own: dict[str, Any] = (
                {} if block.tensor is None else {"tensor": chunks[0][1].name, "tensor_shape": chunks[0][1].shape}
            )
            blocks.append(dataclasses.replace(block, **own))
            continue
        first, stop = block.tensor_start[0], block.tensor_start[0] + block.shape[0]
        for start, tensor in chunks:
            begin, end = max(first, start), min(stop, start + tensor.shape[0])
            if begin < end:
                blocks.append(
                    dataclasses.replace(
                        block,
                        param_start=(block.param_start[0] + begin - first, *block.param_start[1:]),
                        shape=(end - begin, *block.shape[1:]),
                        tensor=tensor.name,
                        # The dims behind the first as the parameter has them: the plan sees where the tensor's differ.
                        tensor_shape=(tensor.shape[0], *block.tensor_shape[1:]),
                        tensor_start=(begin - start, *block.tensor_start[1:]),
                    )
                )
    return blocks


def part_names(spec: ParamSpec, name: str) -> list[str]:
    """The tensors that have the rows of a parameter one after another, by a name with ``{part}`` in it."""
    return [name.replace("{part}", str(part)) for part in range(len(_part_rows(spec)))]


def part_blocks(spec: ParamSpec, name: str) -> list[Block]:
    """Blocks of a parameter whose rows are in several tensors, of equally many each but for the last."""
    starts = itertools.accumulate(_part_rows(spec), initial=0)
    return [
        Block(
            param=spec.path,
            param_start=(start, *[0] * len(spec.shape[1:])),
            shape=(rows, *spec.shape[1:]),
            tensor=tensor,
            tensor_shape=(rows, *spec.shape[1:]),
            tensor_start=(0,) * len(spec.shape),
            dims=tuple(range(len(spec.shape))),
        )
        for tensor, start, rows in zip(part_names(spec, name), starts, _part_rows(spec), strict=False)
    ]


def _part_rows(spec: ParamSpec) -> list[int]:
    """Rows of each part, as torch.chunk has them."""
    assert spec.parts is not None, f"{spec.path}: a name with {{part}} without parts"
    assert spec.rows is None, f"{spec.path}: parts of rows that are not the tensor's"
    size = -(-spec.shape[0] // spec.parts)
    return [min(size, spec.shape[0] - start) for start in range(0, spec.shape[0], size)]


def rows_on_disk(spec: ParamSpec) -> int:
    """Size of dim 0 of the checkpoint's tensor for a parameter, see `ParamSpec.rows`."""
    if spec.rows is None:
        return spec.shape[0]
    assert spec.source_groups is not None, f"{spec.path}: rows without source_groups"
    return spec.shape[0] // len(spec.rows) * spec.source_groups


def _align(tensor: tuple[int, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int | None, ...]] | None:
    """`tensor` and the dim of `shape` that each of its dims runs along, if they differ only in dims of size 1."""
    partners = [dim for dim, size in enumerate(shape) if size != 1]
    if [size for size in tensor if size != 1] != [shape[dim] for dim in partners]:
        return None
    left = iter(partners)
    return tensor, tuple([None if size == 1 else next(left) for size in tensor])

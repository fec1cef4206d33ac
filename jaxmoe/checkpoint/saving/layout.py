"""The arrays that a checkpoint becomes as an Orbax one: their shapes, dtypes and chunks, and what they are read from."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.errors import Problems
from jaxmoe.checkpoint.formats import DecodedTensor, StoredArray, can_cast
from jaxmoe.checkpoint.mapping import FamilyCheckpoint, MappedCheckpoint, abstract_model, hold_packed, pack_everything
from jaxmoe.checkpoint.saving.values import CheckpointValues
from jaxmoe.layers import ParamSpec, param_specs, part_specs
from jaxmoe.mesh import AXES
from jaxmoe.quant.packing import Packing

CHUNK_BYTES = 16 * 2**20
"""Most bytes of a chunk, unless a single row has more: with small ones Orbax reads little beside what a device needs."""
MOST_CHUNKS = 4096
"""Of a model for which that would be more files, chunks are larger."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """The arrays of a checkpoint to be, and what they are read from.

    Attributes:
        found: checkpoint that is converted.
        mapped: the same, mapped to the arrays.
        arrays: arrays by name.
        parameters: {path of a parameter: packed form, None of a plain one}.
        roles: {path of a packed parameter: names of its arrays by role}.
        asked: {path of a packed parameter: the form of activations that the source asks for, and a kernel's name of it}.
        ignored: {rule: tensors that are not needed}.
        dtype: dtype of plain weights by name.
        notes: sentences about what is not packed.
    """

    found: FamilyCheckpoint
    mapped: MappedCheckpoint
    arrays: dict[str, StoredArray]
    parameters: dict[str, Packing | None]
    roles: dict[str, dict[str, str]]
    asked: dict[str, dict[str, Any] | None]
    ignored: dict[str, tuple[str, ...]]
    dtype: np.dtype
    notes: tuple[str, ...]

    @classmethod
    def of(cls, found: FamilyCheckpoint, target: np.dtype | None) -> "ArrayLayout":
        """Lay out a checkpoint.

        Args:
            found: checkpoint.
            target: dtype of plain weights; None leaves each its own.

        Raises:
            CheckpointError: a tensor is missing, left over, or of the wrong shape or dtype.
        """
        dtype = target or np.dtype(jnp.dtype(found.config.dtype or _dtype_of_embedding(found)))
        found = found.decoding_to(dtype)
        model = abstract_model(found.config, sizes=dict.fromkeys(AXES, 1), dtype=dtype)
        specs = {spec.path: spec for spec in param_specs(model)}
        mapped = found.onto(specs)
        problems = Problems(f"the conversion of {found.checkpoint.path}")
        unused = mapped.check(problems)
        problems.raise_if_any()
        choice = pack_everything(model, mapped)
        parts = {path: part_specs(specs[path], packing) for path, packing in choice.packings.items()}
        held = hold_packed(mapped, choice.packings)
        values = CheckpointValues(held, {})
        packed = {part.path for own in parts.values() for part in own.values()}
        arrays = {}
        for path, spec in held.specs.items():
            box = tuple([(0, size) for size in spec.shape])
            own = spec.dtype if path in packed else _stored_dtype(values.dtype(path, box), spec, target)
            arrays[path] = StoredArray(path=path, shape=spec.shape, dtype=own, rows=0)
        plain = [{"values": spec} for path, spec in specs.items() if path not in parts]
        chunk_bytes = max(CHUNK_BYTES, sum(array.nbytes for array in arrays.values()) // MOST_CHUNKS)
        for together in [*parts.values(), *plain]:
            of = [arrays[part.path] for part in together.values()]
            rows = _rows_of_chunk(of, chunk_bytes, stack=len(together["values"].shape) > 2)
            for part in together.values():
                size = rows or max((1, *part.shape[:1]))
                arrays[part.path] = dataclasses.replace(arrays[part.path], rows=size)
        return cls(
            found=found,
            mapped=held,
            arrays=arrays,
            parameters={path: choice.packings.get(path) for path in specs},
            roles={path: {role: part.path for role, part in own.items()} for path, own in parts.items()},
            asked={path: _asked(mapped, path) for path in parts},
            ignored=unused.ignored,
            dtype=dtype,
            notes=(*found.notes, *choice.notes()),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def bytes_of(self, chunks: Collection[tuple[str, int]]) -> int:
        """Bytes of some chunks, each given by its array and first row."""
        sizes = {
            (path, start): int(np.prod(array.part(start), dtype=np.int64)) * array.dtype.itemsize
            for path, array in self.arrays.items()
            for start in array.starts
        }
        return sum(sizes[chunk] for chunk in chunks if chunk in sizes)


def _dtype_of_embedding(found: FamilyCheckpoint) -> str:
    """The dtype that `jaxmoe.load` takes where config.json has none."""
    tensor = found.checkpoint.tensors.get(found.family.tensors["embed.weight"][0])
    held = None if tensor is None or tensor.dtype is None else tensor.dtype.name
    return held if held in ("float32", "bfloat16", "float16") else "float32"


def _stored_dtype(held: np.dtype, spec: ParamSpec, target: np.dtype | None) -> np.dtype:
    """The dtype of a plain array: that of its tensors, of an index that of the parameter."""
    if not can_cast(held, np.dtype(np.float32)):
        return np.dtype(spec.dtype)
    return target if target is not None and spec.dtype == target else held


def _rows_of_chunk(arrays: Sequence[StoredArray], chunk_bytes: int, *, stack: bool) -> int | None:
    """Rows of dim 0 of a chunk: as many as `chunk_bytes` has room for, a divisor of all where that costs at most half.

    None for one chunk: of a packed matrix, whose arrays have rows of different blocks, and of what has no dims.
    """
    size = max(arrays[0].shape[:1], default=1)
    if not arrays[0].shape or (len(arrays) > 1 and not stack):
        return None
    rows = max(1, chunk_bytes * size // max(array.nbytes for array in arrays))
    if rows >= size:
        return None
    return next((one for one in range(rows, rows // 2, -1) if size % one == 0), rows)


def _asked(mapped: MappedCheckpoint, path: str) -> dict[str, Any] | None:
    """The form of activations that the source asks for of a packed parameter."""
    tensors = [mapped.checkpoint.tensors[block.tensor] for block in mapped.blocks[path] if block.tensor]
    asked = {tensor.weight.format.activations for tensor in tensors if isinstance(tensor, DecodedTensor)}
    if asked == {None}:
        return None
    if len(asked) == 1 and (one := next(iter(asked))) is not None:
        return {"asked": one.asked, "form": one.form}
    return {"asked": ", ".join(sorted("none" if one is None else one.asked for one in asked)), "form": None}

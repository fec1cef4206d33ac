"""The load plan: every byte that will be read and where it goes, decided and checked before the first is read."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxmoe.checkpoint.boxes import Box, box_of, box_shape, disjoint_union, intersect, union_volume, volume
from jaxmoe.checkpoint.errors import Problems
from jaxmoe.checkpoint.formats import Checkpoint, CheckpointFile, DecodedTensor, Split, TensorInfo
from jaxmoe.checkpoint.loading.report import AdapterReport
from jaxmoe.checkpoint.lora import TensorDelta
from jaxmoe.checkpoint.mapping import (
    Block,
    IgnoreRule,
    MappedCheckpoint,
    hold_packed,
    is_expert_stack,
    read_input_scales,
)
from jaxmoe.layers.param import ParamSpec
from jaxmoe.quant.packing import Packing


@dataclasses.dataclass(frozen=True)
class Shard:
    """One distinct part of one parameter on the devices of this process.

    Attributes:
        spec: the parameter.
        box: the part of it.
        devices: the local devices that hold this part; more than one are replicas.
        filled: elements of it that come from tensors; the rest are zeros.
    """

    spec: ParamSpec
    box: Box
    devices: tuple[jax.Device, ...]
    filled: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return box_shape(self.box)

    @property
    def nbytes(self) -> int:
        """Bytes of the part, on one device."""
        return volume(self.box) * self.spec.dtype.itemsize


class Copy(NamedTuple):
    """A region of a tensor that goes to a region of a shard.

    Attributes:
        shard: index in `LoadPlan.shards`.
        tensor_box: the region of the tensor.
        start: first element of the region of the shard, counted from the shard's own corner.
        dims: shard dim that each tensor dim runs along; see `Block`.
    """

    shard: int
    tensor_box: Box
    start: tuple[int, ...]
    dims: tuple[int | None, ...]


class Read(NamedTuple):
    """A region of a tensor that is read once, and the copies that all or part of it goes to.

    The regions of a plan's reads are disjoint. The tensor is as stored, with its dims split (`LoadPlan.splits`).
    """

    tensor: TensorInfo
    box: Box
    copies: tuple[Copy, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        dtype = self.tensor.dtype
        assert dtype is not None
        return volume(self.box) * dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """The bytes that this process reads of a checkpoint, and the places where it puts them; made by `make_load_plan`.

    Attributes:
        path: the checkpoint.
        files: its files as they were when the plan was made.
        specs: the parameters.
        shards: the distinct parts of them that local devices hold, grouped by parameter.
        reads: disjoint regions of tensors, in the order of their files.
        bytes_needed: bytes on disk of the union of all regions that some local shard needs.
        bytes_per_device: {device id: bytes of all its shards}, local devices only.
        expert_bytes_per_device: the same for expert stacks alone, padding slots included.
        ignored: {rule name: tensors that it covers}.
        splits: {tensor: dims that its dims are split in}, for those that are; see `Block`.
        deltas: {tensor: update that is added to it on the way}, where an adapter is merged; see `merge_adapter`.
        adapter: report of that adapter.
    """

    path: Path
    files: tuple[CheckpointFile, ...]
    specs: tuple[ParamSpec, ...]
    shards: tuple[Shard, ...]
    reads: tuple[Read, ...]
    bytes_needed: int
    bytes_per_device: dict[int, int]
    expert_bytes_per_device: dict[int, int]
    ignored: dict[str, tuple[str, ...]]
    splits: Mapping[str, Split] = dataclasses.field(default_factory=dict)
    deltas: Mapping[str, TensorDelta] = dataclasses.field(default_factory=dict)
    adapter: AdapterReport | None = None


def make_load_plan(
    checkpoint: Checkpoint,
    specs: Iterable[ParamSpec],
    blocks: Iterable[Block],
    *,
    ignore: Sequence[IgnoreRule] = (),
    expert_params: Collection[str] = (),
    local_devices: Collection[jax.Device] | None = None,
    complete: bool = True,
) -> LoadPlan:
    """Plan the loading of a checkpoint from blocks of any making, and prove that it is complete; see `plan_load`.

    Args:
        checkpoint: checkpoint from `open_checkpoint`.
        specs: parameters to fill.
        blocks: regions that fill them; together they cover every parameter element exactly once, and every element of every
            tensor that no rule ignores at least once.
        ignore: rules for tensors that are not needed; the first that matches counts, and a tensor that a block
            names is never ignored.
        expert_params: paths of the parameters that are expert stacks, for the report.
        local_devices: the devices to read for; by default those of this process.
        complete: False for a part of a model, which may leave tensors over.

    Returns:
        The plan for those devices. The checks do not depend on them: all processes accept or refuse alike.

    Raises:
        CheckpointError: a tensor is missing, left over, or of the wrong shape or dtype; a parameter is filled
            twice or not everywhere, or does not divide over its mesh axes. One error for all of them.
    """
    mapped = MappedCheckpoint.of(checkpoint, specs, blocks, ignore, complete=complete)
    return plan_load(mapped, expert_params=expert_params, local_devices=local_devices)


def plan_load(
    mapped: MappedCheckpoint,
    *,
    expert_params: Collection[str] = (),
    local_devices: Collection[jax.Device] | None = None,
) -> LoadPlan:
    """Plan the loading of a mapped checkpoint; arguments and errors otherwise as for `make_load_plan`."""
    checkpoint, specs = mapped.checkpoint, tuple(mapped.specs.values())
    problems = Problems(f"the load plan of {checkpoint.path}")
    unused = mapped.check(problems)
    placed = [_local_parts(spec, local_devices, problems) for spec in specs]
    problems.raise_if_any()

    splits = mapped.splits()
    tensors = {name: tensor.split(splits.get(name, ())) for name, tensor in checkpoint.tensors.items()}
    shards: list[Shard] = []
    copies: dict[str, list[Copy]] = defaultdict(list)
    for spec, parts in zip(specs, placed, strict=True):
        own = _blocks_within(parts, mapped.blocks[spec.path], len(spec.shape))
        for (box, devices), blocks in zip(parts.items(), own, strict=True):
            filled = _copies_into(box, len(shards), blocks, tensors, copies)
            shards.append(Shard(spec, box, devices, filled))
    reads = [read for name, targets in copies.items() for read in _reads_of(tensors[name].as_stored(), targets)]
    reads.sort(key=lambda read: (read.tensor.file, read.tensor.offset))
    needed = sum(_bytes_needed(tensors[name].as_stored(), targets) for name, targets in copies.items())
    return LoadPlan(
        path=checkpoint.path,
        files=checkpoint.files,
        specs=specs,
        shards=tuple(shards),
        reads=tuple(reads),
        bytes_needed=needed,
        bytes_per_device=_bytes_per_device(shards),
        expert_bytes_per_device=_bytes_per_device([shard for shard in shards if shard.spec.path in expert_params]),
        ignored=unused.ignored,
        splits=splits,
    )


def plan_packed(mapped: MappedCheckpoint, packings: Mapping[str, Packing]) -> LoadPlan:
    """Plan the loading of a whole model, some of whose parameters stay packed.

    Args:
        mapped: checkpoint mapped to the parameters as plain arrays.
        packings: packed forms by path, from `choose_packings`; none where all are plain.

    Raises:
        CheckpointError: as `plan_load`.
    """
    if not packings:
        return plan_load(mapped, expert_params=[path for path in mapped.specs if is_expert_stack(path)])
    problems = Problems(f"the load plan of {mapped.checkpoint.path}")
    unused = mapped.check(problems)
    problems.raise_if_any()
    packed = hold_packed(mapped, packings)
    plan = plan_load(packed, expert_params=[path for path in packed.specs if is_expert_stack(path)])
    read = read_input_scales(mapped, packings)
    ignored = {rule: tuple(name for name in names if name not in read) for rule, names in unused.ignored.items()}
    return dataclasses.replace(plan, ignored={rule: names for rule, names in ignored.items() if names})


def _local_parts(
    spec: ParamSpec, local_devices: Collection[jax.Device] | None, problems: Problems
) -> dict[Box, tuple[jax.Device, ...]]:
    """The distinct parts of a parameter on local devices, and who holds each."""
    local = spec.sharding.addressable_devices if local_devices is None else set(local_devices)
    try:
        places = spec.sharding.devices_indices_map(spec.shape)
    except ValueError:
        problems.add(
            f"{spec.path} {spec.shape} does not divide over the mesh axes of {spec.sharding.spec} on "
            f"{dict(spec.sharding.mesh.shape)}; pad it, or choose another mesh"
        )
        return {}
    parts: dict[Box, list[jax.Device]] = defaultdict(list)
    for device, index in places.items():
        if device in local:
            box = box_of(index, spec.shape)
            parts[box].append(device)
    return {box: tuple(devices) for box, devices in parts.items()}


def _blocks_within(boxes: Iterable[Box], blocks: Sequence[Block], ndim: int) -> Iterator[list[Block]]:
    """For each box of a parameter of `ndim` dims the blocks of tensors that have a part of it."""
    filled = [block for block in blocks if block.tensor is not None]
    starts = np.array([block.param_start for block in filled], np.int64).reshape(len(filled), ndim)
    stops = starts + np.array([block.shape for block in filled], np.int64).reshape(len(filled), ndim)
    for box in boxes:
        # All blocks at once: a stack has one for each expert, and a shard is of few of them.
        low, high = np.array(box, np.int64).reshape(ndim, 2).T
        yield [filled[index] for index in np.flatnonzero(((starts < high) & (low < stops)).all(axis=1))]


def _copies_into(
    shard_box: Box,
    shard: int,
    blocks: Sequence[Block],
    tensors: Mapping[str, TensorInfo],
    copies: dict[str, list[Copy]],
) -> int:
    """Note the copies that fill one shard, by tensor; returns how many elements they fill."""
    filled = 0
    for block in blocks:
        part = intersect(shard_box, block.param_box)
        if part is None or block.tensor is None:
            continue
        filled += volume(part)
        tensor_box = []
        for start, dim in zip(block.tensor_start, block.dims, strict=True):
            if dim is None:
                tensor_box.append((start, start + 1))
            else:
                shift = start - block.param_start[dim]
                tensor_box.append((part[dim][0] + shift, part[dim][1] + shift))
        # In the order of the file, in which it is read.
        order = tensors[block.tensor].dim_order or range(len(tensor_box))
        dims = tuple([block.dims[dim] for dim in order])
        tensor_box = [tensor_box[dim] for dim in order]
        corner = tuple([a - origin for (a, _), (origin, _) in zip(part, shard_box, strict=True)])
        copies[block.tensor].append(Copy(shard, tuple(tensor_box), corner, dims))
    return filled


def _reads_of(tensor: TensorInfo, copies: Sequence[Copy]) -> list[Read]:
    if len(copies) == 1:
        return [Read(tensor, copies[0].tensor_box, (copies[0],))]
    boxes = disjoint_union(tuple(copy.tensor_box for copy in copies))
    return [Read(tensor, box, tuple([c for c in copies if intersect(box, c.tensor_box) is not None])) for box in boxes]


def _bytes_needed(tensor: TensorInfo, copies: Sequence[Copy]) -> int:
    # Counted on its own and not from the reads, so that comparing it with what was read means something.
    if isinstance(tensor, DecodedTensor):
        stored = [tensor.stored_boxes(copy.tensor_box) for copy in copies]
        parts = [(tensor.parts[role], tuple(dict.fromkeys([boxes[role] for boxes in stored]))) for role in stored[0]]
        return sum([union_volume(part.shape, found) * part.dtype.itemsize for part, found in parts if part.dtype])
    assert tensor.dtype is not None
    return union_volume(tensor.shape, tuple(copy.tensor_box for copy in copies)) * tensor.dtype.itemsize


def _bytes_per_device(shards: Sequence[Shard]) -> dict[int, int]:
    result: dict[int, int] = defaultdict(int)
    for shard in shards:
        for device in shard.devices:
            result[device.id] += shard.nbytes
    return dict(sorted(result.items()))

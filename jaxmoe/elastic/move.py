"""`move`: a running model goes to another mesh, another number of experts' devices, or fewer devices than it had."""

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import jax
from jax.sharding import Mesh

from jaxmoe.checkpoint.loading import LoadReport, bytes_per_device, load_arrays, plan_load
from jaxmoe.checkpoint.mapping import FamilyCheckpoint, hold_packed, is_expert_stack, layer_index
from jaxmoe.checks import instance_of
from jaxmoe.elastic.adapters import move_adapters, plan_factors
from jaxmoe.elastic.assemble import assemble
from jaxmoe.elastic.relocate import Relocation, plan_relocation
from jaxmoe.layers import (
    ParamSpec,
    check_usable,
    pack_params,
    packings_of,
    param_specs,
    params_by_path,
    part_specs,
    unpacked_specs,
)
from jaxmoe.layers.swap import by_rank, fill_slots
from jaxmoe.layers.usable import mark_moved
from jaxmoe.mesh import EP, check_mesh
from jaxmoe.models import Decoder
from jaxmoe.models.kernels import try_kernels
from jaxmoe.models.parts import held_forms
from jaxmoe.placement import ExpertPlacement
from jaxmoe.quant.packing import Packing


def move(
    model: Decoder,
    *,
    mesh: Mesh,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
    lost_devices: Collection[jax.Device] = (),
) -> Decoder:
    """Bring a model to another mesh over the same devices, some of them, or others; logits stay within rounding.

    Weights go from device to device. Only what no surviving device has is read, from the checkpoint
    the model came from: an expert whose every replica was on `lost_devices`, a slice over tp that only they had.

    Args:
        model: model that is used up: its parameters are let go one by one as they arrive, so that at most one of them
            is there twice. Where `move` raises a ValueError it is untouched.
        mesh: mesh from `jaxmoe.make_mesh`; give it ``devices=`` for a part of them.
        placement: placement for the devices of the new mesh, as for `jaxmoe.load`.
        lost_devices: devices whose memory is gone; nothing is taken from them, and `mesh` has none of them.

    Returns:
        The model on the new mesh. Its `load_report` tells what was read. A recording of routing that is active goes on;
        replicas are chosen as in a loaded model ("modulo").

    Raises:
        ValueError: the model does not fit the mesh, the placement does not, the new mesh has a lost device, or
            weights are lost and the model came from no checkpoint, or from one with an adapter merged, or a trace is
            being replayed.
        NotImplementedError: one of the meshes spans several processes.

    Example:
        >>> model = jaxmoe.load("demo", mesh=jaxmoe.make_mesh(ep=8))
        >>> half = jaxmoe.make_mesh(ep=4, devices=jax.devices()[:4])
        >>> model = jaxmoe.move(model, mesh=half)
        >>> model.placements[0].ep, model.load_report.bytes_read
        (4, 0)
    """
    instance_of("model", model, Decoder, "a model from jaxmoe.load")
    check_mesh(mesh)
    start = time.perf_counter()
    check_usable(model)
    _check_devices(model.mesh, mesh, lost_devices)
    if model.replay is not None:
        raise ValueError("a trace is being replayed on this model: move it outside of `with model.replay_routing(...)`")
    moved = _empty_on(model, mesh, placement)
    plain = {spec.path: spec for spec in param_specs(moved)}
    held = packings_of(model)
    packings = {path: _cut_to(plain[path], packing) for path, packing in held.items()}
    pack_params(moved, plain.values(), packings)
    try_kernels(moved, mesh, model.dtype, model.kernels)
    now, new = {spec.path: spec for spec in param_specs(model)}, {spec.path: spec for spec in param_specs(moved)}
    plain_now = {spec.path: spec for spec in unpacked_specs(now.values(), held, model.dtype)}
    # Scales are looked at in the blocks that they are to have.
    old = now | {
        part.path: part
        for spec in plain_now.values()
        if spec.path in packings
        for part in part_specs(spec, packings[spec.path]).values()
    }
    relocations = {path: plan_relocation(old[path], spec, lost_devices) for path, spec in new.items()}
    lost = {path for path, relocation in relocations.items() if relocation.lost}
    lost_slots = _lost_slots(relocations)
    read, report = _read_lost(model, moved, plain, packings, lost, lost_slots)

    factors = plan_factors(model, plain_now, plain, lost_devices)

    old_params, new_params = params_by_path(model), params_by_path(moved)
    mark_moved(model)
    for path, spec in new.items():
        param = old_params[path]
        if path in read and not is_expert_stack(path):
            new_params[path].set_value(read.pop(path))
        else:
            repeats = tuple([b // a for a, b in zip(now[path].shape, old[path].shape, strict=True)])
            value = assemble(param.get_value(), spec, relocations[path], repeats)
            new_params[path].set_value(jax.block_until_ready(value))
        param.set_value(jax.ShapeDtypeStruct(now[path].shape, now[path].dtype, sharding=now[path].sharding))
    for path, experts in read.items():
        index = _layer(path)
        moe, stack = moved.layers[index].moe, new_params[path]
        stack.set_value(fill_slots(stack.get_value(), experts, by_rank(lost_slots[index], moe.placement), moe))
    arrays = {path: param.get_value() for path, param in new_params.items()}
    moved.load_report = dataclasses.replace(
        report,
        seconds=time.perf_counter() - start,
        held=held_forms(moved, moved.dtype),
        bytes_per_device=bytes_per_device(arrays.values()),
        expert_bytes_per_device=bytes_per_device(arrays[path] for path in arrays if is_expert_stack(path)),
    )
    move_adapters(model, moved, factors)
    return moved


def _check_devices(old: Mesh, new: Mesh, lost_devices: Collection[jax.Device]) -> None:
    if old.is_multi_process or new.is_multi_process:
        raise NotImplementedError(
            "a model moves between the devices of one process, and one of the meshes spans several; load the "
            "checkpoint on the new mesh instead"
        )
    gone = sorted(device.id for device in new.devices.flat if device in lost_devices)
    if gone:
        raise ValueError(f"the new mesh has devices {gone}, which are among lost_devices; make it of the others")


def _empty_on(
    model: Decoder, mesh: Mesh, placement: str | ExpertPlacement | Sequence[str | ExpertPlacement]
) -> Decoder:
    # A model without routed experts may be moved too.
    first = model.moe_layers[0] if model.moe_layers else None
    moved = Decoder(
        model.config,
        mesh=mesh,
        placement=placement,
        dispatch=model.dispatch,
        dtype=model.dtype,
        origin=model.origin,
        expert_axes=(EP,) if first is None else first.expert_axes,
        kernels=model.kernels,
    )
    # A `with model.record_routing()` that is open goes on with the moved model, and ends for both.
    moved.record_with(model.recorder)
    return moved


def _cut_to(spec: ParamSpec, packing: Packing) -> Packing:
    """The packed form of a parameter in blocks that no device's part of it cuts."""
    *_, N, K = spec.sharding.shard_shape(spec.shape)
    group = spec.shape[0] // len(spec.rows) if spec.rows is not None and len(spec.shape) == 2 else N
    return packing.cut((math.gcd(N, group), K))


def _lost_slots(relocations: Mapping[str, Relocation]) -> dict[int, list[int]]:
    """By layer, the slots of the new placement whose expert is lost, wholly or in part, in some stack."""
    slots: dict[int, set[int]] = defaultdict(set)
    for path, relocation in relocations.items():
        if is_expert_stack(path) and relocation.lost:
            slots[_layer(path)] |= relocation.lost
    return {layer: sorted(lost) for layer, lost in slots.items()}


def _read_lost(
    model: Decoder,
    moved: Decoder,
    plain: Mapping[str, ParamSpec],
    packings: Mapping[str, Packing],
    lost: Collection[str],
    lost_slots: Mapping[int, Sequence[int]],
) -> tuple[dict[str, jax.Array], LoadReport]:
    """Read what no device has any more from the checkpoint.

    Returns:
        Whole parameters by path; of expert stacks only the lost slots of each device, as a smaller stack.
    """
    if not lost:
        return {}, _NOTHING_READ
    if model.origin is None or model.origin.adapted or model.origin.quantized:
        done = "quantized" if model.origin is not None and model.origin.quantized else "merged with an adapter"
        why = "it came from no checkpoint" if model.origin is None else f"its weights were {done} when they were loaded"
        raise ValueError(
            f"the lost devices alone had {len(lost)} parameters or parts of them, {min(lost)} the first, and the model "
            f"cannot read them again: {why}; load it anew"
        )
    # An array of a packed parameter is read with the others of it.
    parts = {
        part.path: path for path, packing in packings.items() for part in part_specs(plain[path], packing).values()
    }
    gone = {parts.get(path, path) for path in lost}
    wanted = {path: plain[path] for path in gone if not is_expert_stack(path)}
    for path, spec in plain.items():
        if is_expert_stack(path) and _layer(path) in lost_slots:
            index = _layer(path)
            wanted[path] = _fewer_slots(spec, by_rank(lost_slots[index], moved.layers[index].moe.placement))
    mapped = (
        FamilyCheckpoint.open(model.origin.path, mtp=model.config.mtp is not None)
        .onto({**plain, **wanted})
        .part(wanted)
    )
    return load_arrays(plan_load(hold_packed(mapped, {path: packings[path] for path in wanted if path in packings})))


def _layer(expert_stack: str) -> int:
    """The layer of an expert stack, by its path."""
    index = layer_index(expert_stack)
    assert index is not None, f"{expert_stack}: experts outside a layer"
    return index


def _fewer_slots(stack: ParamSpec, places: Sequence[Sequence[int]]) -> ParamSpec:
    """An expert stack with those slots of each device alone, as many on each."""
    assert stack.rows is not None
    most, per_rank = max(map(len, places)), len(stack.rows) // len(places)
    rows: list[int] = []
    for rank, own in enumerate(places):
        rows += [stack.rows[rank * per_rank + place] for place in own] + [-1] * (most - len(own))
    return dataclasses.replace(stack, shape=(len(rows), *stack.shape[1:]), rows=tuple(rows))


_NOTHING_READ = LoadReport(
    bytes_read=0,
    bytes_needed=0,
    seconds=0.0,
    tensors_read=0,
    bytes_per_device={},
    expert_bytes_per_device={},
    ignored={},
)

"""Weights that are quantized as they are loaded: layer by layer, on the devices that hold them."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.checkpoint.errors import CheckpointError, Problems
from jaxmoe.checkpoint.formats import DTYPE_NAMES
from jaxmoe.checkpoint.loading.execute import load_arrays
from jaxmoe.checkpoint.loading.plan import LoadPlan, plan_load
from jaxmoe.checkpoint.loading.report import LoadReport, bytes_per_device
from jaxmoe.checkpoint.mapping import MappedCheckpoint, is_expert_stack, layer_index, linear_kind
from jaxmoe.kernels.grouped_matmul import dequantize
from jaxmoe.kernels.grouped_matmul.quantize import quantize
from jaxmoe.layers import ParamSpec, pack_params, packable_params, packings_of, part_specs
from jaxmoe.models import Decoder
from jaxmoe.quant.encode import STACKED, TARGETS, QuantizationLoss
from jaxmoe.quant.packing import Packing


def pack_as(model: Decoder, mapped: MappedCheckpoint, target: str) -> None:
    """Make the parameters of an abstract model that `load_quantized` quantizes packed ones.

    Args:
        model: model without values, all of its parameters plain.
        mapped: checkpoint mapped to them.
        target: name in `jaxmoe.quant.encode.TARGETS`.

    Raises:
        CheckpointError: a device's part of a weight cannot be packed so.
    """
    pack_params(model, mapped.specs.values(), _choose_targets(model, mapped, target))


def _choose_targets(model: Decoder, mapped: MappedCheckpoint, target: str) -> dict[str, Packing]:
    """The parameters that are quantized, with their packed forms: linear layers of attention, MLPs and experts."""
    encoder, packable = TARGETS[target], packable_params(model)
    kinds = STACKED.get((model.config.model_type, target), encoder).kinds
    problems = Problems(f"quantizing {mapped.checkpoint.path} to {target}")
    dtypes = {role: DTYPE_NAMES[dtype] for role, dtype in encoder.dtypes(model.dtype).items()}
    packings = {}
    for path, spec in mapped.specs.items():
        if linear_kind(path) not in kinds or path not in packable:
            continue
        *_, N, K = spec.sharding.shard_shape(spec.shape)
        packing = encoder.format.packing(dtypes, spec.shape)
        assert packing is not None, f"{target} has no packed form"
        packing = packing.cut((N, K))
        wrong = encoder.check_shape(spec.shape)
        if wrong is None and (packing.block[1] or K) % packing.per_byte:
            wrong = f"a device's part of {N} by {K} cuts bytes of two numbers"
        bits = packing.bits_per_number(spec.shape)
        if wrong is None and bits >= 8 * model.dtype.itemsize:
            wrong = (
                f"a device's part of {N} by {K} allows blocks of {packing.block}, which take {bits:.0f} bits a number"
            )
        if wrong is not None:
            problems.add(f"{path}: {wrong}; take fp8_block or int8, or another mesh")
        packings[path] = packing
    problems.raise_if_any()
    if not packings:
        raise CheckpointError(
            f"quantizing to {target} needs linear layers of attention, MLPs or experts; there are none"
        )
    return packings


def load_quantized(
    model: Decoder,
    mapped: MappedCheckpoint,
    target: str,
    whole: LoadPlan,
    *,
    check_finite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    placed: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, jax.Array], LoadReport]:
    """Load a checkpoint and quantize its linear layers; one layer at a time is there in plain numbers.

    Args:
        model: model without values, packed by `pack_as`.
        mapped: checkpoint mapped to its parameters as plain arrays.
        target: name in `jaxmoe.quant.encode.TARGETS`.
        whole: plan of loading all of it plain, which has proved that it is complete.
        check_finite, progress: arguments as for `load_arrays`.
        placed: function as for `load_arrays`, called when a layer has been quantized.

    Returns:
        {path: array}, and the report.

    Raises:
        CheckpointError: a file cannot be read, or a weight is not finite.
    """
    packings = packings_of(model)
    layers: dict[int | None, dict[str, ParamSpec]] = defaultdict(dict)
    for path, spec in mapped.specs.items():
        layers[layer_index(path)][path] = spec
    arrays: dict[str, jax.Array] = {}
    losses: dict[tuple[int, str], list[tuple[int, np.ndarray]]] = defaultdict(list)
    reports: list[LoadReport] = []
    for layer, specs in layers.items():
        done = sum(report.bytes_read for report in reports)

        def on_bytes(count: int, total: int, done: int = done) -> None:
            del total
            if progress is not None:
                progress(min(done + count, whole.bytes_needed), whole.bytes_needed)

        plain, report = load_arrays(plan_load(mapped.part(specs)), check_finite=check_finite, progress=on_bytes)
        reports.append(report)
        held: dict[str, jax.Array] = {}
        for path in list(plain):
            value = plain.pop(path)
            if path not in packings:
                held[path] = value
                continue
            parts, loss = _quantized(value, specs[path], packings[path])
            if not np.isfinite(loss).all():
                raise CheckpointError(
                    f"{path}: values must be finite to be quantized; there is NaN or infinity among them"
                )
            held |= parts
            assert layer is not None, f"{path}: a linear layer of no layer"
            losses[layer, linear_kind(path)].append((_matrices(specs[path]), loss))
        if placed is not None:
            for device, size in bytes_per_device(held.values()).items():
                placed(device, size)
        arrays |= held
    return arrays, dataclasses.replace(
        reports[0],
        bytes_read=sum(report.bytes_read for report in reports),
        bytes_needed=whole.bytes_needed,
        seconds=sum(report.seconds for report in reports),
        tensors_read=sum(report.tensors_read for report in reports),
        bytes_per_device=bytes_per_device(arrays.values()),
        expert_bytes_per_device=bytes_per_device(arrays[path] for path in arrays if is_expert_stack(path)),
        ignored=whole.ignored,
        quantized=target,
        losses=_losses(losses),
    )


def _quantized(value: jax.Array, spec: ParamSpec, packing: Packing) -> tuple[dict[str, jax.Array], np.ndarray]:
    """The arrays of one parameter by path, and sums of its differences."""
    parts = part_specs(spec, packing)
    shardings = {role: part.sharding for role, part in parts.items()}
    everywhere = NamedSharding(spec.sharding.mesh, PartitionSpec())
    # Of a function that stays the same JAX finds what it compiled for the layers before.
    run = jax.jit(_pack, static_argnames="packing", out_shardings=(shardings, everywhere))
    arrays, sums = jax.block_until_ready(run(value, packing=packing))
    return {parts[role].path: array for role, array in arrays.items()}, np.asarray(sums, np.float64)


def _pack(value: jax.Array, *, packing: Packing) -> tuple[dict[str, jax.Array], jax.Array]:
    block = packing.units("scale", value.shape)
    stack = quantize(value, format=packing.format, block=block, scales=jnp.dtype(packing.dtype("scale")))
    wide = value.astype(jnp.float32)
    difference = dequantize(stack) - wide
    # Of each matrix, because the largest error is told beside the largest value of the same weight.
    most, largest = (jnp.max(jnp.abs(numbers), axis=(-2, -1)) for numbers in (difference, wide))
    worst = jnp.max(most / jnp.where(largest == 0, 1, largest))
    sums = [jnp.sum(jnp.square(difference)), jnp.sum(jnp.square(wide)), worst]
    return {"values": stack.values, "scale": stack.scales}, jnp.stack(sums)


def _matrices(spec: ParamSpec) -> int:
    """The matrices that a parameter holds, those of padding slots left out."""
    *lead, _, _ = spec.shape
    if not lead or spec.rows is None:
        return math.prod(lead)
    return math.prod(lead[1:]) * sum(expert >= 0 for expert in spec.rows)


def _losses(found: Mapping[tuple[int, str], Sequence[tuple[int, np.ndarray]]]) -> tuple[QuantizationLoss, ...]:
    losses = []
    for (layer, kind), parts in found.items():
        squares, of_values, _ = np.sum([sums for _, sums in parts], axis=0)
        worst, weights = max(sums[2] for _, sums in parts), sum(count for count, _ in parts)
        rms = float(np.sqrt(squares / (of_values or 1.0)))
        losses.append(QuantizationLoss(layer=layer, kind=kind, weights=weights, rms=rms, max=float(worst)))
    return tuple(sorted(losses, key=lambda loss: loss.layer))

"""The adapters that a model holds beside its weights, on their way to other devices with the model."""

import dataclasses
from collections.abc import Collection, Mapping

import jax

from jaxmoe.checkpoint.loading import add_adapters, bytes_per_device
from jaxmoe.elastic.assemble import assemble
from jaxmoe.elastic.relocate import Relocation, plan_relocation
from jaxmoe.layers import ParamSpec, factor_specs, held_factors, held_ranks, hold_factor
from jaxmoe.models import Decoder

# Spec of a factor on its new devices, and the way there, by path.
FactorPlan = dict[str, tuple[ParamSpec, Relocation]]


def plan_factors(
    model: Decoder,
    old: Mapping[str, ParamSpec],
    new: Mapping[str, ParamSpec],
    lost_devices: Collection[jax.Device],
) -> FactorPlan:
    """Find a holder for every part of the factors of the model's adapters.

    Args:
        model: model that is to move.
        old: specs of its parameters as plain arrays, by path.
        new: specs of them on the new devices.
        lost_devices: devices whose memory is gone.

    Raises:
        ValueError: a part is lost, and an adapter's directory is no longer there to read it again.
    """
    if model.adapter_places is None:
        return {}
    places, plan = model.adapter_places.held, {}
    for path, rank in held_ranks(model).items():
        pairs = [factor_specs(specs[path], len(places), rank) for specs in (old, new)]
        for before, after in zip(*pairs, strict=True):
            plan[after.path] = after, plan_relocation(before, after, lost_devices)
    if _is_lost(plan):
        for adapter in places:
            if adapter is not None and not adapter.path.is_dir():
                raise ValueError(
                    f"the lost devices alone had a part of the adapter {adapter.name!r}, and {adapter.path} is no longer "
                    "there to read it again; remove the adapter with jaxmoe.remove_adapter, or bring the directory back"
                )
    return plan


def move_adapters(model: Decoder, moved: Decoder, plan: FactorPlan) -> None:
    """Bring the factors to the model that has moved; where some are lost, all are read again from their directories."""
    if model.adapter_places is None:
        return
    if _is_lost(plan):
        held = {adapter.name: adapter.path for adapter in model.adapter_places.held if adapter is not None}
        add_adapters(moved, held, room=len(model.adapter_places.held))
        return
    factors = held_factors(model)
    for path, (spec, relocation) in plan.items():
        old = factors[path].get_value()
        hold_factor(moved, path, jax.block_until_ready(assemble(old, spec, relocation)))
        factors[path].set_value(jax.ShapeDtypeStruct(old.shape, old.dtype, sharding=old.sharding))
    moved.adapter_places = model.adapter_places
    sizes = bytes_per_device(factor.get_value() for factor in held_factors(moved).values())
    reports = {} if model.load_report is None else model.load_report.adapters
    moved.load_report = dataclasses.replace(moved.load_report, adapters=reports, adapter_bytes_per_device=sizes)


def _is_lost(plan: FactorPlan) -> bool:
    return any(relocation.lost for _, relocation in plan.values())

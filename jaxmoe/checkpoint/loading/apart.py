"""LoRA adapters beside the weights of a running model: added and removed without reading the weights again."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats import is_stored
from jaxmoe.checkpoint.loading.merge import count_by_kind, read_factors, updates_of
from jaxmoe.checkpoint.loading.report import AdapterReport, bytes_per_device
from jaxmoe.checkpoint.lora import Adapter, LowRankUpdate, ParamFactors, factors_of_params, open_adapter
from jaxmoe.checkpoint.mapping import FamilyCheckpoint, MappedCheckpoint, Spellings
from jaxmoe.checks import instance_of, integer, path_like
from jaxmoe.distributed import check_same
from jaxmoe.layers import (
    ParamSpec,
    adaptable_params,
    check_usable,
    factor_specs,
    held_factors,
    held_ranks,
    make_room,
    packings_of,
    param_specs,
    unpacked_specs,
    write_adapter,
)
from jaxmoe.models import AdapterPlaces, Decoder, Family, HeldAdapter

MAX_RANK = 64


def add_adapter(
    model: Decoder, name: str, path: str | Path, *, room: int | None = None, rank: int | None = None
) -> None:
    """Hold a LoRA adapter beside the weights of a model, for prompts that choose it by name.

    The factors of a matrix lie on the devices as the matrix does: A is split where its inputs are and B where its outputs
    are, and those of an expert are in each of its slots. Packed weights stay packed. Nothing of the base is read again but
    the headers of its files. An adapter that fits into a free place compiles no program of the model again; where the model
    has no place left, or none for its rank or one of its matrices, the factors grow and programs are compiled anew.

    Args:
        model: model from `jaxmoe.load`.
        name: name for `jaxmoe.generate` and for a call of the model.
        path: directory as PEFT's ``save_pretrained`` writes it.
        room: number of adapters that there is to be room for in all; None for as many as there are.
        rank: rank that there is to be room for, up to 64; None for the adapter's.

    Raises:
        FileNotFoundError: no adapter there, or a file of it is missing.
        ValueError: the adapter is not of this model, or it is more than low-rank updates of matrices inside of layers; or
            the name is taken.
    """
    path_like("path", path)
    add_adapters(model, {name: path}, room=room, rank=rank)


def add_adapters(
    model: Decoder, adapters: Mapping[str, str | Path], *, room: int | None = None, rank: int | None = None
) -> None:
    """Do what `add_adapter` does for several adapters; all of them are held in the end, or none."""
    instance_of("model", model, Decoder, "a model from jaxmoe.load")
    check_usable(model)
    if model.origin is None:
        raise ValueError("an adapter is of a checkpoint's tensors, and this model came from none; use jaxmoe.load")
    places = list((model.adapter_places or AdapterPlaces()).held)
    room = len(places) if room is None else integer("room", room, least=1)
    rank = 0 if rank is None else integer("rank", rank, least=1, most=MAX_RANK)
    for name in adapters:
        if not isinstance(name, str) or not name:
            raise ValueError(f"an adapter's name is a text of at least one character; got {name!r}")
        if name in model.adapters:
            raise ValueError(f"each adapter has a name of its own, and {name!r} is taken; remove that one first")
    if is_stored(model.origin.path):
        refuse_stored(model.origin.path)
    opened = {name: open_adapter(path) for name, path in adapters.items()}
    if model.mesh.is_multi_process:
        check_same({"adapters": [(name, one.config, sorted(one.file.tensors)) for name, one in opened.items()]})

    specs = {spec.path: spec for spec in unpacked_specs(param_specs(model), packings_of(model), model.dtype)}
    found = FamilyCheckpoint.open(model.origin.path, mtp=model.config.mtp is not None)
    mapped = found.onto(specs)
    params = {name: _params_of(model, adapter, mapped, found.family) for name, adapter in opened.items()}
    read = {name: _read(adapter, params[name]) for name, adapter in opened.items()}

    ranks = _ranks(params.values(), held_ranks(model), rank)
    free = [number for number, adapter in enumerate(places) if adapter is None]
    places += [None] * max(len(opened) - len(free), room - len(places))
    make_room(model, specs, ranks, len(places))
    numbers = iter([number for number, adapter in enumerate(places) if adapter is None])
    reports = {}
    for name, one in read.items():
        number = next(numbers)
        values = {path: held.values(one.factors, ranks[path]) for path, held in params[name].params.items()}
        write_adapter(model, specs, values, number)
        places[number] = HeldAdapter(name, opened[name].path)
        reports[name] = one.report
    model.adapter_places = AdapterPlaces(places)
    _report(model, {**_reports(model), **reports})


def refuse_stored(path: Path) -> None:
    """Refuse an adapter of a checkpoint of Orbax arrays.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"an adapter changes tensors by the names of the original checkpoint, and {path} has a model's parameters as Orbax "
        "arrays; load the original with the adapter, or merge it first (jaxmoe convert ORIGINAL MERGED "
        "--adapter DIR) and convert what comes of it --to orbax"
    )


def remove_adapter(model: Decoder, name: str) -> None:
    """Stop holding an adapter; its place stays for the next one, and so does the memory of it.

    Args:
        model: model from `jaxmoe.load`.
        name: name that the adapter was added with.

    Raises:
        ValueError: there is none of that name.
    """
    instance_of("model", model, Decoder, "a model from jaxmoe.load")
    places = model.adapter_places or AdapterPlaces()
    number = places.number(name)
    held = (*places.held[:number], None, *places.held[number + 1 :])
    model.adapter_places = AdapterPlaces(held)
    _report(model, {other: report for other, report in _reports(model).items() if other != name})


def plan_factors(
    model: Decoder, adapters: Mapping[str, str | Path], mapped: MappedCheckpoint, family: Family
) -> list[ParamSpec]:
    """Give the specs of the factors that a model would hold with these adapters; headers alone are read.

    Args:
        model: model without weights.
        adapters: directories by name.
        mapped: checkpoint mapped to the model's parameters as plain arrays.
        family: family of the model.

    Raises:
        FileNotFoundError, CheckpointError: as `add_adapter`.
    """
    ranks = _ranks([_params_of(model, open_adapter(path), mapped, family) for path in adapters.values()], {}, 0)
    return [spec for path, rank in ranks.items() for spec in factor_specs(mapped.specs[path], len(adapters), rank)]


class _Changes(NamedTuple):
    """The tensors of a checkpoint that an adapter changes, and the factors of parameters by path."""

    updates: list[LowRankUpdate]
    params: dict[str, ParamFactors]


class _ReadAdapter(NamedTuple):
    """An adapter whose factors have been read."""

    factors: Mapping[str, np.ndarray]
    report: AdapterReport


def _params_of(model: Decoder, adapter: Adapter, mapped: MappedCheckpoint, family: Family) -> _Changes:
    if adapter.whole:
        raise CheckpointError(
            f"{adapter.path}: an adapter beside the weights has low-rank factors only; this one has whole tensors, such as "
            f"{next(iter(adapter.whole))!r} (modules_to_save); merge it: jaxmoe.load(..., adapter=DIR)"
        )
    adaptable = adaptable_params(model)
    specs = {path: spec for path, spec in mapped.specs.items() if path in adaptable}
    try:
        spellings, tensors = Spellings(family), mapped.checkpoint.tensors
        updates = updates_of(adapter, mapped.checkpoint, lambda name: spellings.find(name, tensors))
        used = list(mapped.used_blocks())
        _check_used(updates, {name for name, _ in used})
        params = factors_of_params(updates, [block for _, block in used], specs)
    except CheckpointError as error:
        raise CheckpointError(f"{adapter.path}: {error}") from None
    highest = max((factors.rank for factors in params.values()), default=0)
    if highest > MAX_RANK:
        raise CheckpointError(
            f"{adapter.path}: an adapter beside the weights has ranks up to {MAX_RANK}; this one has {highest}; merge it: "
            "jaxmoe.load(..., adapter=DIR)"
        )
    return _Changes(updates, params)


def _ranks(adapters: Iterable[_Changes], held: Mapping[str, int], rank: int) -> dict[str, int]:
    """The rank to make room for, by path: a matrix that has several pairs of factors has room for `rank` of each."""
    ranks = dict(held)
    for changes in adapters:
        for path, factors in changes.params.items():
            ranks[path] = max(ranks.get(path, 0), factors.pairs * max(factors.rank, rank))
    return ranks


def _read(adapter: Adapter, changes: _Changes) -> _ReadAdapter:
    names = {name for update in changes.updates for name in (update.a, update.b)}
    factors, bytes_read = read_factors(adapter.file, names)
    report = AdapterReport(
        path=str(adapter.path),
        factors=len(adapter.factors),
        bytes_read=bytes_read,
        merged=count_by_kind(update.target for update in changes.updates),
    )
    return _ReadAdapter(factors, report)


def _check_used(updates: list[LowRankUpdate], used: set[str]) -> None:
    for update in updates:
        if update.target not in used:
            raise CheckpointError(
                f"what an adapter changes must be in the model; {update.target!r} is not; train the adapter without it"
            )


def _reports(model: Decoder) -> dict[str, AdapterReport]:
    return {} if model.load_report is None else dict(model.load_report.adapters)


def _report(model: Decoder, adapters: dict[str, AdapterReport]) -> None:
    if model.load_report is not None:
        sizes = bytes_per_device(factor.get_value() for factor in held_factors(model).values())
        model.load_report = dataclasses.replace(model.load_report, adapters=adapters, adapter_bytes_per_device=sizes)

"""Inputs of packed parameters: the form that a checkpoint asks for of them, and whether a kernel rounds to it."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from jaxmoe.checkpoint.formats import DecodedTensor
from jaxmoe.checkpoint.mapping.mapped import MappedCheckpoint
from jaxmoe.models.parts import part_of
from jaxmoe.quant.packing import Packing


def round_inputs(
    mapped: MappedCheckpoint, packings: Mapping[str, Packing], decoded: Collection[str]
) -> tuple[dict[str, Packing], dict[str, str]]:
    """Choose the forms that inputs of packed parameters are rounded to: those that the checkpoint asks for.

    Args:
        mapped: checkpoint mapped to the parameters as plain arrays.
        packings: form of the parameters that stay packed, by path.
        decoded: paths of other parameters that are quantized.

    Returns:
        The packed forms with those of inputs, and {path: reason} of what the checkpoint asks for and is not done.
    """
    chosen, reasons = dict(packings), {}
    for path in (*packings, *decoded):
        asked = {tensor.weight.format.activations for tensor in _weights_of(mapped, path)}
        if asked == {None}:
            continue
        names = sorted({"none" if one is None else one.asked for one in asked})
        form = next(one.form for one in asked if one is not None)
        if len(names) > 1:
            reasons[path] = (
                f"the checkpoint asks for different forms of activations in parts of one: {', '.join(names)}"
            )
        elif form is None:
            reasons[path] = f"the checkpoint asks for {names[0]}, a form that no kernel rounds to"
        elif path not in packings:
            reasons[path] = f"the checkpoint asks for {names[0]}, which goes with weights that stay packed"
        else:
            packing = dataclasses.replace(packings[path], activations=form)
            lacking = _lacking(mapped, path) if packing.input_scales else None
            if lacking is None:
                chosen[path] = packing
            else:
                reasons[path] = f"the checkpoint asks for {names[0]}; {lacking}"
    for path in packings:
        if path.endswith(".moe.w_gate_up"):
            # The two products of experts are one call, which rounds for both or for none.
            both = [path, path.removesuffix("w_gate_up") + "w_down"]
            if len({chosen[one].activations if one in chosen else None for one in both}) > 1:
                for one in both:
                    if one in chosen and chosen[one].activations is not None:
                        chosen[one] = dataclasses.replace(chosen[one], activations=None)
                        reasons[one] = (
                            "the two products of an expert are rounded for alike, and the other has no such form"
                        )
    return chosen, reasons


def asked_activations(mapped: MappedCheckpoint) -> dict[str, tuple[str, ...]]:
    """Find the forms of activations that a checkpoint asks for, in words, and the parts of the model that ask for each."""
    asked: dict[str, dict[str, None]] = {}
    for path in mapped.specs:
        for tensor in _weights_of(mapped, path):
            if (activations := tensor.weight.format.activations) is not None:
                asked.setdefault(activations.asked, {})[part_of(path)] = None
    return {words: tuple(parts) for words, parts in asked.items()}


def read_input_scales(mapped: MappedCheckpoint, packings: Mapping[str, Packing]) -> set[str]:
    """Find the tensors that the scales of inputs of packed parameters are read from."""
    parts = [
        tensor.parts["input_scale"]
        for path, packing in packings.items()
        if packing.input_scales
        for tensor in _weights_of(mapped, path)
    ]
    places = {(part.file, part.offset) for part in parts}
    return {name for name, tensor in mapped.checkpoint.tensors.items() if (tensor.file, tensor.offset) in places}


def _lacking(mapped: MappedCheckpoint, path: str) -> str | None:
    """The reason why a parameter has no scales of its inputs that could be used."""
    problems = (tensor.weight.input_scale_problem() for tensor in _weights_of(mapped, path))
    return next(filter(None, problems), None)


def _weights_of(mapped: MappedCheckpoint, path: str) -> Iterator[DecodedTensor]:
    """The quantized weights that fill a parameter."""
    for block in mapped.blocks[path]:
        tensor = mapped.checkpoint.tensors.get(block.tensor or "")
        if isinstance(tensor, DecodedTensor):
            yield tensor

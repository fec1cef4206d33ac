"""The form that a checkpoint's settings ask for of the inputs of its quantized layers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.quant.packing import ROW_FORMS, is_static


@dataclasses.dataclass(frozen=True)
class Activations:
    """The form that the inputs of a layer are to be rounded to before its product.

    Attributes:
        asked: the form in words, as settings ask for it.
        form: the same as a name in `ROW_FORMS`; None where no kernel rounds rows so.
    """

    asked: str
    form: str | None = None

    @classmethod
    def of(cls, form: str) -> "Activations":
        """The activations of a form that kernels have."""
        return cls(ROW_FORMS[form], form)

    @property
    def is_static(self) -> bool:
        """Whether kernels have the form, and the scales are the checkpoint's."""
        return is_static(self.form)


def blocks_of(size: int, *, powers: bool = False) -> Activations:
    """Activations of fp8 with a scale for each so many inputs, which follows from them.

    >>> blocks_of(128).form, blocks_of(32).form, blocks_of(32).asked
    ('fp8_block', None, 'fp8 with a scale for each 32 inputs')
    """
    if size == 128:
        return Activations.of("fp8_block_e8m0" if powers else "fp8_block")
    return Activations(f"fp8 with a scale for each {size} inputs{', a power of two' if powers else ''}")


def of_arguments(settings: Mapping[str, Any]) -> Activations | None:
    """The activations that a block ``input_activations`` of compressed-tensors asks for; None where it asks for none."""
    if not settings:
        return None
    bits, kind = settings.get("num_bits", 8), settings.get("type", "int")
    dynamic, size = settings.get("dynamic", False), settings.get("group_size")
    strategy = settings.get("strategy") or "tensor"
    name = {"float": "fp8", "int": "int8"}.get(str(kind)) if bits == 8 else None
    even = settings.get("symmetric", True) is not False
    if name and even and strategy == "token" and dynamic is True:
        return Activations.of(f"{name}_token")
    if name and even and strategy == "tensor" and dynamic is False:
        return Activations.of(f"{name}_static")
    if name == "fp8" and even and strategy == "group" and dynamic is True and isinstance(size, int):
        return blocks_of(size)
    how = {True: "dynamic", False: "static"}.get(dynamic, str(dynamic))
    words = [f"{bits}-bit {kind}", f"{how} scales of {'groups of ' + str(size) if size else strategy}"]
    return Activations(", ".join([*words, *([] if even else ["zero points"])])[:80])


def describe_asked(asked: Mapping[str, Sequence[str]]) -> list[str]:
    """Say what activations a checkpoint asks for, a sentence each.

    Args:
        asked: parts of a model that ask for a form, by its words.

    >>> describe_asked({"int8 with a scale for each token": ["attention"], "4-bit float": ["routed experts"]})[1]
    'asks for activations in 4-bit float (routed experts), a form that no kernel rounds to'
    """
    more = {True: ', which loading with activations="checkpoint" rounds to', False: ", a form that no kernel rounds to"}
    return [
        f"asks for activations in {words} ({', '.join(parts)}){more[words in ROW_FORMS.values()]}"
        for words, parts in asked.items()
    ]

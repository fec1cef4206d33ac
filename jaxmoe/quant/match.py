"""Match the tensors of a checkpoint with the formats that its settings declare, by headers alone."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from jaxmoe.quant.base import Part, QuantFormat, Shape, swap_last
from jaxmoe.quant.errors import QuantizationError, raise_problems
from jaxmoe.quant.formats import FORMATS
from jaxmoe.quant.infer import PLAIN, infer_format
from jaxmoe.quant.names import may_be_absent
from jaxmoe.quant.rules import Quantization
from jaxmoe.quant.weights import Header, QuantizedWeight

_CACHE_SCALE = re.compile(r".*[._](k|v|q|kv|prob)_scale")
# Ends of names of tensors with values, with what the plain tensor's name has in their place.
_ENDS = (
    (".weight_packed", ".weight"),
    (".qweight", ".weight"),
    (".weight", ".weight"),
    ("_blocks", ""),
    (".blocks", ""),
)
# Ends of names of parts that no plain tensor has.
_PARTS = tuple(
    sorted(
        {
            suffix
            for form in FORMATS.values()
            for part in form.parts
            if part.role != "values"
            for suffix in part.suffixes
        }
        - {".scale", ".scales"}
    )
)


@dataclasses.dataclass(frozen=True)
class MatchedTensors:
    """The quantized weights among the tensors of a checkpoint.

    Attributes:
        weights: quantized weights, by the name of the plain tensor that each stands for.
        parts: name of the weight that a stored tensor is part of, by the tensor's name.
        unused: tensors that belong to the quantization and no value depends on, such as scales of activations and of
            the cache, with the reason.
        notes: sentences for a report.
    """

    weights: Mapping[str, QuantizedWeight]
    parts: Mapping[str, str]
    unused: Mapping[str, str]
    notes: tuple[str, ...]


def _refuse_mlx(headers: Mapping[str, Header]) -> None:
    """Refuse by name what would else be a problem of every weight.

    Raises:
        QuantizationError: weights are words of 32 bits with scales and biases of groups, as MLX packs them.
    """
    for name, header in headers.items():
        module = name.removesuffix(".weight")
        if header.dtype_name == "U32" and {f"{module}.scales", f"{module}.biases"} <= headers.keys():
            raise QuantizationError(
                f"weights such as {name!r} (U32, with scales and biases) are packed by MLX for Apple's GPUs, which jaxmoe "
                "does not decode; take the model's bfloat16 release, or one in a format that jaxmoe decodes"
            )


def match_tensors(
    headers: Mapping[str, Header],
    quantization: Quantization | None,
    *,
    wanted: Callable[[str], bool] | None = None,
) -> MatchedTensors:
    """Find every quantized weight among a checkpoint's tensors, and check it against the settings.

    Weights that settings would have quantized and that are plain stay so, where settings speak of classes or groups of
    modules: a checkpoint does not tell what is of a class. Everything else that settings say otherwise is an error.

    Args:
        headers: headers of all tensors, by name.
        quantization: declaration of the checkpoint's files; None to tell formats by the tensors.
        wanted: test of the name of a plain tensor that is to be loaded; others are not checked. All are by default.

    Raises:
        QuantizationError: tensors contradict the settings or one another: all problems in one message.
    """
    weights: dict[str, QuantizedWeight] = {}
    parts: dict[str, str] = {}
    unused: dict[str, str] = {}
    problems: list[str] = []
    _refuse_mlx(headers)
    for weight, header in _candidates(headers):
        if weight in weights or (wanted is not None and not wanted(weight)):
            continue
        form, problem = _format_of(weight, header, headers, quantization)
        if form is not None:
            stored, problem = _gather(weight, form, headers)
            if problem is None:
                weights[weight], problem = _checked(weight, form, stored)
            parts.update((one.name, weight) for one in stored.values())
            idle = [part.role for part in form.parts if not part.decoded and part.role in stored]
            unused.update((stored[role].name, f"no value of {weight} depends on it") for role in idle)
        if problem is not None:
            problems.append(problem)
    for name in headers:
        if name not in parts and _CACHE_SCALE.fullmatch(name):
            unused[name] = "it scales a cache of keys and values, which is not quantized"
        elif name not in parts and name.endswith(_PARTS):
            problem = _orphan(name, headers, wanted)
            problems += [problem] if problem else []
    problems += _plain_problems(headers, quantization, wanted)
    absent = quantization.rules.ignored.unused(headers) if quantization else []
    problems += _ignored_problems(quantization, absent) if weights else []
    source = f"quantization {quantization.method} of {quantization.source}" if quantization else "quantization by names"
    raise_problems(source, problems)
    return MatchedTensors(weights, parts, unused, _notes(quantization, absent))


def _candidates(headers: Mapping[str, Header]) -> Iterator[tuple[str, Header]]:
    """Names of plain tensors that may be stored quantized, each with the header of the tensor with its values."""
    for name, header in headers.items():
        for end, plain in _ENDS:
            if name.endswith(end):
                if end != plain or header.dtype_name not in PLAIN or f"{name}.absmax" in headers:
                    yield name.removesuffix(end) + plain, header
                break
        else:
            # A stack of experts is a parameter of its own name.
            if header.dtype_name.startswith("F8_E") and len(header.shape) > 2 and "_scale" not in name:
                yield name, header


def _format_of(
    weight: str, header: Header, headers: Mapping[str, Header], quantization: Quantization | None
) -> tuple[QuantFormat | None, str | None]:
    """The format of a weight, or why it has none."""
    if quantization is None:
        form = infer_format(weight, headers)
        return (
            form,
            None if form else f"{header.name!r} ({header.dtype_name}) is in no format that is known by its tensors",
        )
    named, form = quantization.rules.named(weight.removesuffix(".weight"))
    if form is not None and header.name in form.parts[0].names(weight):
        return form, None
    seen = infer_format(weight, headers)
    if not named and form is None and seen is not None:
        # Settings that name the experts alone do not speak of the rest.
        return seen, None
    seen_as = f"they look like {seen.describe()}" if seen else f"they are {header.dtype_name}"
    said = f"in {form.describe()}" if form else "not quantized"
    return None, f"the settings say that {weight!r} is {said}; its tensors say otherwise: {seen_as} ({header.name!r})"


def _gather(weight: str, form: QuantFormat, headers: Mapping[str, Header]) -> tuple[dict[str, Header], str | None]:
    """The stored parts of a weight, and what is missing among them."""
    stored: dict[str, Header] = {}
    missing: list[Part] = []
    for part in form.parts:
        found = [headers[name] for name in part.names(weight) if name in headers]
        if found:
            stored[part.role] = found[0]
        elif part.required:
            missing.append(part)
    if not missing:
        return stored, None
    expected = [part.names(weight)[0] for part in missing]
    return stored, f"{weight!r} is in {form.describe()}, and {', '.join(map(repr, expected))} is missing"


def _checked(weight: str, form: QuantFormat, stored: dict[str, Header]) -> tuple[QuantizedWeight, str | None]:
    whole = QuantizedWeight(weight, form, stored, None)
    values = stored["values"]
    if len(values.shape) not in form.ranks:
        return whole, f"{values.name!r} has shape {values.shape}, which is none of {form.describe()}"
    told = _told(form, tuple((role, header.dtype_name, header.shape) for role, header in stored.items()))
    if told is None or not told[1]:
        return QuantizedWeight(weight, form, stored, told and told[0]), None
    return whole, whole.problems(told[0])[0]


# The experts of a checkpoint repeat the same few shapes thousands of times.
@lru_cache(maxsize=4096)
def _told(form: QuantFormat, stored: tuple[tuple[str, str, Shape], ...]) -> tuple[Shape, bool] | None:
    """The shape of the plain tensor by its parts, and whether one of them is wrong; None where they do not tell it."""
    matrices = form.shape_of({role: shape for role, _, shape in stored})
    if matrices is None:
        return None
    shape: Shape = swap_last(matrices) if form.transposed else matrices
    headers = {role: _Stored(role, dtype, size) for role, dtype, size in stored}
    return shape, bool(QuantizedWeight("", form, headers, None).problems(shape))


class _Stored(NamedTuple):
    name: str
    dtype_name: str
    shape: Shape


def _orphan(name: str, headers: Mapping[str, Header], wanted: Callable[[str], bool] | None) -> str | None:
    """The problem of a scale or another part that belongs to no quantized weight; None if it is none."""
    base = name.removesuffix(next(end for end in sorted(_PARTS, key=len, reverse=True) if name.endswith(end)))
    weight = base + ".weight"
    if any(other in headers for other in (weight, base)) or (wanted is not None and not wanted(weight)):
        return None
    return f"{name!r} is part of a quantized weight, and {weight!r} is not there"


def _plain_problems(
    headers: Mapping[str, Header], quantization: Quantization | None, wanted: Callable[[str], bool] | None
) -> list[str]:
    """The problems of weights that settings name one by one as quantized, and that are plain."""
    found = []
    for module, form in (quantization.rules.modules if quantization else {}).items():
        header = headers.get(f"{module}.weight")
        if header is not None and header.dtype_name in PLAIN and (wanted is None or wanted(header.name)):
            found.append(
                f"the settings say that {header.name!r} is in {form.describe()}; its tensor says otherwise: it is "
                f"{header.dtype_name}"
            )
    return found


def _ignored_problems(quantization: Quantization | None, absent: list[str]) -> list[str]:
    """The problem of an ignore list none of whose entries names a tensor or what it is in."""
    entries = quantization.rules.ignored.entries if quantization else ()
    if len(absent) < len(entries) or all(may_be_absent(entry) for entry in entries):
        return []
    return [
        f"none of the {len(entries)} entries of the ignore list names a module of this checkpoint; the first is "
        f"{entries[0]!r:.80}"
    ]


def _notes(quantization: Quantization | None, absent: list[str]) -> tuple[str, ...]:
    if quantization is None:
        return ("formats are told by names, dtypes and shapes: no file declares them",)
    strange = [entry for entry in absent if not may_be_absent(entry)]
    more = (
        f"{len(strange)} entries of the ignore list name no module, the first is {strange[0]!r:.80}"
        if strange
        else None
    )
    return (*quantization.notes, *([more] if more else []))

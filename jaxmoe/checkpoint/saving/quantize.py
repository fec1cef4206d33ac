"""Weights that are quantized on the way to a file: those that are, the tensors that they become, and what is lost."""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.checkpoint.errors import CheckpointError, Problems
from jaxmoe.checkpoint.formats import DTYPE_NAMES
from jaxmoe.checkpoint.mapping import layer_index, linear_kind
from jaxmoe.checkpoint.saving.outputs import OutputTensor
from jaxmoe.models import Family, Form
from jaxmoe.quant import QuantizationError
from jaxmoe.quant.base import swap_last
from jaxmoe.quant.encode import STACKED, TARGETS, Encoder, ErrorSum, QuantizationLoss
from jaxmoe.quant.names import Names


@dataclasses.dataclass(frozen=True)
class Quantizing:
    """A format for the linear layers of a checkpoint, and those that it leaves out.

    Attributes:
        target: name of the format for users; one of `TARGETS`.
        ignored: modules that are left plain beside those that always are.
    """

    target: str
    ignored: Names

    @classmethod
    def checked(cls, target: str | None, ignore: Sequence[str]) -> "Quantizing | None":
        """Check what a caller asks for; None where weights are to be plain.

        Args:
            target: name of the format.
            ignore: names of modules, or "re:" and an expression.

        Raises:
            ValueError: there is no such format, or an entry is no name, or it is for weights that are plain.
        """
        if isinstance(ignore, str):
            raise ValueError(f"ignore is a list of names of modules; got {ignore!r}")
        if target is None:
            if ignore:
                raise ValueError(f"ignore names what quantize is to leave plain, and quantize is None; got {ignore!r}")
            return None
        if target not in TARGETS:
            raise ValueError(f"quantize is one of {', '.join(TARGETS)}, or None to leave weights plain; got {target!r}")
        return cls(target, Names(ignore))

    def encoder(self, family: Family, form: Form) -> Encoder:
        """The encoder for a family whose experts are written in that form."""
        own = STACKED.get((family.model_type, self.target)) if form == "fused" else None
        return own or TARGETS[self.target]


class QuantizedOutputs:
    """The tensors of a checkpoint whose linear layers are quantized.

    Args:
        plain: tensors as they would be written.
        carried: tensors that are copied as they are.
        how: format, and modules that are left out.
        family: family of the model.
        form: form that its experts are written in.

    Attributes:
        tensors: tensors to write, the parts of a weight next to each other.
        settings: block ``quantization_config`` of config.json.
        input_scales: number of static scales of activations among the tensors: one of each weight, or none.

    Raises:
        CheckpointError: a weight cannot be quantized so, or an entry of `ignore` names none.
    """

    def __init__(
        self,
        plain: Sequence[OutputTensor],
        carried: Sequence[OutputTensor],
        how: Quantizing,
        family: Family,
        form: Form,
    ) -> None:
        encoder = how.encoder(family, form)
        self._errors: dict[tuple[int, str], list[ErrorSum]] = defaultdict(list)
        self.tensors: list[OutputTensor] = []
        problems, eligible = Problems(f"quantizing to {how.target}"), []
        scales: list[OutputTensor | None] = []
        # A tied head has no tensor, and readers have a module all the same.
        left = [_module(name) for name in family.tensors["lm_head.weight"][:1]]
        for tensor in plain:
            module, kind = _module(tensor.name), _kind_of(tensor)
            if kind in encoder.kinds:
                eligible.append(module)
            if kind not in encoder.kinds or how.ignored.matches(module):
                left += [module] if _may_be_linear(tensor) else []
                self.tensors.append(tensor)
                continue
            problem = _problem(tensor, how, family, encoder)
            if problem is None:
                error, layer = ErrorSum(), layer_index(tensor.params[0])
                assert layer is not None, f"{tensor.name}: a {kind} weight of no layer"
                self._errors[layer, kind].append(error)
                self.tensors += _parts(tensor, encoder, error)
                scales.append(_scale_of_inputs(tensor, encoder))
            else:
                problems.add(problem)
        for entry in how.ignored.unused(eligible):
            problems.add(f"ignore has {entry!r}, which names no weight that would be quantized; leave it out")
        problems.raise_if_any()
        if not self._errors:
            raise CheckpointError(
                f"quantizing to {how.target} needs a weight to quantize; ignore names every one of them"
            )
        left += [_module(tensor.name) for tensor in carried if _may_be_linear(tensor)]
        left = list(dict.fromkeys(left))
        static = None if None in scales else encoder.static_settings(left)
        self.settings: dict[str, Any] = static or encoder.settings(left)
        self.input_scales = 0 if static is None else len(scales)
        self.tensors += [scale for scale in scales if scale is not None] if static else []

    def losses(self) -> tuple[QuantizationLoss, ...]:
        """The differences by layer and kind, once all tensors are written."""
        found = []
        for (layer, kind), errors in self._errors.items():
            squares = sum(error.squares for error in errors)
            of_values = sum(error.of_values for error in errors)
            rms, most = math.sqrt(squares / (of_values or 1.0)), max(error.max for error in errors)
            found.append(QuantizationLoss(layer=layer, kind=kind, weights=len(errors), rms=rms, max=most))
        return tuple(sorted(found, key=lambda loss: loss.layer))


class _Encoded:
    """The arrays of one weight, made when the first is asked for and given away one by one."""

    def __init__(self, tensor: OutputTensor, encoder: Encoder, error: ErrorSum) -> None:
        self._tensor, self._encoder, self._error = tensor, encoder, error
        self._arrays: dict[str, np.ndarray] = {}

    def take(self, role: str) -> np.ndarray:
        """The array of that role; each is given once."""
        if not self._arrays:
            values = self._tensor.values()
            matrices = values.swapaxes(-1, -2) if self._encoder.format.transposed else values
            try:
                self._arrays = self._encoder.encode(matrices, self._error)
            except QuantizationError as error:
                raise CheckpointError(f"{self._tensor.name!r}: {error}") from error
        return self._arrays.pop(role)


def _parts(tensor: OutputTensor, encoder: Encoder, error: ErrorSum) -> list[OutputTensor]:
    """The tensors that stand for a quantized weight."""
    shape = swap_last(tensor.shape) if encoder.format.transposed else tensor.shape
    encoded, dtypes, extras = _Encoded(tensor, encoder, error), encoder.dtypes(tensor.dtype), encoder.extras(shape)
    found = []
    for part in encoder.format.parts:
        if part.role in dtypes:
            size, dtype = encoder.format.shapes(part.role, shape)[0], dtypes[part.role]
            values = functools.partial(encoded.take, part.role)
        elif part.role in extras:
            size, dtype = extras[part.role].shape, extras[part.role].dtype
            values = functools.partial(extras.__getitem__, part.role)
        else:
            continue
        found.append(
            OutputTensor(
                name=part.names(tensor.name)[0],
                dtype_name=DTYPE_NAMES[dtype],
                shape=size,
                nbytes=math.prod(size) * dtype.itemsize,
                values=values,
                params=tensor.params,
            )
        )
    return found


def _scale_of_inputs(tensor: OutputTensor, encoder: Encoder) -> OutputTensor | None:
    """The static scale of a weight's inputs as a tensor; None where it has none, or its format no place for one."""
    part = next((part for part in encoder.format.parts if part.role == "input_scale"), None)
    if part is None or tensor.input_scale is None:
        return None
    scale = np.array(tensor.input_scale, np.float32)
    return OutputTensor(
        name=part.names(tensor.name)[0],
        dtype_name=DTYPE_NAMES[scale.dtype],
        shape=scale.shape,
        nbytes=scale.nbytes,
        values=lambda: scale,
        params=tensor.params,
    )


def _problem(tensor: OutputTensor, how: Quantizing, family: Family, encoder: Encoder) -> str | None:
    """The reason why a weight cannot be quantized, with the way out; None if it can."""
    stack = len(tensor.shape) > 2 or not tensor.name.endswith(".weight")
    if stack and not encoder.stacks:
        return (
            f"{how.target} is of one tensor for each expert; {tensor.name!r} {tensor.shape} holds all experts of a layer; "
            f"{_other_form(family)}"
        )
    wrong = encoder.check_shape(swap_last(tensor.shape) if encoder.format.transposed else tensor.shape)
    if wrong is None:
        return None
    return f"{wrong} ({tensor.name!r} {tensor.shape}); take fp8_block, or leave it out by ignore"


def _other_form(family: Family) -> str:
    """The way out where a checkpoint is to have all experts of a layer in one tensor."""
    if family.experts.per_expert(0):
        return 'take form "per_expert"'
    own = [target for model_type, target in STACKED if model_type == family.model_type]
    more = f"take {' or '.join(own)}, which {family.model_type} has a form of its own for, or " if own else ""
    return f"{more}leave experts out by ignore, for readers know no other form of {family.model_type}"


def _kind_of(tensor: OutputTensor) -> str:
    """The kind of linear layer that a tensor is of, "" for what is none."""
    kinds = {linear_kind(path) for path in tensor.params}
    return kinds.pop() if len(kinds) == 1 else ""


def _may_be_linear(tensor: OutputTensor) -> bool:
    """Whether a reader may take a plain tensor for the weight of a linear layer."""
    return len(tensor.shape) >= 2 and tensor.name.endswith(".weight") and "embed.weight" not in tensor.params


def _module(name: str) -> str:
    return name.removesuffix(".weight")

"""The report of a save: what was written, and what of quantized weights was not."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxmoe.checkpoint.formats import DecodedTensor
from jaxmoe.checkpoint.mapping import UNREAD_RULE, MappedCheckpoint
from jaxmoe.models import Form
from jaxmoe.models.parts import part_of
from jaxmoe.quant.encode import QuantizationLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveReport:
    """The files, tensors and bytes that were written.

    Attributes:
        path: directory of the checkpoint.
        form: form of its experts.
        files: {name of a file of weights: its tensors' bytes}.
        tensors: number of tensors.
        dtypes: {element type: bytes}, as safetensors names them.
        carried: tensors that the model does not use, copied as they were.
        left_out: files and folders of the source that are not in the copy. The tokenizer and chat templates always are.
        seconds: wall-clock time.
        quantized: name of the format that linear layers are quantized to; None where weights are plain.
        losses: differences that quantizing made, by layer and kind of weights.
        input_scales: number of static scales of activations that were written beside quantized weights.
        notes: sentences about quantized weights that are written as plain numbers, and about scales that are not written.
    """

    path: str
    form: Form
    files: dict[str, int]
    tensors: int
    dtypes: dict[str, int]
    carried: int
    left_out: tuple[str, ...]
    seconds: float
    quantized: str | None = None
    losses: tuple[QuantizationLoss, ...] = ()
    input_scales: int = 0
    notes: tuple[str, ...] = ()

    @property
    def bytes_written(self) -> int:
        """Bytes of tensor data."""
        return sum(self.files.values())

    def with_notes(
        self, quantized: Collection[str], static: Collection[str], ignored: Mapping[str, Sequence[str]]
    ) -> "SaveReport":
        """Give a report that also tells what is not written of the quantized weights that this was made from.

        Args:
            quantized: paths of parameters that are quantized where they come from.
            static: paths of those whose inputs have static scales there.
            ignored: tensors of the source that its model does not have, by rule.
        """
        notes = []
        if quantized and self.quantized is None:
            notes.append(
                f"quantized weights ({_parts(quantized)}) are written as plain numbers; quantize= writes quantized ones"
            )
        if static and not self.input_scales:
            why = 'quantize="fp8_block" alone writes them, those of fp8, where each quantized weight has one'
            notes.append(
                f"static scales of activations ({_parts(static)}) are not written: "
                f"{'a plain checkpoint has none' if self.quantized is None else why}"
            )
        if unread := ignored.get(UNREAD_RULE):
            notes.append(f"{len(unread)} tensors are not written, {UNREAD_RULE}, such as {unread[0]}")
        return dataclasses.replace(self, notes=tuple(notes))

    def to_dict(self) -> dict[str, Any]:
        """The same as plain types, for JSON."""
        return {**dataclasses.asdict(self), "bytes_written": self.bytes_written}


def quantized_params(mapped: MappedCheckpoint) -> list[str]:
    """Paths of the parameters with weights that are quantized in a checkpoint."""
    tensors = mapped.checkpoint.tensors
    return [
        path
        for path, blocks in mapped.blocks.items()
        if any(isinstance(tensors.get(block.tensor or ""), DecodedTensor) for block in blocks)
    ]


def _parts(paths: Collection[str]) -> str:
    return ", ".join(dict.fromkeys(map(part_of, paths)))

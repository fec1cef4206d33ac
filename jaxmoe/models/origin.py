"""`Origin`: the checkpoint that a model came from."""

import dataclasses
from pathlib import Path

from jaxmoe.config import directory_of


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint that a model came from, for saving the model and for reading lost weights again.

    It is the same for every copy of the model, and compared by what it says.

    Attributes:
        path: directory of the checkpoint, or its one file of weights.
        ignored: pairs of a rule and the tensors of the checkpoint that the model does not use by it.
        adapted: whether an adapter was merged, so that the checkpoint's weights are no longer the model's.
        quantized: whether its weights were quantized as they were loaded.
    """

    path: Path
    ignored: tuple[tuple[str, tuple[str, ...]], ...] = ()
    adapted: bool = False
    quantized: bool = False

    @property
    def directory(self) -> Path:
        """Directory with config.json and tokenizer."""
        return directory_of(self.path)

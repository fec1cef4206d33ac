"""`Origin`: the checkpoint that a model came from."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Origin:
    """What saving a model, and reading lost weights again, need to know of the checkpoint that it came from.

    It is the same for every copy of the model, and compared by what it says.

    Attributes:
        directory: the checkpoint's.
        ignored: (rule, tensors of the checkpoint that the model does not use), for each rule.
        adapted: whether an adapter was merged, so that the checkpoint's weights are no longer the model's.
    """

    directory: Path
    ignored: tuple[tuple[str, tuple[str, ...]], ...] = ()
    adapted: bool = False

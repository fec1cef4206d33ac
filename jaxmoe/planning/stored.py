"""The weights of a checkpoint as its files hold them: their bytes by part of the model and format."""

import dataclasses
from collections import Counter, defaultdict
from typing import Any

from jaxmoe.checkpoint.mapping import MappedCheckpoint, asked_activations
from jaxmoe.models.parts import part_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """Formats and bytes of a checkpoint's weights, of the layers that a model needs.

    Attributes:
        formats: {part of the model: {format, or "plain": bytes}}; parts are those of `Plan.parts`, and the embedding and the
            head are two.
        method: method of quantization, None where no file declares one.
        activations: {form of activations that the checkpoint asks for, in words: parts of the model}.
    """

    formats: dict[str, dict[str, int]]
    method: str | None
    activations: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(sum(sizes.values()) for sizes in self.formats.values())

    def to_dict(self) -> dict[str, Any]:
        """The same as plain types, for JSON."""
        return dataclasses.asdict(self) | {"bytes": self.nbytes}


def stored_weights(mapped: MappedCheckpoint, method: str | None) -> StoredWeights:
    """Add up the bytes of a checkpoint's weights by part and format.

    Args:
        mapped: checkpoint mapped to the parameters of a model, on whichever mesh.
        method: method of its quantization.
    """
    formats: dict[str, Counter[str]] = defaultdict(Counter)
    ends = {"embed.weight": "embedding", "lm_head.weight": "head"}
    params = {name: block.param for name, block in mapped.used_blocks()}
    for name, param in params.items():
        part = ends.get(param, part_of(param))
        tensor = mapped.checkpoint.tensors[name]
        formats[part][tensor.form] += tensor.nbytes * mapped.copies.get(name, 1)
    return StoredWeights(
        formats={part: dict(sizes) for part, sizes in formats.items()},
        method=method,
        activations=asked_activations(mapped),
    )

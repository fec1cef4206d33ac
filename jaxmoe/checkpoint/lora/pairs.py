"""The factors of a LoRA adapter, two by two: which module each pair adapts, and how it is wrapped.

PEFT names the factors after the module they adapt, ``base_model.model.<module>.lora_A.weight``. Several parameters of one
module are adapted by wrappers around each other; a name has a ``base_layer`` for each wrapper around its own.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping

from jaxmoe.checkpoint.errors import CheckpointError

Shape = tuple[int, ...]

_NAME = re.compile(
    r"(?:base_model\.model\.)?(.+?)((?:\.base_layer)*)\.lora_(embedding_)?([AB])(?:\.[^.]+)?(?:\.weight)?"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """The factors that adapt one module, or one parameter of it.

    Attributes:
        module: name of the module in transformers.
        depth: wrappers around the one that these are of.
        a, b: names of the tensors A and B.
        shape_a, shape_b: their shapes, [rank, in] and [out, rank].
        embedding: whether the module is an embedding.
    """

    module: str
    depth: int
    a: str
    b: str
    shape_a: Shape
    shape_b: Shape
    embedding: bool


def read_pairs(adapter: Mapping[str, Shape]) -> list[Pair]:
    """Find the pairs among an adapter's tensors.

    Args:
        adapter: name -> shape.

    Raises:
        CheckpointError: a tensor is neither A nor B, one of a pair is missing or there twice, or its shapes do not fit.
    """
    found: dict[tuple[str, int, bool], dict[str, str]] = defaultdict(dict)
    for name in adapter:
        match = _NAME.fullmatch(name)
        if match is None:
            reason = " (DoRA)" if "lora_magnitude_vector" in name else ""
            way_out = "merge it with PEFT (merge_and_unload) and load the result"
            raise CheckpointError(
                f"an adapter's tensors are lora_A and lora_B of its modules; {name!r} is neither{reason}; {way_out}"
            )
        module, wrappers, embedding, side = match.groups()
        # Of a wrapped module inside a wrapped one the name has base_layer in the middle as well.
        key = (module.replace(".base_layer", ""), wrappers.count("base_layer"), embedding is not None)
        if side in found[key]:
            raise CheckpointError(
                f"an adapter has one pair for a module; {found[key][side]!r} and {name!r} are for the same"
            )
        found[key][side] = name
    pairs = []
    for (module, depth, embedding), sides in found.items():
        if len(sides) != 2:
            raise CheckpointError(
                f"lora_A and lora_B come in pairs; of {module!r} there is {next(iter(sides.values()))!r} only"
            )
        shape_a, shape_b = adapter[sides["A"]], adapter[sides["B"]]
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
            raise CheckpointError(
                f"lora_A is [rank, in] and lora_B [out, rank]; those of {module!r} are {shape_a} and {shape_b}"
            )
        pairs.append(Pair(module, depth, sides["A"], sides["B"], shape_a, shape_b, embedding))
    return pairs

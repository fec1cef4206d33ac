"""The layout of a quantized weight: all that follows from its format and from the types and shapes of its parts.

The experts of a checkpoint are thousands of weights of a few layouts, so that each question is answered once for a layout.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property, lru_cache

from jaxmoe.quant.base import Box, QuantFormat, Shape
from jaxmoe.quant.packing import Packing

_BOXES = 4096  # boxes that are remembered, of all layouts


# Compared by identity, which `layout_of` makes that of contents: a cache finds it without a look at its parts.
@dataclasses.dataclass(frozen=True, eq=False)
class WeightLayout:
    """The parts of a weight in its format, without their names; made by `layout_of`.

    Attributes:
        format: format, with whatever activations.
        dtypes: element type of every part that is there, by role.
        shapes: shape of those that values depend on.
        shape: shape of the format's matrices, [..., N, K].
    """

    format: QuantFormat
    dtypes: Mapping[str, str]
    shapes: Mapping[str, Shape]
    shape: Shape

    @cached_property
    def packing(self) -> Packing | None:
        """The form in which such weights can stay packed; see `QuantFormat.packing`."""
        return self.format.packing(self.dtypes, self.shape)

    @cached_property
    def values_as_stored(self) -> bool:
        """Whether packed numbers are the bytes of the stored tensor; see `QuantFormat.values_as_stored`."""
        return self.format.values_as_stored(self.shape)


@lru_cache(maxsize=_BOXES)
def layout_of(form: QuantFormat, stored: tuple[tuple[str, str, Shape], ...], shape: Shape) -> WeightLayout:
    """Get the layout of weights, the same object for all that are alike.

    Args:
        form: format of the weights.
        stored: role, element type and shape of every part that is there.
        shape: shape of the format's matrices, [..., N, K].
    """
    decoded = {part.role for part in form.parts if part.decoded}
    shapes = {role: size for role, _, size in stored if role in decoded}
    return WeightLayout(form, {role: dtype for role, dtype, _ in stored}, shapes, shape)


@lru_cache(maxsize=_BOXES)
def boxes_of(layout: WeightLayout, box: Box) -> Mapping[str, Box]:
    """The box of each decoded part for a box of the matrices; see `QuantFormat.boxes`."""
    return layout.format.boxes(box, layout.shape, layout.shapes)


@lru_cache(maxsize=_BOXES)
def packed_boxes_of(layout: WeightLayout, role: str, box: Box) -> Mapping[str, Box]:
    """The box of each part that one array of the packed form is made from, for a box of the matrices."""
    wanted = layout.format.packed_from[role]
    return {name: part for name, part in boxes_of(layout, box).items() if name in wanted}

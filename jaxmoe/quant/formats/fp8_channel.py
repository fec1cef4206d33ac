"""8-bit floats with a scale for each output: compressed-tensors' float-quantized of channels, ModelOpt's per channel."""

import dataclasses

from jaxmoe.quant.base import Shape
from jaxmoe.quant.formats.fp8_tensor import Fp8Tensor


@dataclasses.dataclass(frozen=True)
class Fp8Channel(Fp8Tensor):
    """W[n, k] = weight[n, k] · scale[n]."""

    name = "fp8_channel"

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        return (shape,) if role == "values" else ((*shape[:-1], 1), shape[:-1])

    def packed_block(self, shape: Shape) -> tuple[int | None, int | None]:
        return 1, None

"""4-bit numbers of bitsandbytes, nf4 or fp4: a flat row of codes, and a factor for each 64 that may be a code too."""

import dataclasses
import json
import math
from typing import Any

import numpy as np

from jaxmoe.quant.base import Arrays, Box, Part, QuantFormat, Shape, Shapes, ceil_div
from jaxmoe.quant.codes import nibbles_to_float32
from jaxmoe.quant.errors import QuantizationError

# What bitsandbytes makes blocks of.
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class Bnb4Bit(QuantFormat):
    """W.flat[i] = quant_map[code i] · absmax[i // block], two codes a byte, the high half first.

    With double quantization absmax[j] = nested_quant_map[stored j] · nested_absmax[j // nested block] + offset.
    Block sizes are found by shapes; the offset is in `quant_state`, which is JSON.

    Attributes:
        kind: "nf4" or "fp4".
    """

    kind: str = "nf4"

    name = "bnb_4bit"
    ranks = range(2, 3)
    parts = (
        Part("values", (".weight",), ("U8", "I8", "BF16", "F16", "F32")),
        Part("scale", (".weight.absmax",), ("F32", "U8")),
        Part("quant_map", (".weight.quant_map",), ("F32",)),
        Part("state", (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4"), ("U8",)),
        Part("nested_scale", (".weight.nested_absmax",), ("F32",), required=False),
        Part("nested_map", (".weight.nested_quant_map",), ("F32",), required=False),
    )

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        count = math.prod(shape)
        blocks = tuple((ceil_div(count, size),) for size in (64, *_BLOCK_SIZES))
        if role == "values":
            return tuple((ceil_div(count, 2 * width), 1) for width in (1, 2, 4))
        if role == "nested_scale":
            return tuple({(ceil_div(size, nested),): None for (size,) in blocks for nested in (256, *_BLOCK_SIZES)})
        return {"scale": blocks, "quant_map": ((16,),), "nested_map": ((256,),)}.get(role, ())

    def shape_of(self, stored: Shapes) -> Shape | None:
        return None

    def check_shape(self, shape: Shape) -> str | None:
        return None if len(shape) == 2 else f"{self.name} holds a matrix; this weight has shape {shape}"

    def scales(self, arrays: Arrays) -> dict[str, np.ndarray]:
        # A block of zeros has absmax zero.
        found = {role: arrays[role] for role in ("scale", "nested_scale") if role in arrays}
        return {role: np.where(array == 0, 1, array) for role, array in found.items()}

    def boxes(self, box: Box, shape: Shape, stored: Shapes) -> dict[str, Box]:
        start, stop = self._flat(box, shape)
        width = math.prod(stored["values"])
        per_item = 2 * max(1, ceil_div(math.prod(shape), 2 * width))
        block = _block_size(math.prod(shape), math.prod(stored["scale"]))
        found: dict[str, Box] = {
            "values": ((start // per_item, ceil_div(stop, per_item)), (0, 1)),
            "scale": ((start // block, ceil_div(stop, block)),),
        }
        for role in ("quant_map", "state", "nested_map"):
            if role in stored:
                found[role] = tuple((0, size) for size in stored[role])
        if "nested_scale" in stored:
            nested = _block_size(math.prod(stored["scale"]), math.prod(stored["nested_scale"]))
            ((first, last),) = found["scale"]
            found["nested_scale"] = ((first // nested, ceil_div(last, nested)),)
        return found

    def _flat(self, box: Box, shape: Shape) -> tuple[int, int]:
        """The flat range of the whole rows that a box of a matrix is in."""
        return box[0][0] * shape[1], box[0][1] * shape[1]

    def values(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        start, stop = self._flat(box, shape)
        block = _block_size(math.prod(shape), math.prod(stored["scale"]))
        state = _read_state(arrays["state"], shape, block)
        packed = np.ascontiguousarray(arrays["values"]).reshape(-1).view(np.uint8)
        flat = out.reshape(-1) if out.flags.c_contiguous else None
        numbers = nibbles_to_float32(packed, arrays["quant_map"], flat, high_first=True)
        per_item = 2 * arrays["values"].itemsize
        numbers = numbers[start % per_item :][: stop - start]
        absmax = self._absmax(arrays, start // block, stored, state)
        first = start % block
        numbers *= np.repeat(absmax, block)[first : first + len(numbers)]
        return numbers.reshape(-1, shape[1])[:, slice(*box[1])]

    def _absmax(self, arrays: Arrays, first: int, stored: Shapes, state: dict[str, Any]) -> np.ndarray:
        absmax = arrays["scale"]
        coded, nested_parts = absmax.dtype == np.uint8, {"nested_scale", "nested_map"} & arrays.keys()
        if len(nested_parts) != (2 if coded else 0):
            raise QuantizationError(
                f"absmax is {absmax.dtype}, and {len(nested_parts)} of nested_absmax and nested_quant_map are there: codes "
                "need both, and factors none"
            )
        if not coded:
            return absmax
        nested = _block_size(math.prod(stored["scale"]), math.prod(stored["nested_scale"]))
        said = state.get("nested_blocksize", nested)
        if stored["nested_scale"] != (1,) and said != nested:
            raise QuantizationError(f"quant_state says nested blocks of {said!r:.20}; shapes say {nested}")
        factors = np.repeat(arrays["nested_scale"], nested)[first % nested :][: len(absmax)]
        offset = state.get("nested_offset", 0)
        if isinstance(offset, bool) or not isinstance(offset, int | float):
            raise QuantizationError(f"quant_state's nested_offset must be a number; it is {offset!r:.40}")
        return arrays["nested_map"][absmax] * factors + np.float32(offset)


def _block_size(count: int, blocks: int) -> int:
    """The block size with which so many codes make so many blocks; of any that do, for they then mean the same."""
    for size in _BLOCK_SIZES:
        if ceil_div(count, size) == blocks:
            return size
    raise QuantizationError(
        f"{count} codes of bitsandbytes in {blocks} blocks: no block size of {_BLOCK_SIZES} does that"
    )


def _read_state(state: np.ndarray, shape: Shape, block: int) -> dict[str, Any]:
    try:
        found = json.loads(bytes(state))
    except (ValueError, UnicodeDecodeError) as error:
        raise QuantizationError(f"quant_state must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise QuantizationError(f"quant_state must be a JSON object; it is {found!r:.80}")
    said, size = found.get("shape", list(shape)), found.get("blocksize", block)
    if said != list(shape):
        raise QuantizationError(f"quant_state says shape {said!r:.80}; the weight is {list(shape)}")
    # All of a weight in one block is that, whatever the size of a block.
    if size != block and not (isinstance(size, int) and size >= math.prod(shape) and block >= math.prod(shape)):
        raise QuantizationError(f"quant_state says blocks of {size!r:.20}; shapes say {block}")
    return found

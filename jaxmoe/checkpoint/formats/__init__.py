"""The files of a checkpoint: strict readers of their headers, and reads of the bytes of a region of a tensor.

Nothing here knows what a tensor is for.
"""

from jaxmoe.checkpoint.formats.config_facts import find_size
from jaxmoe.checkpoint.formats.decoded import DecodedCheckpoint, DecodedTensor, decode_checkpoint
from jaxmoe.checkpoint.formats.dtypes import DTYPE_NAMES, ELEMENT_TYPES, can_cast, is_float
from jaxmoe.checkpoint.formats.files import SAFETENSORS, Checkpoint, CheckpointFile, ChunkFile, open_checkpoint
from jaxmoe.checkpoint.formats.packed import PackedTensor
from jaxmoe.checkpoint.formats.reading import open_files, read_box, read_tensor
from jaxmoe.checkpoint.formats.safetensors import (
    SafetensorsFile,
    Split,
    TensorInfo,
    read_json,
    read_safetensors,
)
from jaxmoe.checkpoint.formats.stored import (
    PLACEMENT,
    VERSION,
    WEIGHTS,
    StoredArray,
    StoredCheckpoint,
    dtype_named,
    is_stored,
    read_description,
    read_stored,
)
from jaxmoe.checkpoint.formats.torch_file import TorchFile, read_torch_file
from jaxmoe.checkpoint.formats.torch_object import read_torch_object

__all__ = [
    "DTYPE_NAMES",
    "ELEMENT_TYPES",
    "PLACEMENT",
    "SAFETENSORS",
    "VERSION",
    "WEIGHTS",
    "Checkpoint",
    "CheckpointFile",
    "ChunkFile",
    "DecodedCheckpoint",
    "DecodedTensor",
    "PackedTensor",
    "SafetensorsFile",
    "Split",
    "StoredArray",
    "StoredCheckpoint",
    "TensorInfo",
    "TorchFile",
    "can_cast",
    "decode_checkpoint",
    "dtype_named",
    "find_size",
    "is_float",
    "is_stored",
    "open_checkpoint",
    "open_files",
    "read_box",
    "read_description",
    "read_json",
    "read_safetensors",
    "read_stored",
    "read_tensor",
    "read_torch_file",
    "read_torch_object",
]

"""Tiny checkpoints that ask for rounded activations, and the logits that they stand for: plain weights and numpy.

The plain model's own layers hand every product to numpy, which knows by a matrix' values whether its inputs are rounded, to
which form, and by which scale of the files.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxmoe
from jaxmoe.kernels.grouped_matmul.row_loops import take_rows
from tests.support.meshes import mesh_of
from tests.support.quantized_checkpoints import compressed, write_pair
from tests.support.saved import read_all

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
# With these every matrix of a layer is quantized, and blocks of 128 inputs end inside of a device's part.
WIDTHS = {
    "hidden_size": 160,
    "intermediate_size": 160,
    "moe_intermediate_size": 160,
    "head_dim": 32,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
}


def channels(kind: str, **inputs: Any) -> dict[str, Any]:
    """Settings of compressed-tensors with a scale for each output, and activations of 8 bits."""
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "group_size": None}
    block = compressed(f"{kind}-quantized", **weights)
    (group,) = block["config_groups"].values()
    group["input_activations"] = {"num_bits": 8, "type": kind, "symmetric": True, **inputs}
    return block


TOKEN, TENSOR = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
# (family, format as in tests/support/quantized.py, block of config.json, form of activations that it asks for).
CASES = [
    ("mixtral", "fp8_tensor", MODELOPT, "fp8_static"),
    ("deepseek_v3", "fp8_block, 128", BLOCKS, "fp8_block"),
    ("qwen3_moe", "int_quantized", channels("int", **TOKEN), "int8_token"),
    ("qwen3_moe", "fp8_block, 128", BLOCKS | {"scale_fmt": "ue8m0"}, "fp8_block_e8m0"),
    ("deepseek_v3", "int_quantized", channels("int", **TENSOR), "int8_static"),
    ("mixtral", "fp8_channel", channels("float", **TOKEN), "fp8_token"),
]


def write_rounding(directory: Path, family: str, form: str, block: dict[str, Any]) -> tuple[Path, Path]:
    """A quantized checkpoint with a scale of each weight's inputs, and one with its values."""
    quantized, plain, _ = write_pair(directory, family, form, block, WIDTHS)
    tensors, rng = read_all(quantized), np.random.default_rng(1)
    for name in [name for name in tensors if name.endswith((".weight_scale", ".weight_scale_inv"))]:
        tensors[name.rpartition(".")[0] + ".input_scale"] = np.float32(rng.uniform(0.02, 0.1))
    save_file({name: np.asarray(array) for name, array in tensors.items()}, quantized / "model.safetensors")
    return quantized, plain


def rounded(x: np.ndarray, form: str, scale: np.float32 | None = None) -> np.ndarray:
    """x [..., K] rounded to a form, in float32; `scale` is that of a static one."""
    dtype, largest = (ml_dtypes.float8_e4m3fn, 448) if form.startswith("fp8") else (np.int8, 127)
    size = 128 if "block" in form else max(x.shape[-1], 1)
    parts = []
    for first in range(0, x.shape[-1], size):
        part = x[..., first : first + size].astype(np.float32)
        own = np.abs(part).max(-1, keepdims=True) / np.float32(largest) if scale is None else scale
        own = np.maximum(own, np.finfo(np.float32).tiny)
        if form.endswith("e8m0"):
            own = np.exp2(np.ceil(np.log2(own)))
        values = np.clip(part / own, -largest, largest)
        values = (np.rint(values) if dtype is np.int8 else values).astype(dtype)
        parts.append(values.astype(np.float32) * own)
    return np.concatenate(parts, -1)


class Products:
    """Products with the matrices of a checkpoint, by numpy: of weights that are quantized in it, with rounded inputs.

    Attributes:
        form: form that the inputs of quantized ones are rounded to.
        scales: scale of the inputs of each of these, by a digest of its values; None of dynamic forms.
        met: digests of those that there was a product with.
    """

    form: str
    scales: dict[bytes, np.float32 | None]
    met: set[bytes]

    def start(self, quantized: Path, plain: Path, form: str) -> None:
        stored, self.form, self.met = read_all(quantized), form, set()
        self.scales = {
            _digest(values): stored[name.removesuffix("weight") + "input_scale"] if form.endswith("static") else None
            for name, values in read_all(plain).items()
            if stored[name].dtype != values.dtype
        }

    def knows(self, matrix: np.ndarray) -> bool:
        """Whether the inputs of a matrix are rounded."""
        return _digest(matrix) in self.scales

    def round(self, x: np.ndarray, *matrices: np.ndarray) -> np.ndarray:
        """Inputs as all of some matrices want them that have them in common."""
        keys = [_digest(matrix) for matrix in matrices]
        if not self.scales.keys() & {*keys}:
            return x
        self.met |= {*keys}
        scales = [self.scales[key] for key in keys]
        return rounded(x, self.form, None if scales[0] is None else max(scales))

    def linear(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        x, weight = np.asarray(x), np.asarray(weight)
        return self.round(x, weight) @ weight.T

    def mlp(self, x: np.ndarray, up: np.ndarray, down: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        x, up, down = (np.asarray(array) for array in (x, up, down))
        out, first = np.zeros((len(x), down.shape[1]), np.float32), 0
        for group, size in enumerate(np.asarray(sizes).tolist()):
            rows = self.round(x[first : first + size], *up[group])
            gate, other = rows @ up[group, 0].T, rows @ up[group, 1].T
            h = gate * (1 + np.tanh(gate / 2)) / 2 * other
            out[first : first + size] = self.round(h, down[group]) @ down[group].T
            first += size
        return out


# One for all: a program that is compiled for a model serves another one of its shapes.
PRODUCTS = Products()


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array, np.float32).tobytes()).digest()


def _linear(self: Any, x: jax.Array, weight: jax.Array, out_dtype: Any = None) -> jax.Array:
    out = jax.ShapeDtypeStruct((*x.shape[:-1], weight.shape[0]), out_dtype or x.dtype)
    return jax.pure_callback(PRODUCTS.linear, out, x, weight)


def _expert_mlp(x: jax.Array, up: jax.Array, down: jax.Array, sizes: jax.Array, **options: Any) -> jax.Array:
    assert options["activation"] == "silu"
    assert options["b_down_pD"] is None
    rows = take_rows(x, options["index_R"])
    out = jax.ShapeDtypeStruct((len(rows), down.shape[1]), np.float32)
    return jax.pure_callback(PRODUCTS.mlp, out, rows, up, down, sizes)


def reference_logits(quantized: Path, plain: Path, form: str, tokens: Any) -> np.ndarray:
    """Logits of a plain checkpoint whose products round their inputs as the quantized one asks."""
    PRODUCTS.start(quantized, plain, form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxmoe.layers.linear.Linear.__call__", _linear)
        patch.setattr("jaxmoe.layers.experts.expert_mlp", _expert_mlp)
        logits = np.asarray(jaxmoe.load(plain, mesh=mesh_of(1, 1, 1), dtype="float32")(tokens))
    assert PRODUCTS.met, "no product with a quantized matrix"
    return logits

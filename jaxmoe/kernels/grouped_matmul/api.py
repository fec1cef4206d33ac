"""The public grouped products: argument checks and the choice of a backend.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, K inner dimension, N output dimension.
Groups are the p physical slots of the experts here, or anything else that owns a run of consecutive rows.
"""

import importlib
import math
import re
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmoe.hardware import GPUS
from jaxmoe.kernels.grouped_matmul import portable, reference, xla_ragged_dot
from jaxmoe.kernels.grouped_matmul.combine import combine_halves
from jaxmoe.kernels.grouped_matmul.quantized import FORMATS, Matrices, QuantizedStack, as_matrices

# A backend is a module with the two functions of this file, less the checks: gate and up arrive as one stack
# [p, N, D] with a function that combines the halves, `out_dtype` as a dtype. A stack may be a `QuantizedStack`, of a
# format that is listed for the backend in `PACKED_FORMATS` and with a block that divides its matrices.
BACKENDS: dict[str, ModuleType] = {
    "portable": portable,
    "reference": reference,
    "xla_ragged_dot": xla_ragged_dot,
}


class GPUBackend(NamedTuple):
    """A backend that is imported when it is named: what it is written in is not there in every jax.

    Attributes:
        module: its name.
        since: the first version of jax.
        capabilities: first numbers of the compute capabilities of the NVIDIA GPUs that it runs on.
        generations: those GPUs, in words.
    """

    module: str
    since: tuple[int, ...]
    capabilities: range
    generations: str

    @property
    def devices(self) -> str:
        """The GPUs in words, and by name those that `jaxmoe.hardware` knows."""
        known = [name.upper() for name, gpu in GPUS.items() if gpu.compute_capability[0] in self.capabilities]
        return f"{self.generations} ({', '.join(known)})"


GPU_BACKENDS = {
    "mosaic_gpu": GPUBackend(
        "jaxmoe.kernels.grouped_matmul.mosaic_gpu",
        (0, 11, 2),
        range(9, 11),
        "Hopper and Blackwell GPUs of data centres",
    ),
    "triton": GPUBackend("jaxmoe.kernels.grouped_matmul.triton", (0, 10, 2), range(8, 100), "NVIDIA GPUs since Ampere"),
}
PACKED_FORMATS: dict[str, frozenset[str]] = {
    "portable": frozenset(FORMATS),
    "reference": frozenset(FORMATS),
    "mosaic_gpu": frozenset(FORMATS),
}


def grouped_matmul(
    lhs_RK: jax.Array,
    rhs_GNK: Matrices,
    group_sizes_G: jax.Array,
    *,
    out_dtype: DTypeLike | None = None,
    backend: str = "auto",
    device_kind: str | None = None,
) -> jax.Array:
    """Multiply each row by the matrix of its group.

    out[r] = rhs[g(r)] @ lhs[r], where group g owns the rows from sum(group_sizes[:g]) up to sum(group_sizes[:g+1]).
    Differentiable, once and in reverse, in lhs and rhs. Packed matrices are constants; they are decoded and scaled in
    float32, and a GPU kernel may round them to the rows' dtype before the product.

    Args:
        lhs_RK: rows, sorted by group. There may be more of them than the groups own: time follows the rows owned.
        rhs_GNK: one matrix a group, (out, in) as in torch; of lhs_RK's dtype, or a `QuantizedStack`.
        group_sizes_G: int32, rows of each group; zeros are welcome.
        out_dtype: dtype of the result, lhs_RK's by default. Sums are float32 (float64 for float64 rows) whatever it is.
        backend: a name in `BACKENDS` or `GPU_BACKENDS`, or "auto".
        device_kind: `jax.Device.device_kind` of where it will run. A GPU backend takes the tiles that were measured to
            be fastest there; without it, or where nothing was measured, its own choice. "mosaic_gpu" has a kernel of
            its own for Blackwell, which it takes only where this says so.

    Returns:
        out_RN. Rows at or beyond sum(group_sizes) are zeros, whatever lhs_RK holds there.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the backend is unknown.
        NotImplementedError: the backend does not run with the installed jax, or does not take matrices so packed.

    >>> import jax.numpy as jnp
    >>> lhs_RK = jnp.ones((3, 2))
    >>> rhs_GNK = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    >>> grouped_matmul(lhs_RK, rhs_GNK, jnp.array([1, 1], jnp.int32)).tolist()
    [[3.0], [7.0], [0.0]]
    """
    _check_ranks(lhs=(lhs_RK, "RK"), rhs=(rhs_GNK, "GNK"), group_sizes=(group_sizes_G, "G"))
    _check_rows(lhs_RK, group_sizes_G)
    _check_matrix("rhs", rhs_GNK, (rhs_GNK.shape[1], lhs_RK.shape[1]), lhs_RK, group_sizes_G)
    return _backend(backend, rhs_GNK).grouped_matmul(
        lhs_RK,
        _flatten(rhs_GNK),
        group_sizes_G,
        out_dtype=jnp.dtype(out_dtype or lhs_RK.dtype),
        **_device(backend, device_kind),
    )


def expert_mlp(
    x_RD: jax.Array,
    w_gate_up_p2FD: Matrices,
    w_down_pDF: Matrices,
    group_sizes_p: jax.Array,
    *,
    b_gate_up_p2F: jax.Array | None = None,
    b_down_pD: jax.Array | None = None,
    activation: str = "silu",
    limit: float | None = None,
    out_dtype: DTypeLike | None = None,
    backend: str = "auto",
    device_kind: str | None = None,
) -> jax.Array:
    """Pass each row through the gated feed-forward network of its expert (Shazeer, 2020, "GLU Variants").

    y = W_down[g] @ h + b_down[g], with h = act(W_gate[g] @ x + b_gate[g]) * (W_up[g] @ x + b_up[g]) rounded to
    x's dtype. A stack with one matrix in its second dim has no gate: h = act(W_up[g] @ x + b_up[g]).

    Where F is split over devices the results are partial sums: add them up afterwards, in an `out_dtype` of your
    choice, and give `b_down_pD` to one of the devices only.

    Differentiable, once and in reverse, in rows, matrices and biases; the gradient keeps no activation. Packed matrices
    are as in `grouped_matmul`.

    Args:
        x_RD: rows sorted by physical slot, possibly followed by unused ones.
        w_gate_up_p2FD: gate at [:, 0], up at [:, 1]; or up alone at [:, 0]. Of x_RD's dtype, or a `QuantizedStack`.
        w_down_pDF: of x_RD's dtype, or a `QuantizedStack`, whatever the other is.
        group_sizes_p: int32, rows of each slot; zeros are welcome.
        b_gate_up_p2F: biases of the first product.
        b_down_pD: biases of the second.
        activation: a name in `ACTIVATIONS` or `CLAMPED`, computed in the sums' dtype.
        limit: of a clamped activation.
        out_dtype: dtype of the result, x_RD's by default. Sums are float32 (float64 for float64 rows) whatever it is.
        backend: a name in `BACKENDS` or `GPU_BACKENDS`, or "auto".
        device_kind: `jax.Device.device_kind` of where it will run. A GPU backend takes the tiles that were measured to
            be fastest there; without it, or where nothing was measured, its own choice. "mosaic_gpu" has a kernel of
            its own for Blackwell, which it takes only where this says so.

    Returns:
        y_RD. Rows at or beyond sum(group_sizes) are zeros, whatever x_RD holds there.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the activation or backend is unknown.
        NotImplementedError: the backend does not run with the installed jax, or does not take matrices so packed.

    >>> import jax.numpy as jnp
    >>> w_gate_up_p2FD, w_down_pDF = jnp.ones((2, 2, 3, 4)), jnp.ones((2, 4, 3))
    >>> group_sizes_p = jnp.array([0, 5], jnp.int32)
    >>> expert_mlp(jnp.ones((8, 4)), w_gate_up_p2FD, w_down_pDF, group_sizes_p, activation="relu")[:, 0].tolist()
    [48.0, 48.0, 48.0, 48.0, 48.0, 0.0, 0.0, 0.0]
    """
    _check_ranks(
        x=(x_RD, "RD"),
        w_gate_up=(w_gate_up_p2FD, "p2FD"),
        w_down=(w_down_pDF, "pDF"),
        group_sizes=(group_sizes_p, "p"),
    )
    _check_rows(x_RD, group_sizes_p)
    D, F = x_RD.shape[1], w_down_pDF.shape[2]
    p, halves = w_gate_up_p2FD.shape[:2]
    if halves not in (1, 2):
        raise ValueError(f"w_gate_up holds gate and up, or up alone, in its second dim; got {w_gate_up_p2FD.shape}")
    _check_matrix("w_gate_up", w_gate_up_p2FD, (halves, F, D), x_RD, group_sizes_p)
    _check_matrix("w_down", w_down_pDF, (D, F), x_RD, group_sizes_p)
    for name, bias, shape in (("b_gate_up", b_gate_up_p2F, (p, halves, F)), ("b_down", b_down_pD, (p, D))):
        if bias is not None and bias.shape != shape:
            raise ValueError(f"{name} must have shape {shape} to fit the matrices; got {bias.shape}.")
    return _backend(backend, w_gate_up_p2FD, w_down_pDF).expert_mlp(
        x_RD,
        _flatten(w_gate_up_p2FD),
        _flatten(w_down_pDF),
        group_sizes_p,
        b_up_pN=None if b_gate_up_p2F is None else b_gate_up_p2F.reshape(p, halves * F),
        b_down_pD=b_down_pD,
        combine=combine_halves(activation, limit, gated=halves == 2),
        out_dtype=jnp.dtype(out_dtype or x_RD.dtype),
        **_device(backend, device_kind),
    )


def check_backend(name: str, device: jax.Device) -> None:
    """Refuse a backend that is not known, or that cannot run on a kind of device.

    Raises:
        ValueError: there is no backend of that name.
        NotImplementedError: it cannot run there, or not with the installed jax.
    """
    _backend(name)
    if name in GPU_BACKENDS and _capability(device) not in GPU_BACKENDS[name].capabilities:
        raise NotImplementedError(
            f"kernels {name!r} run on {GPU_BACKENDS[name].devices}; these devices are {device.device_kind} "
            f"({device.platform}): use 'portable' or 'auto'"
        )


def _capability(device: jax.Device) -> int:
    """The first number of an NVIDIA GPU's compute capability; 0 of any other device, such as "gfx942" of AMD's."""
    number = re.match(r"(\d+)\.\d", str(getattr(device, "compute_capability", "")))
    return int(number[1]) if number else 0


def _backend(name: str, *stacks: Matrices) -> ModuleType:
    """The backend of that name, if it takes these stacks."""
    if name == "auto":
        name = "portable"
    if name not in BACKENDS and name not in GPU_BACKENDS:
        names = sorted([*BACKENDS, *GPU_BACKENDS])
        raise ValueError(f"backend must be 'auto' or one of {names}; got {name!r}. Name one of these.")
    formats = {stack.format for stack in stacks if isinstance(stack, QuantizedStack)}
    if refused := formats - PACKED_FORMATS.get(name, frozenset()):
        raise NotImplementedError(
            f"kernels {name!r} do not take matrices packed as {' or '.join(sorted(refused))}: use 'portable', which does, "
            "or `dequantize` them first"
        )
    if name in BACKENDS:
        return BACKENDS[name]
    backend = GPU_BACKENDS[name]
    if jax.__version_info__ < backend.since:
        since = ".".join(map(str, backend.since))
        raise NotImplementedError(
            f"kernels {name!r} need jax {since} or newer, and this is jax {jax.__version__}: install a newer one (it "
            "needs Python 3.12), or use 'portable'"
        )
    return importlib.import_module(backend.module)


def _device(name: str, device_kind: str | None) -> dict[str, str | None]:
    """What only backends with measured tiles take."""
    return {"device_kind": device_kind} if name in GPU_BACKENDS else {}


def _flatten(stack: Matrices) -> Matrices:
    """[p, ..., N, K] as [p, ...·N, K]."""
    if isinstance(stack, QuantizedStack):
        return as_matrices(stack)
    return stack.reshape(stack.shape[0], math.prod(stack.shape[1:-1]), stack.shape[-1])


def _check_ranks(**arrays: tuple[Matrices, str]) -> None:
    for name, (array, dims) in arrays.items():
        if array.ndim != len(dims):
            raise ValueError(
                f"{name} must have {len(dims)} dimensions, [{', '.join(dims)}]; got shape {array.shape}. "
                "Reshape it, or see the docstring for the layout."
            )


def _check_rows(rows: jax.Array, group_sizes: jax.Array) -> None:
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"rows must be floating point; got {rows.dtype}. Convert them with astype.")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes must be int32; got {group_sizes.dtype}. Convert with astype(jnp.int32).")


def _check_matrix(name: str, matrix: Matrices, shape: tuple[int, ...], rows: jax.Array, group_sizes: jax.Array) -> None:
    if isinstance(matrix, QuantizedStack):
        matrix.check(name)
    expected = (group_sizes.shape[0], *shape)
    if matrix.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected} to fit rows of shape {rows.shape} and {group_sizes.shape[0]} groups; "
            f"got {matrix.shape}. Weights are (out, in) as in torch: transpose the last two dims if they are (in, out)."
        )
    if not isinstance(matrix, QuantizedStack) and matrix.dtype != rows.dtype:
        raise ValueError(
            f"{name} must have the dtype of the rows, {rows.dtype}; got {matrix.dtype}. Convert one of them with astype."
        )

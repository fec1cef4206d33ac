"""The work that a backend is asked for, without its arrays, and the words of a trial for it.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K].
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxmoe.kernels.grouped_matmul.quantized import FORMATS, Matrices, QuantizedStack

# Dtypes of rows that trials are held with, and the allowed ‖actual − exact‖ / ‖exact‖ of a row of results. Half precision is
# rounded twice on the way, each time by 2^-9 at most; products of float32 may be of TF32 on a GPU.
TOLERANCES = {"bfloat16": 2.0**-6, "float16": 2.0**-8, "float32": 2.0**-8}


@dataclasses.dataclass(frozen=True)
class MatrixKind:
    """The matrices of one product: what each group has of a stack.

    Attributes:
        shape: [N, K], or [halves, F, D] of gate and up.
        form: dtype of plain matrices, or the name of a packed format.
        block: outputs and inputs that share a scale, of packed matrices.
        scales: dtype of the scales.
        zero_points: flag that there are some.
        matrix_scales: dims of the scales of one group's matrices; None where there are none.
    """

    shape: tuple[int, ...]
    form: str
    block: tuple[int, int] | None = None
    scales: str | None = None
    zero_points: bool = False
    matrix_scales: tuple[int, ...] | None = None

    @classmethod
    def of(cls, stack: Matrices) -> "MatrixKind":
        """Describe a stack [G, ...], or what stands for one."""
        if not isinstance(stack, QuantizedStack):
            return cls(tuple(stack.shape[1:]), jnp.dtype(stack.dtype).name)
        return cls(
            stack.shape[1:],
            stack.format,
            stack.block,
            jnp.dtype(stack.scales.dtype).name,
            stack.zero_points is not None,
            None if stack.matrix_scales is None else tuple(stack.matrix_scales.shape[1:]),
        )

    @property
    def is_packed(self) -> bool:
        """Whether the matrices are packed."""
        return self.form in FORMATS and self.block is not None

    def random(self, rng: np.random.Generator, groups: int) -> Matrices:
        """Make a stack of so many groups, whose products with rows of variance 1 have a variance near 1."""
        *lead, N, K = (groups, *self.shape)
        if self.block is None:
            return jnp.asarray(rng.standard_normal((*lead, N, K), np.float32) / np.sqrt(K), self.form)
        form = FORMATS[self.form]
        codes = rng.integers(0, 256, (*lead, N, K // form.per_byte), dtype=np.uint8)
        if form.dtype == jnp.float8_e4m3fn:
            codes &= 0xBF  # below 2, and no NaN
        spread = np.nanstd(np.asarray(form.decode(jnp.arange(16 if form.per_byte == 2 else 256, dtype=jnp.uint8))))
        size = 1 / (np.sqrt(K) * min(spread, 100))
        units = [dim // min(dim, of_block) for dim, of_block in zip((N, K), self.block, strict=True)]
        scales: Any = rng.random((*lead, *units), np.float32) + 0.5
        if self.matrix_scales is None:
            scales = scales * size
        if self.scales == "uint8":
            scales = np.round(127 + np.log2(scales)).astype(np.uint8)
        zeros = rng.integers(0, 16, (*lead, *units), dtype=np.uint8) if self.zero_points else None
        of_matrix = None if self.matrix_scales is None else np.full((groups, *self.matrix_scales), size, np.float32)
        return QuantizedStack(
            values=jnp.asarray(codes).view(form.dtype),
            scales=jnp.asarray(scales, self.scales),
            zero_points=None if zeros is None else jnp.asarray(zeros),
            matrix_scales=None if of_matrix is None else jnp.asarray(of_matrix),
            format=self.form,
            block=self.block,
        )

    def __str__(self) -> str:
        """Name the form and the shape in a few words.

        >>> str(MatrixKind((2, 768, 2048), "float8_e4m3fn", (128, 128), "float32"))
        'float8_e4m3fn in blocks of 128x128 [2, 768, 2048]'
        """
        blocks = "" if self.block is None else f" in blocks of {self.block[0]}x{self.block[1]}"
        return f"{self.form}{blocks} {list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Work:
    """The products that a backend is asked for, but for the numbers of rows and groups.

    Attributes:
        rows: dtype of the rows.
        matrices: matrices of one product (`grouped_matmul`), or of both (`expert_mlp`).
        biases: flag that both products have biases.
        activation, limit: those of `expert_mlp`; None for one product.
        activations: form that rows are rounded to, a name in `ROW_FORMATS`.
        gradient: flag that their gradient is meant, of a backend with kernels for it.
    """

    rows: str
    matrices: tuple[MatrixKind, ...]
    biases: bool = False
    activation: str | None = None
    limit: float | None = None
    activations: str = "none"
    gradient: bool = False

    @property
    def of_gradient(self) -> "Work":
        """The gradient of the same products."""
        return dataclasses.replace(self, gradient=True)

    @classmethod
    def product(cls, rows_dtype: DTypeLike, stack: Matrices, activations: str = "none") -> "Work":
        """Describe a `grouped_matmul`."""
        return cls(jnp.dtype(rows_dtype).name, (MatrixKind.of(stack),), activations=activations)

    @classmethod
    def mlp(
        cls,
        rows_dtype: DTypeLike,
        w_gate_up: Matrices,
        w_down: Matrices,
        *,
        biases: bool,
        activation: str,
        limit: float | None,
        activations: str = "none",
    ) -> "Work":
        """Describe an `expert_mlp`."""
        kinds = MatrixKind.of(w_gate_up), MatrixKind.of(w_down)
        return cls(jnp.dtype(rows_dtype).name, kinds, biases, activation, limit, activations)

    def to_json(self) -> str:
        """One line that `from_json` reads; equal for equal work."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Work":
        """Read what `to_json` wrote."""
        fields = json.loads(text)

        def tuples(kind: dict[str, Any]) -> dict[str, Any]:
            return {name: tuple(value) if isinstance(value, list) else value for name, value in kind.items()}

        return cls(**fields | {"matrices": tuple(MatrixKind(**tuples(kind)) for kind in fields["matrices"])})

    def __str__(self) -> str:
        """Name rows and matrices in a few words."""
        rounded = "" if self.activations == "none" else f" rounded to {self.activations}"
        gradient = "gradient of " if self.gradient else ""
        return f"{gradient}{self.rows} rows{rounded} by {' and '.join(map(str, self.matrices))}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        verdict: "right", "wrong", "refused" by the backend itself, "crashed", "hung", or "untested", where the trial could
            not be held.
        detail: figure or message that it follows from.
    """

    verdict: str
    detail: str


def local_stack(stack: Any, specs: Any, axis_sizes: Mapping[str, int]) -> Any:
    """Give the part of a stack that one device holds, as shapes and dtypes; a tree like it.

    Args:
        stack: array or `QuantizedStack`, or what stands for one.
        specs: its partition specs, a tree like it.
        axis_sizes: sizes of the mesh's axes.
    """

    def part(array: Any, spec: Any) -> jax.ShapeDtypeStruct:
        shape = list(array.shape)
        for dim, axes in enumerate(spec):
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                shape[dim] //= axis_sizes[axis]
        return jax.ShapeDtypeStruct(tuple(shape), array.dtype)

    return jax.tree.map(part, stack, specs)

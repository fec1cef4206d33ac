"""The contract of a backend of the grouped products, `Kernels`, and the tables of backends.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, K inner dimension, N output dimension.
"""

import dataclasses
import importlib
import re
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp

from jaxmoe.hardware import GPUS
from jaxmoe.kernels.grouped_matmul.combine import Combine
from jaxmoe.kernels.grouped_matmul.gpu import missing_libdevice
from jaxmoe.kernels.grouped_matmul.quantized import FORMATS, Matrices, QuantizedStack
from jaxmoe.kernels.grouped_matmul.quantized_rows import ROW_FORMATS, OnRoundedRows
from jaxmoe.kernels.grouped_matmul.work import Work


class Kernels(Protocol):
    """The two products of a backend, which is a module with these functions; `api` has checked their arguments.

    For both of them these rules hold:

    * Sums are float32 (float64 for float64 rows), whatever the dtypes of rows and result are, and are rounded once.
    * A row that no group owns gives zeros, and takes part in no gradient, whatever it holds, NaN included.
    * Groups may have no rows, and any size may be 0; the last rows may belong to no group.
    * They are differentiable, once and in reverse, in rows, matrices and biases, and keep no activation; packed matrices are
      constants. A gradient by kernels may round what it multiplies to the rows' dtype: see `gradient_products`.
    * Inside ``shard_map`` they work on what the device has, without a collective.

    A stack may be a `QuantizedStack`, of a format that the table lists for the backend and with a block that divides its
    matrices. Dtypes and sizes that the backend cannot multiply it refuses with NotImplementedError, which names another
    backend. It may take more arguments, such as `tiles` and `interpret`, which have defaults.
    """

    def grouped_matmul(
        self,
        lhs_RK: jax.Array,
        rhs_GNK: Matrices,
        group_sizes_G: jax.Array,
        *,
        out_dtype: jnp.dtype,
        device_kind: str | None = None,
    ) -> jax.Array:
        """Multiply each row by the matrix of its group: out[r] = rhs[g(r)] @ lhs[r].

        Args:
            lhs_RK: rows, sorted by group.
            rhs_GNK: matrices, (out, in) as in torch, of the rows' dtype or packed.
            group_sizes_G: int32, rows of each group.
            out_dtype: dtype of the result.
            device_kind: `jax.Device.device_kind` of the GPU that it will run on, by which tiles may be chosen; None where
                that is not known.

        Returns:
            out_RN.
        """

    def expert_mlp(
        self,
        x_RD: jax.Array,
        w_up_pND: Matrices,
        w_down_pDF: Matrices,
        group_sizes_p: jax.Array,
        *,
        b_up_pN: jax.Array | None,
        b_down_pD: jax.Array | None,
        combine: Combine,
        out_dtype: jnp.dtype,
        device_kind: str | None = None,
    ) -> jax.Array:
        """Pass each row through the network of its group: y = W_down[g] @ combine(W_up[g] @ x + b_up[g]) + b_down[g].

        Args:
            x_RD: rows, sorted by slot.
            w_up_pND: gate and up in one stack, gate first, so N = 2F; up alone, N = F, where there is no gate.
            w_down_pDF: matrices of the second product.
            group_sizes_p: int32, rows of each slot.
            b_up_pN: biases of the first product, if any.
            b_down_pD: biases of the second, if any.
            combine: function from the first product to h [R, F], which is rounded to the rows' dtype.
            out_dtype: dtype of the result.
            device_kind: kind of the GPU that it will run on, as for `grouped_matmul`.

        Returns:
            y_RD.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """A backend as its table has it. Its module is imported when it is first used.

    Attributes:
        module: name of the module, which is as `Kernels` says.
        formats: names of the formats of a `QuantizedStack` that it takes; others are refused before it is called.
        activations: names in `ROW_FORMATS` that it has products of its own for: its functions take `activations`,
            `input_scales` and `split_over`. For others it is given rounded rows in float32.
        gradients: dtypes of rows, with plain matrices, that it has kernels of gradients for: its functions take
            `portable_gradient`, for the gradient of the portable backend, and its module has `missing_gradient`, which says
            where they have that one anyway.
        gathers: flag that it gathers rows on their way in: its `expert_mlp` takes `index_R`, and rows [T, D] with it. Others
            are given rows that were gathered.
        adds_zeros: flag that the zeros of rows that no group owns cost it something: its `expert_mlp` takes `zeros_beyond`,
            and leaves anything there without it.
    """

    module: str
    formats: frozenset[str] = frozenset()
    activations: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    gathers: bool = False
    adds_zeros: bool = False

    def gathers_rows(self, activations: str) -> bool:
        """Tell whether it gathers rows that are to be rounded to such a form."""
        return self.gathers and (activations == "none" or activations in self.activations)

    def may_have_gradient(self, work: Work) -> bool:
        """Tell whether it has kernels for the gradient of products with matrices of such a kind."""
        packed = any(kind.is_packed for kind in work.matrices)
        return work.rows in self.gradients and work.activations == "none" and not packed

    def load(self) -> Kernels:
        """Import the module."""
        return cast("Kernels", importlib.import_module(self.module))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPUBackend(Backend):
    """A backend that runs on some NVIDIA GPUs only, and is written in what not every jax has.

    Attributes:
        since: first version of jax that it runs with.
        capabilities: first numbers of the compute capabilities of the GPUs that it runs on.
        generations: words for those GPUs.
        links_libdevice: flag that it needs CUDA's libdevice where XLA finds it, see `missing_libdevice`.
    """

    since: tuple[int, ...]
    capabilities: range
    generations: str
    links_libdevice: bool = False

    @property
    def missing(self) -> str:
        """The reason why it does not compile on this machine, and the way out; empty where it does."""
        return missing_libdevice() if self.links_libdevice else ""

    @property
    def devices(self) -> str:
        """The GPUs in words, and by name those that `jaxmoe.hardware` knows."""
        known = [name.upper() for name, gpu in GPUS.items() if gpu.compute_capability[0] in self.capabilities]
        return f"{self.generations} ({', '.join(known)})"

    def load(self) -> Kernels:
        """Import the module.

        Raises:
            NotImplementedError: the installed jax is too old for it.
        """
        if jax.__version_info__ < self.since:
            name, since = self.module.rpartition(".")[2], ".".join(map(str, self.since))
            raise NotImplementedError(
                f"kernels {name!r} need jax {since} or newer, and this is jax {jax.__version__}: install a newer one (it "
                "needs Python 3.12), or use 'portable'"
            )
        return super().load()


_HERE = __package__
# Those that run on every platform.
BACKENDS: dict[str, Backend] = {
    "portable": Backend(module=f"{_HERE}.portable", formats=frozenset(FORMATS)),
    "reference": Backend(module=f"{_HERE}.reference", formats=frozenset(FORMATS)),
    "xla_ragged_dot": Backend(module=f"{_HERE}.xla_ragged_dot"),
}
GPU_BACKENDS: dict[str, GPUBackend] = {
    "mosaic_gpu": GPUBackend(
        module=f"{_HERE}.mosaic_gpu",
        formats=frozenset(FORMATS),
        activations=frozenset(name for name in ROW_FORMATS if name != "none"),
        gradients=frozenset({"bfloat16"}),
        gathers=True,
        adds_zeros=True,
        since=(0, 11, 2),
        capabilities=range(9, 11),
        generations="Hopper and Blackwell GPUs of data centers",
        links_libdevice=True,
    ),
    "triton": GPUBackend(
        module=f"{_HERE}.triton",
        gathers=True,
        since=(0, 10, 2),
        capabilities=range(8, 100),
        generations="NVIDIA GPUs since Ampere",
    ),
}


def find_backend(name: str) -> Backend:
    """The entry of that name; "auto" is "portable".

    Raises:
        ValueError: there is no backend of that name.
    """
    tables: dict[str, Backend] = {**BACKENDS, **GPU_BACKENDS}
    name = "portable" if name == "auto" else name
    if name not in tables:
        raise ValueError(f"backend must be 'auto' or one of {sorted(tables)}; got {name!r}. Name one of these.")
    return tables[name]


def load_backend(
    name: str,
    *stacks: Matrices,
    activations: str = "none",
    input_scales: jax.Array | None = None,
    split_over: tuple[str, ...] = (),
    portable_gradient: bool = False,
) -> Kernels:
    """Load the backend of that name, if it takes these stacks; "auto" is "portable".

    Args:
        name: name in `BACKENDS` or `GPU_BACKENDS`, or "auto".
        stacks: stacks that it has to take.
        activations: name in `ROW_FORMATS`, of what rows are to be rounded to.
        input_scales: scales of static activations, see `OnRoundedRows`.
        split_over: mesh axes over which columns of rows are split, see `OnRoundedRows`.
        portable_gradient: flag that its gradient is to be the portable one, where it has kernels of its own for that.

    Raises:
        ValueError: there is no backend of that name.
        NotImplementedError: it does not take a stack so packed, or does not run with the installed jax.
    """
    backend = find_backend(name)
    name = "portable" if name == "auto" else name
    formats = {stack.format for stack in stacks if isinstance(stack, QuantizedStack)}
    if refused := formats - backend.formats:
        raise NotImplementedError(
            f"kernels {name!r} do not take matrices packed as {' or '.join(sorted(refused))}: use 'portable', which does, "
            "or `dequantize` them first"
        )
    kernels = backend.load()
    more: dict[str, Any] = {}
    if activations == "none":
        if not (portable_gradient and backend.gradients):
            return kernels
        more = {"portable_gradient": True}
    elif activations not in backend.activations:
        return OnRoundedRows(kernels, activations, input_scales, split_over)
    else:
        more = {"activations": activations, "input_scales": input_scales, "split_over": split_over}
    module: Any = kernels
    functions = {name: partial(getattr(module, name), **more) for name in ("grouped_matmul", "expert_mlp")}
    return cast("Kernels", SimpleNamespace(**functions))


def check_backend(name: str, device: jax.Device) -> None:
    """Refuse a backend that is not known, or that cannot run on a kind of device.

    Raises:
        ValueError: there is no backend of that name.
        NotImplementedError: it cannot run there, or not with the installed jax, or CUDA lacks what it is compiled with.
    """
    load_backend(name)
    if name not in GPU_BACKENDS:
        return
    if compute_capability(device) not in GPU_BACKENDS[name].capabilities:
        raise NotImplementedError(
            f"kernels {name!r} run on {GPU_BACKENDS[name].devices}; these devices are {device.device_kind} "
            f"({device.platform}): use 'portable' or 'auto'"
        )
    if missing := GPU_BACKENDS[name].missing:
        raise NotImplementedError(f"kernels {name!r} cannot be compiled here: {missing}; or use 'portable' or 'auto'")


def compute_capability(device: jax.Device) -> int:
    """The first number of an NVIDIA GPU's compute capability; 0 of any other device, such as "gfx942" of AMD's."""
    number = re.match(r"(\d+)\.\d", str(getattr(device, "compute_capability", "")))
    return int(number[1]) if number else 0

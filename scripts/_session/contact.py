"""The first contact: what is there, whether it multiplies, and whether each kind of kernel runs at all."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scripts._bench.report import machine as described
from scripts._session.inside import TINY, check_alive, device, emit

LIBRARIES = ("jax", "flax", "numpy", "rich", "torch", "triton", "tokamax", "transformers")


def machine() -> None:
    """Emit versions, driver and multiprocessors.

    Raises:
        RuntimeError: jax sees no GPU.
    """
    here = device()
    if here.platform != "gpu" and not TINY:
        raise RuntimeError(f"jax runs on {here.platform!r}: a session wants a GPU, and --tiny is for a CPU")
    driver = Path("/proc/driver/nvidia/version")
    memory = here.memory_stats() or {}
    emit(
        "machine",
        **described(here),
        multiprocessors=getattr(here, "core_count", None),
        compute_capability=getattr(here, "compute_capability", None),
        driver=driver.read_text().splitlines()[0] if driver.exists() else None,
        platform_version=here.client.platform_version,
        memory=memory.get("bytes_limit"),
        ptxas=shutil.which("ptxas"),
        # Mosaic GPU and Triton's kernels are assembled with what lies there; without it jax looks no further.
        cuda_folder=cuda_folder(),
        missing=[name for name in LIBRARIES if importlib.util.find_spec(name) is None],
    )


def cuda_folder() -> str | None:
    """The CUDA folder that jax hands to XLA and Mosaic GPU; None where it finds none."""
    try:
        from jax._src.lib import cuda_path  # no public name has it; the session does without
    except ImportError:
        return None
    return str(cuda_path) if cuda_path else None


def alive() -> None:
    """Emit that a product by XLA is right."""
    check_alive()
    emit("alive", right=True)


def trivial_kernel(kernel: str) -> None:
    """Emit that a kernel which adds one to 256 numbers, compiled the way of `kernel`, is right.

    Raises:
        ArithmeticError: it is wrong.
    """
    added = np.asarray(add_one(kernel)(jnp.arange(256, dtype=jnp.float32)))
    if not np.array_equal(added, np.arange(1, 257)):
        raise ArithmeticError(f"one added to 256 numbers gives {added[:4]} ... {added[-4:]}")
    emit("check", case="one added to 256 numbers", verdict="right", detail="")


def add_one(kernel: str) -> Any:
    """The function of float32 [256] that adds one, as a Pallas kernel by Mosaic GPU or Triton."""
    from jax.experimental import pallas as pl

    def body(x: Any, out: Any) -> None:
        out[...] = x[...] + 1.0

    out = jax.ShapeDtypeStruct((256,), jnp.float32)
    if kernel == "mosaic_gpu":
        # Since jax 0.11.2 `pallas_call` has no way to Mosaic GPU, and fails an assertion where it is asked for it.
        from jax.experimental.pallas import mosaic_gpu

        options = mosaic_gpu.CompilerParams(lowering_semantics=mosaic_gpu.LoweringSemantics.Warpgroup)
        return jax.jit(mosaic_gpu.kernel(body, out_type=out, compiler_params=options))
    from jax.experimental.pallas import triton

    return jax.jit(
        pl.pallas_call(body, out_shape=out, compiler_params=triton.CompilerParams(num_warps=4, num_stages=1))
    )

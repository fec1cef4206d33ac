"""The operations in torch, on jax's own arrays; needs torch for the same kind of device."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch

from scripts._bench.cases import Case
from scripts._bench.inputs import Variant

# From rows [R, K], matrices [G, N, K], ends of the groups (int32 [G]) and their sizes on the host to [R, N].
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


def grouped_mm(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """As transformers does it: a transposed view of the matrices, no copy."""
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return function(rows, matrices.transpose(-2, -1), offs=ends)


def mm_loop(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """What transformers falls back to: one product for each group that has rows."""
    out = rows.new_empty(rows.shape[0], matrices.shape[1])
    start = 0
    for matrix, size in zip(matrices, sizes, strict=True):
        if size:
            torch.mm(rows[start : start + size], matrix.T, out=out[start : start + size])
            start += size
    return out


def apply(product: Product, case: Case, inputs: tuple[Any, ...]) -> torch.Tensor:
    """The case's operation."""
    rows, ends, sizes, *matrices = inputs
    out = product(rows, matrices[0], ends, sizes)
    if case.operation == "mlp":
        gate, up = out.chunk(2, dim=-1)
        out = product(torch.nn.functional.silu(gate) * up, matrices[1], ends, sizes)
    return out


def prepare(product: Product, case: Case, variants: Sequence[Variant]) -> Callable[[], torch.Tensor]:
    """A turn; on a GPU a CUDA graph of all its calls, for the same reason as `sides.jax_turn`.

    Raises:
        NotImplementedError: jax's arrays are on a GPU, and torch is not built for one.
    """
    cuda = variants[0].rows.devices().pop().platform == "gpu"
    if cuda and not torch.cuda.is_available():
        raise NotImplementedError(f"torch {torch.__version__} sees no GPU")
    inputs = [_inputs(case, variant) for variant in variants]

    @torch.inference_mode()
    def calls() -> list[torch.Tensor]:
        return [apply(product, case, one) for one in inputs]

    if not cuda:
        return lambda: calls()[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = calls()

    def turn() -> torch.Tensor:
        graph.replay()
        torch.cuda.synchronize()
        return outs[0]

    return turn


def _inputs(case: Case, variant: Variant) -> tuple[Any, ...]:
    def shared(array: jax.Array) -> torch.Tensor:
        return torch.from_dlpack(jax.block_until_ready(array))

    sizes = variant.host_sizes.tolist()
    rows = shared(variant.rows)
    ends = torch.tensor(sizes, device=rows.device).cumsum(0).to(torch.int32)
    return rows, ends, sizes, *map(shared, variant.layer.matrices(case.operation))

"""Tiles: a dozen candidates a case by a model of their cost, compiled in threads, and the headline with the best of them."""

import importlib
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax

from jaxmoe.hardware import GPU, GPUS, get_gpu
from jaxmoe.kernels.grouped_matmul import check_backend, expert_mlp
from jaxmoe.kernels.grouped_matmul.backends import GPU_BACKENDS
from jaxmoe.kernels.grouped_matmul.predict import Product, likely_sizes, predict
from jaxmoe.kernels.grouped_matmul.tile_table import user_tables, write_table
from scripts import tune_kernels
from scripts._bench.cases import Case
from scripts._bench.inputs import Variant, make_layers, make_variants
from scripts._bench.report import reason
from scripts._bench.sides import Side, Turn, jax_turn
from scripts._bench.tuning import tune
from scripts._session.inside import device, emit, shapes, tokens, while_time
from scripts._session.speed import emit_speed

MOST_CANDIDATES, THREADS = 12, 8


def tuning(kernel: str) -> None:
    """Emit the fastest tiles of a kernel for Qwen3-30B-A3B's and Mixtral's experts, and write them into a table."""
    try:
        check_backend(kernel, device())
    except NotImplementedError as refusal:
        emit("tuning_refused", left_out=reason(refusal))
        return
    module = importlib.import_module(GPU_BACKENDS[kernel].module)
    named = shapes("qwen3-30b-a3b", "mixtral-8x7b")
    for name, shape in while_time(named.items()):
        layers = make_layers(shape, "bfloat16", device())
        cases = [(T, operation) for T in tokens(32, 4096, 128) for operation in ("mlp", "down")]
        for T, operation in while_time(cases):
            case = Case(name, shape, operation, T, "uniform", "bfloat16")
            try:
                _tune_case(kernel, module, case, make_variants(case, layers))
            except Exception as refusal:  # one case; others may do
                emit("tuning_refused", left_out=f"{name}, {operation}, {T} tokens: {reason(refusal)}")
        del layers


def _tune_case(kernel: str, module: Any, case: Case, variants: Sequence[Variant]) -> None:
    kind = device().device_kind
    every = tune_kernels.list_candidates(kernel, module, case, variants[0], kind)
    candidates = cheapest(every, case, known_gpu(kind))
    found = tune(
        tune_kernels.with_tiles(module, case, kind), candidates, case, variants, rounds=3, budget_s=0.5, threads=THREADS
    )
    best = found.best()
    if best is not None:
        table = {"device": kind, "entries": [tune_kernels.entry(kernel, case, found)]}
        write_table(table, user_tables())
    emit(
        "tuned",
        case=f"{kernel}, {case.name}, {'gate and up' if case.operation == 'mlp' else 'down'}, {case.tokens} tokens",
        tiles=str(best) if best is not None else "its own choice",
        seconds=found.default_seconds if best is None else found.seconds[best],
        default_seconds=found.default_seconds,
        candidates=len(candidates),
        refused={str(tiles): why for tiles, why in found.refused.items()},
    )


def known_gpu(device_kind: str) -> GPU:
    """The kind of device in `jaxmoe.hardware`; an H100 where it is not known."""
    try:
        return get_gpu(device_kind)
    except ValueError:
        return GPUS["h100"]


def cheapest(candidates: Sequence[Any], case: Case, gpu: GPU, *, most: int = MOST_CANDIDATES) -> list[Any]:
    """The candidates that a model of their cost has as the fastest, the kernel's own choice, which is first, among them.

    Args:
        candidates: tiles with m, n, k and stages.
        case: what they are for; rows are spread evenly.
        gpu: kind of GPU.
        most: number of candidates.
    """
    first, *others = candidates
    return [first, *sorted(others, key=lambda tiles: cost(tiles, case, gpu))[: most - 1]]


def cost(tiles: Any, case: Case, gpu: GPU) -> tuple[float, float]:
    """The predicted seconds of the product that tiles are for, and those on the chip, which memory may hide.

    Those of Triton's tiles are as if the Hopper kernel had them.
    """
    shape, fused = case.shape, case.operation == "mlp"
    product = Product(
        sizes=likely_sizes(case.tokens, shape.per_token, shape.experts),
        halves=2 if fused else 1,
        N=shape.expert_width if fused else shape.width,
        K=shape.width if fused else shape.expert_width,
        out_bytes=2 if fused else 4,
    )
    if not hasattr(tiles, "swapped"):
        # Triton's n counts gate and up together, Mosaic GPU's each of them.
        sizes = {name: getattr(tiles, name) for name in ("m", "k", "stages", "band")}
        tiles = SimpleNamespace(**sizes, n=max(1, tiles.n // product.halves), swapped=False)
    found = predict(product, tiles, gpu)
    return found.seconds, found.on_chip


def headline(kernel: str) -> None:
    """Emit the times of Qwen3-30B-A3B's and Mixtral's experts with the tiles that this session tuned, float32 results."""
    side = Side(kernel, partial(_prepare_float32, kernel))
    tuned = user_tables().exists()
    for name, shape in while_time(shapes("qwen3-30b-a3b", "mixtral-8x7b").items()):
        layers = make_layers(shape, "bfloat16", device())
        for T in while_time(tokens(32, 4096, 128)):
            emit_speed(Case(name, shape, "mlp", T, "uniform", "bfloat16"), layers, side, tuned=tuned)
        del layers


def _prepare_float32(kernel: str, case: Case, variants: Sequence[Variant]) -> Turn:
    """The MLP as a layer asks for it: sums of the second product as they are, for it adds them up over experts."""

    def mlp(rows: jax.Array, sizes: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        gate_up = up.reshape(up.shape[0], 2, -1, up.shape[2])
        return expert_mlp(
            rows, gate_up, down, sizes, out_dtype="float32", backend=kernel, device_kind=device().device_kind
        )

    inputs = [(v.rows, v.group_sizes, *v.layer.matrices(case.operation)) for v in variants]
    return jax_turn(mlp, inputs, device())

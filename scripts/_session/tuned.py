"""Tiles: a dozen candidates a case by a model of their cost, compiled in threads, and the headline with the best of them."""

from collections.abc import Sequence
from functools import partial

import jax

from jaxmoe.kernels.grouped_matmul import check_backend, expert_mlp
from jaxmoe.kernels.grouped_matmul.tile_table import user_tables, write_table
from jaxmoe.kernels.grouped_matmul.tuning import TuningCase, cases_of, entry_of, tune
from scripts._bench.cases import Case
from scripts._bench.inputs import Variant, make_layers
from scripts._bench.report import reason
from scripts._bench.sides import Side, Turn, jax_turn
from scripts._session.inside import check_alive, device, emit, shapes, tokens, while_time
from scripts._session.speed import emit_speed


def tuning(kernel: str) -> None:
    """Emit the fastest tiles of a kernel for Qwen3-30B-A3B's and Mixtral's experts, and write them into a table."""
    try:
        check_backend(kernel, device())
    except NotImplementedError as refusal:
        emit("tuning_refused", left_out=reason(refusal))
        return
    cases = [
        case
        for name, shape in shapes("qwen3-30b-a3b", "mixtral-8x7b").items()
        for T in tokens(32, 4096, 128)
        for case in cases_of(
            name,
            experts=shape.experts,
            per_token=shape.per_token,
            width=shape.width,
            expert_width=shape.expert_width,
            tokens=[T],
        )
    ]
    for case in while_time(cases):
        try:
            _tune_case(kernel, case)
        except Exception as refusal:  # one case; others may do
            check_alive()
            emit("tuning_refused", left_out=f"{case}: {reason(refusal)}")


def _tune_case(kernel: str, case: TuningCase) -> None:
    found = tune(kernel, case, device(), rounds=3)
    best = found.best()
    if best is not None:
        write_table({"device": device().device_kind, "entries": [entry_of(kernel, case, found)]}, user_tables())
    emit(
        "tuned",
        case=f"{kernel}, {case}",
        tiles=str(best) if best is not None else "its own choice",
        seconds=found.default_seconds if best is None else found.seconds[best],
        default_seconds=found.default_seconds,
        candidates=len(found.seconds),
        refused={str(tiles): why for tiles, why in found.refused.items()},
    )


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

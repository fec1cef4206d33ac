"""How fast the experts' MLPs are, by the side that the job names: one process holds one side."""

import os

import jax.numpy as jnp
import numpy as np

from scripts._bench.cases import Case, floor_of
from scripts._bench.ceilings import measure_ceilings
from scripts._bench.inputs import Layer, exact_sample, make_layers, make_variants, to_float64
from scripts._bench.report import check_error, reason
from scripts._bench.sides import Side, all_sides
from scripts._session import clock
from scripts._session.inside import TINY, check_alive, device, emit, shapes, tokens, while_time

NAMES = ("qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b", "deepseek-v3-ep8")


def ceilings() -> None:
    """Emit the rates of a large dense product and of a large copy, on which floors are built."""
    emit("ceilings", **measure_ceilings("bfloat16", device(), quick=TINY)._asdict())


def expert_mlps(side: str) -> None:
    """Emit the times of a side for all shapes and numbers of tokens, decoding and prefill first."""
    _measure_all(side, tokens(32, 4096, 1, 128, 16384))


def few_rows(side: str) -> None:
    """Emit the times of a side that multiplies every row by every matrix: at few rows only."""
    _measure_all(side, tokens(1, 32))


def _measure_all(name: str, counts: tuple[int, ...]) -> None:
    side = next(side for side in all_sides() if side.name == name)
    for shape_name, shape in while_time(shapes(*NAMES).items()):
        layers = make_layers(shape, "bfloat16", device())
        for T in while_time(counts):
            emit_speed(Case(shape_name, shape, "mlp", T, "uniform", "bfloat16"), layers, side)
        del layers


def skewed(kernel: str) -> None:
    """Emit the times of a kernel where few experts have most rows."""
    side = next(side for side in all_sides() if side.name == kernel)
    for name, shape in shapes("qwen3-30b-a3b").items():
        layers = make_layers(shape, "bfloat16", device())
        cases = [(routing, T) for T in tokens(4096, 32) for routing in ("zipf", "one", "half")]
        for routing, T in while_time(cases):
            emit_speed(Case(name, shape, "mlp", T, routing, "bfloat16"), layers, side)


def emit_speed(case: Case, layers: list[Layer], side: Side, *, tuned: bool = False) -> None:
    """Time a side on a case, if its result is right.

    Args:
        case: what is computed.
        layers: matrices to take turns with.
        side: who computes it.
        tuned: flag that its tiles were tuned in this session.
    """
    variants = make_variants(case, layers)
    what = {"shape": case.name, "tokens": case.tokens, "routing": case.routing, "side": side.name, "tuned": tuned}
    what |= case.shape._asdict() | {"dtype": case.dtype}
    what["fusion"] = "ragged_dot_fusion" in os.environ.get("XLA_FLAGS", "")
    sample = exact_sample(case, variants[0])
    try:
        turn = side.prepare(case, variants)
        error = check_error(sample.error(to_float64(turn(), sample.rows)), case.dtype)
        timed = clock.measure(turn, device(), torch=side.name.startswith("torch"))
    except Exception as refusal:  # whatever it is, it is listed
        check_alive()
        emit("speed_refused", **what, left_out=f"{case.name}, {case.tokens} tokens, {case.routing}: {reason(refusal)}")
        return
    touched = float(np.mean([np.count_nonzero(variant.host_sizes) for variant in variants]))
    floor = floor_of(case, touched, jnp.dtype(case.dtype).itemsize)
    times = timed._asdict() | {"by_kernel": timed.by_kernel[:6]}
    emit("speed", **what, error=error, flops=floor.flops, bytes=floor.nbytes, **times)

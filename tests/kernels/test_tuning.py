"""Tuning of tiles and `jaxmoe tune`, with a kernel that needs no GPU and a clock that knows its tiles."""

import dataclasses
import json
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.cli import main
from jaxmoe.hardware import GPUS
from jaxmoe.kernels.grouped_matmul import GPU_BACKENDS, grouped_matmul, triton, tuning
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import Tiles as MosaicTiles
from jaxmoe.kernels.grouped_matmul.tile_table import lookup
from jaxmoe.kernels.grouped_matmul.tuning import TuningCase, cases_of, cheapest, cost, tune

SMALL = {"experts": 6, "per_token": 2, "width": 32, "expert_width": 16}


@dataclasses.dataclass(frozen=True)
class Tiles:
    m: int
    n: int = 16
    k: int = 16
    stages: int = 2
    band: int = 8


# Seconds by rows of a tile, those of the kernel's own choice first; and tiles that give wrong results.
TIMES, WRONG, NOT_FINITE = {None: 4, 8: 3, 16: 1, 32: 2, 64: 0, 128: 0}, 64, 128


class FakeKernel:
    """A kernel whose tiles are wrong, do not compile, or take some time: that of those it ran with last."""

    def __init__(self):
        self.rows_of = {}

    def candidate_tiles(self, R, G, K, N, itemsize):
        return [Tiles(m) for m in (8, 16, 32, 64, 128, 256)]

    def grouped_matmul(self, lhs_RK, rhs_GNK, sizes, *, out_dtype, device_kind, tiles):
        assert device_kind == jax.devices()[0].device_kind
        rows = None if tiles is None else tiles.m
        if rows not in TIMES:
            raise ValueError("too much shared memory")
        out = grouped_matmul(lhs_RK, rhs_GNK, sizes, out_dtype=out_dtype)
        jax.debug.callback(partial(self.note, rows))
        return {WRONG: out * 2, NOT_FINITE: out * jnp.nan}.get(rows, out)

    def note(self, rows):
        self.last = rows

    def expert_mlp(self, x_TD, up, down, sizes, *, index_R, combine, out_dtype, tiles, device_kind, b_up_pN, b_down_pD):
        x_RD = x_TD[index_R]
        h = combine(
            self.grouped_matmul(x_RD, up, sizes, out_dtype=jnp.float32, device_kind=device_kind, tiles=tiles[0])
        )
        return grouped_matmul(h.astype(x_RD.dtype), down, sizes, out_dtype=out_dtype)

    def clock(self, turn):
        turn()
        jax.effects_barrier()
        return TIMES[self.last] * tuning.CALLS


@pytest.fixture
def kernel(monkeypatch):
    fake = FakeKernel()
    monkeypatch.setattr(tuning, "CALLS", 2)
    monkeypatch.setitem(sys.modules, GPU_BACKENDS["triton"].module, fake)
    return fake


@pytest.mark.parametrize("gate_up", [True, False])
def test_tuning_takes_the_fastest_that_is_right(kernel, gate_up):
    case = next(case for case in cases_of("small", tokens=[5], **SMALL) if case.gate_up == gate_up)
    tuned = tune("triton", case, jax.devices()[0], clock=kernel.clock, rounds=1)
    assert tuned.best() == Tiles(16)
    assert list(tuned.seconds) == [Tiles(16), Tiles(32), Tiles(8)]
    assert tuned.default_seconds == TIMES[None]
    assert "wrong: a row is off by" in tuned.refused[Tiles(WRONG)]
    assert "wrong: a row is off by inf" in tuned.refused[Tiles(NOT_FINITE)]
    assert tuned.refused[Tiles(256)] == "ValueError: too much shared memory"


def test_tuning_notes_nothing_that_is_no_faster(kernel, monkeypatch):
    monkeypatch.setitem(TIMES, None, 1)
    case = cases_of("small", tokens=[5], **SMALL)[1]
    assert tune("triton", case, jax.devices()[0], clock=kernel.clock, rounds=1).best() is None


def test_tuning_refuses_a_kernel_that_is_wrong_by_itself(kernel, monkeypatch):
    monkeypatch.setattr(kernel, "grouped_matmul", lambda lhs, *rest, **more: jnp.zeros((lhs.shape[0], 32), jnp.float32))
    with pytest.raises(
        ArithmeticError, match="triton is wrong with its own choice of tiles: a row is off by 1 of its norm"
    ):
        tune("triton", cases_of("small", tokens=[5], **SMALL)[1], jax.devices()[0], clock=kernel.clock)


def test_cost_model_prefers_small_tiles_for_few_rows_and_keeps_the_kernels_own_choice():
    small = MosaicTiles(m=16, n=128, k=64, stages=4, swapped=True)
    large = dataclasses.replace(small, m=128)
    few, many = (
        TuningCase(name="q", groups=128, rows=8 * T, width=2048, expert_width=768, gate_up=False) for T in (32, 16384)
    )
    h100 = GPUS["h100"]
    assert cost(small, few, h100) < cost(large, few, h100)
    assert cost(large, many, h100) < cost(small, many, h100)
    others = [dataclasses.replace(small, band=band) for band in range(1, 20)]
    assert cheapest([large, *others], few, h100) == [large, *others[:11]]
    # Triton's n counts both halves.
    fused = dataclasses.replace(many, gate_up=True)
    same = triton.Tiles(m=128, n=256, k=64, stages=4, warps=8, band=8)
    assert cost(same, fused, h100) == cost(dataclasses.replace(large, swapped=False), fused, h100)


# --- the command


@pytest.fixture
def runs_here(kernel, monkeypatch):
    monkeypatch.setattr("jaxmoe.kernels.grouped_matmul.check_backend", lambda name, device: None)
    monkeypatch.setattr(tuning, "gpu_seconds", kernel.clock)
    monkeypatch.setattr(tuning, "cases_of", partial(small_cases, tuning.cases_of))


def small_cases(cases_of, name, *, tokens, **sizes):
    """The cases of the command with sizes that a CPU does at once; the sizes asked for are checked below."""
    return cases_of(name, tokens=tokens, **SMALL)


def test_command_writes_the_users_table(runs_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    # 5 and 6 tokens are of the same class of rows a group.
    options = ["--model", "mixtral-8x7b", "--tokens", "5", "--tokens", "6", "--kernel", "triton"]
    assert main(["tune", *options, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [len(result["refused_candidates"]) for result in results] == [3, 3]
    assert [result["seconds"] for result in results] == [1.0, 1.0]
    device = jax.devices()[0].device_kind
    common = {"dtype": "bfloat16", "rows_per_group": 2}
    up, down = {"kernel": "triton.gate_up", "out_dtype": "bfloat16"}, {"kernel": "triton", "out_dtype": "float32"}
    assert lookup(device, **up, K=32, N=32, **common)["tiles"]["m"] == 16
    assert lookup(device, **down, K=16, N=32, **common)["tiles"]["m"] == 16
    assert lookup(device, **down, K=32, N=32, **common) is None
    found = tuning.Tuned(2e-6, {Tiles(16): 1e-6}, {Tiles(8): "wrong"})
    monkeypatch.setattr(tuning, "tune", lambda *case: found)
    assert main(["tune", *options, "--tables", str(tmp_path / "own")]) == 0
    line = f"2.0 us by its own choice; 1 candidates right, 1 refused; into {tmp_path / 'own'}"
    assert capsys.readouterr().out.count(line) == 2


def test_command_tunes_what_a_device_has_of_a_checkpoint(runs_here, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(tuning, "cases_of", lambda name, **sizes: asked.append(sizes) or [])
    assert main(["tune", "docs/configs/Qwen3-30B-A3B", "--mesh", "ep=4,tp=2", "--tokens", "7"]) == 0
    sizes = {"experts": 32, "per_token": 8, "width": 2048, "expert_width": 384}
    assert asked == [sizes | {"tokens": [7], "dtype": "bfloat16"}]
    assert main(["tune", "--model", "gpt-oss-20b", "--mesh", "tp=7"]) == 1
    assert "tp must divide the experts' width: gpt-oss-20b has 2880, --mesh has tp=7" in capsys.readouterr().err


def test_command_fails_where_nothing_can_be_tuned(runs_here, kernel, monkeypatch, capsys):
    def no_memory(*args, **more):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand much more")

    monkeypatch.setattr(kernel, "candidate_tiles", no_memory)
    assert main(["tune", "--model", "mixtral-8x7b", "--tokens", "5", "--kernel", "triton"]) == 1
    assert capsys.readouterr().err == "jaxmoe: error: nothing could be tuned: RESOURCE_EXHAUSTED: Out of memory\n"


def test_command_says_in_one_line_what_is_missing(capsys):
    assert main(["tune", "--model", "mixtral-8x7b"]) == 1
    error = capsys.readouterr().err
    # An older jax is named before the devices are.
    assert re.match(
        "jaxmoe: error: tuning wants a GPU that runs the kernels: kernels 'mosaic_gpu' (run on|need jax 0.11.2)", error
    )
    assert error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main(["tune"])
    assert "name a checkpoint, or a model by --model" in capsys.readouterr().err

"""Kernels on the GPU at hand, by the checks of scripts/gpu_session: `scripts/test --gpu`, or pytest with that option."""

from itertools import starmap

import jax
import pytest

from jaxmoe.kernels.grouped_matmul import check_backend
from jaxmoe.kernels.grouped_matmul.trial import FEW, MANY, WIDE, Rows, try_work
from scripts._bench.cases import SHAPES, Case
from scripts._bench.inputs import make_layers, make_variants
from scripts._session.contact import add_one
from scripts._session.correctness import SIZES, hold_against_float64, packed_works, plain_works

KERNELS = ("mosaic_gpu", "triton")


def need(kernel: str) -> jax.Device:
    """The GPU, where there is one that runs the kernel; else the test is skipped, and says why."""
    device = jax.devices()[0]
    try:
        check_backend(kernel, device)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return device


def check(work, kernel, cases) -> None:
    outcome = try_work(work, kernel, device_kind=need(kernel).device_kind, cases=cases)
    if outcome.verdict == "refused":
        pytest.skip(outcome.detail)
    assert outcome.verdict == "right", outcome


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_that_adds_one(kernel):
    need(kernel)
    assert add_one(kernel)(jax.numpy.arange(256.0)).tolist() == [*range(1, 257)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("operation", ["mlp", "down"])
@pytest.mark.parametrize("tokens", [32, 4096])
def test_all_rows_of_four_groups(kernel, operation, tokens):
    device = need(kernel)
    shape = SHAPES["qwen3-30b-a3b"]
    case = Case("qwen3-30b-a3b", shape, operation, tokens, "uniform", "bfloat16")
    outcome = hold_against_float64(case, make_variants(case, make_layers(shape, "bfloat16", device))[0], kernel)
    assert outcome.verdict == "right", outcome


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("name", "work"), [pytest.param(name, work, id=name) for name, work in plain_works()])
def test_plain_matrices(kernel, name, work):
    check(work, kernel, (FEW, *starmap(Rows, SIZES), MANY) if "tests" in name else (FEW, MANY, WIDE))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("work", [pytest.param(work, id=name) for name, work in packed_works()])
def test_packed_matrices(kernel, work):
    check(work, kernel, (FEW, MANY, WIDE))

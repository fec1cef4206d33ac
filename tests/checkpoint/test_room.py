"""A model that has no room on its devices is refused before anything is read, with a mesh on which it has."""

import re
import sys

import jax
import pytest

import jaxmoe
from jaxmoe.checkpoint.loading import room
from jaxmoe.planning.memory import CACHE
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of
from tests.support.quantized_checkpoints import write_pair

QWEN = GOLDENS / "qwen3_moe" / "original"


def held_on(path, shape, **options) -> int:
    plan = jaxmoe.plan(path, **dict(zip(("dp", "tp", "ep"), shape, strict=True)), **options)
    return round(plan.held_bytes - plan.parts[CACHE].max())


def refused(path, mesh, **options) -> str:
    with pytest.raises(jaxmoe.CheckpointError, match="fit in the free memory of each device") as caught:
        jaxmoe.load(path, mesh=mesh, **options)
    return str(caught.value)


@pytest.fixture
def free(monkeypatch):
    """A function that says how many bytes each device has left."""

    def leave(size: int, fuller: int | None = None) -> None:
        last = jax.devices()[-1]
        monkeypatch.setattr(room, "free_bytes", lambda device: size if fuller is None or device != last else fuller)

    return leave


@pytest.fixture
def unread(monkeypatch):
    def read(*_args, **_kwargs):
        raise AssertionError("something was read")

    monkeypatch.setattr(sys.modules["jaxmoe.checkpoint.loading.load"], "load_arrays", read)


def test_the_last_byte_counts(free) -> None:
    needed = held_on(QWEN, (1, 2, 4))
    free(needed)
    jaxmoe.load(QWEN, mesh=mesh_of(1, 2, 4))
    free(needed - 1)
    refused(QWEN, mesh_of(1, 2, 4))


@pytest.mark.usefixtures("unread")
def test_the_message_names_a_mesh_of_as_many_devices_where_there_is_one(free) -> None:
    least = held_on(QWEN, (1, 2, 4))
    free(least)
    message = refused(QWEN, mesh_of(8, 1, 1))
    proposed = re.search(r"dp=1,tp=(\d),ep=(\d) would take \S+ GB on each of 8 devices", message)
    assert proposed, message
    assert held_on(QWEN, (1, int(proposed[1]), int(proposed[2]))) <= least


@pytest.mark.usefixtures("unread")
def test_the_fullest_device_of_the_mesh_decides(free) -> None:
    free(10**9, fuller=100)
    message = refused(QWEN, mesh_of(2, 2, 2))
    assert f"{jax.devices()[-1]} has 1e-07 GB free" in message
    assert "they fit on no mesh of up to 64 times as many devices" in message


@pytest.mark.usefixtures("unread")
def test_packed_weights_count_as_they_are_held(free, tmp_path) -> None:
    path, _, _ = write_pair(tmp_path, "qwen3_moe", "fp8_block", {"quant_method": "fp8", "weight_block_size": [24, 32]})
    packed, decoded = (held_on(path, (1, 1, 2), quantized=how) for how in ("keep", "dequantize"))
    assert packed < decoded
    free(decoded - 1)
    refused(path, mesh_of(1, 1, 2), quantized="dequantize")
    with pytest.raises(AssertionError, match="something was read"):
        jaxmoe.load(path, mesh=mesh_of(1, 1, 2))
    free(packed - 1)
    assert re.search(r"would take \S+ GB on each of [24] devices", refused(path, mesh_of(1, 1, 2)))


def test_a_device_that_does_not_tell_refuses_nothing(free) -> None:
    free(None)
    jaxmoe.load(QWEN, mesh=mesh_of(1, 1, 2))


def test_simulated_devices_share_the_memory_of_the_machine() -> None:
    device = jax.devices()[0]
    share = room.free_bytes(device)
    assert share is None or 2**20 < share < 2**44 // len(jax.devices())

"""A model that has no room on its devices is refused before anything is read, with a mesh on which it has."""

import re
import sys

import jax
import pytest

import jaxmoe
from jaxmoe.checkpoint.loading import room
from jaxmoe.layers import held_factors, params_by_path
from jaxmoe.planning.memory import CACHE
from tests.support.adapters import factors, write_adapter
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of
from tests.support.quantized_checkpoints import write_pair, write_plain

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
    assert "XLA_CLIENT_MEM_FRACTION" not in message
    assert "JAX takes 75% unless XLA_CLIENT_MEM_FRACTION says more" in room._jax_takes("gpu")


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


def on_devices(model) -> dict[jax.Device, int]:
    """Bytes of parameters and of adapters' factors, by what the devices say of their arrays."""
    held = dict.fromkeys(model.mesh.devices.flat, 0)
    for variable in (*params_by_path(model).values(), *held_factors(model).values()):
        for shard in variable.get_value().addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held


@pytest.mark.parametrize(
    ("family", "options", "ranks"),
    [
        ("qwen3_moe", {"quantize": "int8"}, ()),
        ("qwen3_moe", {"quantize": "fp8_block"}, (5, 3)),
        ("qwen3_moe", {}, (4,)),
        pytest.param("deepseek_v3", {"quantize": "mxfp4"}, (), marks=pytest.mark.full),
    ],
    ids=["quantize", "quantize-adapters", "adapter", "latent attention"],
)
def test_what_counts_is_what_the_devices_hold_in_the_end(family, options, ranks, free, tmp_path, monkeypatch) -> None:
    path, mesh = write_plain(tmp_path / "plain", family), mesh_of(1, 2, 2)
    matrices = {"model.layers.0.self_attn.o_proj": 64, "model.layers.1.mlp.experts.7.up_proj": 32}
    made = [factors(matrix, outs, 64, rank) for (matrix, outs), rank in zip(matrices.items(), ranks, strict=False)]
    adapters = {
        str(rank): write_adapter(tmp_path / f"of rank {rank}", arrays, r=rank)
        for rank, arrays in zip(ranks, made, strict=True)
    }
    free(None)
    model = jaxmoe.load(path, mesh=mesh, adapters=adapters, **options)
    (held,) = set(on_devices(model).values())
    assert bool(held_factors(model)) == bool(ranks)

    def read(*_args, **_kwargs):
        raise AssertionError("something was read")

    for name in ("load_arrays", "load_quantized"):
        monkeypatch.setattr(sys.modules["jaxmoe.checkpoint.loading.load"], name, read)
    free(held)
    with pytest.raises(AssertionError, match="something was read"):
        jaxmoe.load(path, mesh=mesh, adapters=adapters, **options)
    free(held - 1)
    message = refused(path, mesh, adapters=adapters, **options)
    assert ("parameters and adapters have" in message) == bool(ranks)
    assert re.search(r"would take \S+ GB on each of \d+ devices", message)


@pytest.mark.usefixtures("unread")
def test_an_adapter_of_another_model_is_refused_before_the_weights_are_read(tmp_path) -> None:
    adapter = write_adapter(tmp_path / "other", factors("model.layers.0.self_attn.o_proj", 7, 64))
    with pytest.raises(jaxmoe.CheckpointError, match="must have the shape"):
        jaxmoe.load(QWEN, mesh=mesh_of(1, 1, 2), adapters={"other": adapter})


def test_a_device_that_does_not_tell_refuses_nothing(free) -> None:
    free(None)
    jaxmoe.load(QWEN, mesh=mesh_of(1, 1, 2))


def test_simulated_devices_share_the_memory_of_the_machine() -> None:
    device = jax.devices()[0]
    share = room.free_bytes(device)
    assert share is None or 2**20 < share < 2**44 // len(jax.devices())

"""What was saved is what is loaded, for every mesh and layout, from exactly the bytes that are needed."""

import itertools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.checkpoint import Block, load_arrays, load_shards, make_load_plan, open_checkpoint
from tests.support.loading import BF16, F16, F32, PATHS, Case, add_experts, add_tensor, bits, check_arrays, random, spec
from tests.support.meshes import MESH_SHAPES, mesh_of
from tests.support.runs import examples
from tests.support.writing import write_checkpoint

pytestmark = pytest.mark.covering


def load(case: Case, directory, **options):
    plan = make_load_plan(open_checkpoint(directory), case.specs, case.blocks, expert_params=case.expert_params)
    placed = dict.fromkeys(plan.bytes_per_device, 0)

    def place(device: int, count: int) -> None:
        placed[device] += count

    arrays, report = load_arrays(plan, placed=place, **options)
    assert placed == plan.bytes_per_device  # padding and replicas among them
    assert report.bytes_read == report.bytes_needed == plan.bytes_needed
    assert report.bytes_needed == bytes_on_disk_needed(case)
    return arrays, report


def bytes_on_disk_needed(case: Case) -> int:
    """With all devices local: every tensor, once."""
    return sum(tensor.nbytes for tensor in case.tensors.values())


@st.composite
def slots(draw, num_experts: int, ep: int):
    """A slot_to_expert: every expert somewhere, then replicas and padding, in any order."""
    extra = draw(st.lists(st.integers(-1, num_experts - 1), max_size=2 * ep))
    padding = -(num_experts + len(extra)) % ep
    return draw(st.permutations([*range(num_experts), *extra, *[-1] * padding]))


@settings(max_examples=examples(10, 40))
@given(data=st.data())
def test_loading_equals_what_was_saved(data, tmp_path_factory):
    dp, tp, ep = data.draw(st.sampled_from(MESH_SHAPES), "mesh")
    mesh = mesh_of(dp, tp, ep)
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    dtype, disk_dtype = data.draw(st.sampled_from([(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F16, F32)]))
    num_experts = data.draw(st.sampled_from([1, 3, 11, 12]), "experts")
    width = tp * data.draw(st.sampled_from([1, 2, 8]), "F per tp")
    model = data.draw(st.sampled_from([1, 5, 8]), "D")
    case = Case()
    for layer in range(2):
        add_experts(
            case,
            mesh,
            rng,
            data.draw(slots(num_experts, ep), "slots"),
            num_experts,
            data.draw(st.sampled_from(["per_expert", "fused"]), "layout"),
            layer=layer,
            model=model,
            width=width,
            dtype=dtype,
            disk_dtype=disk_dtype,
        )
    vocab = data.draw(st.integers(1, 3 * tp), "vocab")
    rows = (*range(vocab), *[-1] * (-vocab % tp))
    add_tensor(case, mesh, rng, "embed", (vocab, 3), ("tp", None), dtype, disk_dtype, rows=rows, groups=vocab)
    heads = data.draw(st.sampled_from([h for h in (1, 2, 4, 8) if h <= tp]), "key/value heads")
    rows = tuple(np.repeat(np.arange(heads), tp // heads).tolist())
    add_tensor(case, mesh, rng, "k_proj", (heads * 2, 3), ("tp", None), dtype, disk_dtype, rows=rows, groups=heads)
    add_tensor(case, mesh, rng, "o_proj", (5, 2 * tp), (None, "tp"), dtype, disk_dtype)
    add_tensor(case, mesh, rng, "norm", (7,), (), F32)
    add_tensor(case, mesh, rng, "scalar", (), (), F32)
    add_tensor(case, mesh, rng, "empty", (0, 4), (), F32)
    shards = data.draw(st.sampled_from([1, 3]), "files")
    directory = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), case.tensors, shards=shards)
    arrays, report = load(case, directory, **PATHS[data.draw(st.sampled_from(sorted(PATHS)), "path")])
    check_arrays(case, arrays)
    held = {device.id: 0 for device in mesh.devices.flat}
    for path in case.expert_params:
        for shard in arrays[path].addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    assert report.expert_bytes_per_device == held


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_every_mesh(mesh, layout, path, tmp_path):
    rng, case, ep = np.random.default_rng(0), Case(), mesh.shape["ep"]
    # Eleven experts: in the order of names, 10 would come before 2.
    slot_to_expert = [*range(10, -1, -1), *[-1] * (-11 % ep), *[3] * ep]
    add_experts(case, mesh, rng, slot_to_expert, 11, layout, dtype=BF16, model=24, width=16)
    add_tensor(case, mesh, rng, "router", (11, 24))
    arrays, report = load(case, write_checkpoint(tmp_path, case.tensors, shards=2), **PATHS[path])
    check_arrays(case, arrays)
    assert report.tensors_read == len(case.tensors)
    assert json.loads(json.dumps(report.to_dict()))["bytes_read"] == report.bytes_read


@pytest.mark.parametrize("path", PATHS)
def test_experts_over_other_axes(path, tmp_path):
    mesh, case, rng = mesh_of(2, 2, 2), Case(), np.random.default_rng(0)
    add_experts(case, mesh, rng, range(12), 12, "per_expert", layer=0, axes=("ep", "tp"), tp=None)
    add_experts(case, mesh, rng, range(12), 12, "fused", layer=1, axes=("dp", "ep"))
    arrays, _ = load(case, write_checkpoint(tmp_path, case.tensors), **PATHS[path])
    check_arrays(case, arrays)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("path", PATHS)
def test_large_shards_are_put_together_from_chunks(path, tmp_path):
    mesh, case, rng = mesh_of(2, 2, 2), Case(), np.random.default_rng(0)
    add_tensor(case, mesh, rng, "rows", (61, 128), (None, None))
    add_tensor(case, mesh, rng, "columns", (61, 128), (None, ("tp", "ep")), BF16, F32)
    add_tensor(case, mesh, rng, "wide", (3, 9000), (None, "dp"), F32, BF16)
    add_tensor(case, mesh, rng, "cube", (8, 3, 2000), ("ep", None, "tp"), BF16)
    arrays, _ = load(case, write_checkpoint(tmp_path, case.tensors), **PATHS[path])
    check_arrays(case, arrays)


@pytest.mark.parametrize("path", PATHS)
def test_transposed_blocks(path, tmp_path):
    """An (in, out) tensor [E, D, 2F] into w_gate_up [E, 2, F, D]: what `Block.dims` is for."""
    mesh, rng = mesh_of(2, 2, 2), np.random.default_rng(0)
    value = random(rng, (4, 6, 16), F32)
    param = spec(mesh, "w", (4, 2, 8, 6), ("ep", None, "tp", None))
    blocks = [
        Block(param="w", param_start=(e, half, 0, 0), shape=(1, 1, 8, 6), tensor="t", tensor_shape=(4, 6, 16),
              tensor_start=(e, 0, half * 8), dims=(0, 3, 2))
        for e, half in itertools.product(range(4), range(2))
    ]  # fmt: skip
    expected = value.transpose(0, 2, 1).reshape(4, 2, 8, 6)
    case = Case({"t": value}, [param], blocks, {"w": expected})
    check_arrays(case, load(case, write_checkpoint(tmp_path, case.tensors), **PATHS[path])[0])


@pytest.mark.parametrize("path", PATHS)
def test_one_tensor_for_two_parameters_is_read_once(path, tmp_path):
    mesh, rng = mesh_of(2, 2, 2), np.random.default_rng(0)
    value = random(rng, (16, 6), F32)
    case = Case({"tied": value})
    for name, dims in {"embed": ("tp", None), "lm_head": (None, "tp")}.items():
        case.specs.append(spec(mesh, name, (16, 6), dims))
        case.blocks.append(
            Block(param=name, param_start=(0, 0), shape=(16, 6), tensor="tied", tensor_shape=(16, 6),
                  tensor_start=(0, 0), dims=(0, 1))
        )  # fmt: skip
        case.expected[name] = value
    check_arrays(case, load(case, write_checkpoint(tmp_path, case.tensors), **PATHS[path])[0])


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("path", PATHS)
def test_a_process_reads_what_its_devices_hold_and_no_more(layout, path, tmp_path):
    mesh, case, rng = mesh_of(2, 2, 2), Case(), np.random.default_rng(0)
    add_experts(case, mesh, rng, [4, 0, 1, -1, 2, 3, 0, 4], 5, layout, model=8, width=16)
    add_tensor(case, mesh, rng, "o_proj", (5, 12), (None, "tp"), BF16)
    add_tensor(case, mesh, rng, "norm", (7,))
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, case.tensors))
    local = {mesh.devices[0, 1, 0], mesh.devices[1, 1, 0]}  # two replicas of tp rank 1, ep rank 0
    plan = make_load_plan(checkpoint, case.specs, case.blocks, local_devices=local)
    # Slots 0 to 3 hold experts 4, 0 and 1; of each half of F; of o_proj half the columns; and all of the norm.
    assert plan.bytes_needed == 3 * (3 * 8 * 8 * 4) + 5 * 6 * 2 + 7 * 4
    shards, bytes_read = load_shards(plan, **PATHS[path])
    assert bytes_read == plan.bytes_needed == sum(read.nbytes for read in plan.reads)
    for shard, arrays in zip(plan.shards, shards, strict=True):
        part = case.expected[shard.spec.path][tuple(slice(a, b) for a, b in shard.box)]
        assert {device for array in arrays for device in array.devices()} == local
        for array in arrays:
            np.testing.assert_array_equal(bits(array), bits(part))


def test_only_needed_bytes_are_asked_for(tmp_path, monkeypatch):
    """The runs of a column slice are read one by one: no byte between them, none twice."""
    mesh, case, rng = mesh_of(1, 4, 2), Case(), np.random.default_rng(0)
    add_tensor(case, mesh, rng, "w", (6, 16), (None, "tp"))
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, case.tensors))
    asked, preadv = [], __import__("os").preadv

    def spy(descriptor, buffers, offset):
        asked.append((offset, sum(len(buffer) for buffer in buffers)))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr("os.preadv", spy)
    local = {mesh.devices[0, 1, 0], mesh.devices[0, 2, 0]}  # neighboring columns: their runs are joined
    load_shards(make_load_plan(checkpoint, case.specs, case.blocks, local_devices=local))
    start = checkpoint.tensors["w.weight"].offset
    assert sorted(asked) == [(start + row * 64 + 16, 32) for row in range(6)]


def test_cpu_arrays_are_the_memory_that_was_read_into(tmp_path):
    """The quick path: no copy between the file and the array; replicas on simulated devices share their bytes."""
    mesh, case, rng = mesh_of(2, 2, 2), Case(), np.random.default_rng(0)
    add_tensor(case, mesh, rng, "w", (64, 64), ("tp", None))
    arrays, _ = load(case, write_checkpoint(tmp_path, case.tensors))
    shards = arrays["w"].addressable_shards
    places = {shard.index[0].start or 0: set() for shard in shards}
    for shard in shards:
        places[shard.index[0].start or 0].add(shard.data.unsafe_buffer_pointer())
    assert [len(place) for place in places.values()] == [1, 1]
    assert all(pointer % 64 == 0 for place in places.values() for pointer in place)


def test_donating_a_loaded_array_leaves_its_replicas_alone(tmp_path):
    """Replicas share memory because JAX never writes to memory it was handed; this is where that would show."""
    mesh, case, rng = mesh_of(2, 2, 2), Case(), np.random.default_rng(0)
    add_tensor(case, mesh, rng, "w", (64, 64), ("tp", None))
    arrays, _ = load(case, write_checkpoint(tmp_path, case.tensors))
    kept = np.array(arrays["w"])
    copies = [shard.data for shard in arrays["w"].addressable_shards]
    parts = [np.array(copy) for copy in copies]
    jax.jit(lambda x: x.at[0].set(0.0), donate_argnums=0)(copies[0]).block_until_ready()
    assert copies[0].is_deleted()
    for copy, part in zip(copies[1:], parts[1:], strict=True):
        np.testing.assert_array_equal(copy, part)
    again, _ = load(case, tmp_path)
    replicas = [shard.data for shard in again["w"].addressable_shards]
    jax.jit(lambda x: x * 2, donate_argnums=0)(again["w"]).block_until_ready()
    assert all(replica.is_deleted() for replica in replicas)
    np.testing.assert_array_equal(copies[1], parts[1])
    np.testing.assert_array_equal(kept, case.expected["w"])


def test_progress_counts_every_byte_in_order(tmp_path):
    mesh, case, rng = mesh_of(2, 2, 2), Case(), np.random.default_rng(0)
    add_experts(case, mesh, rng, range(12), 12, "per_expert")
    calls, busy = [], threading.Lock()

    def progress(done, total):
        assert busy.acquire(blocking=False), "two threads report at a time"
        calls.append((done, total))
        busy.release()

    _, report = load(case, write_checkpoint(tmp_path, case.tensors), progress=progress, threads=4)
    assert calls[0] == (0, report.bytes_needed)
    assert calls[-1] == (report.bytes_needed, report.bytes_needed)
    assert calls == sorted(calls)


def test_loaded_arrays_compute(tmp_path):
    mesh, case, rng = mesh_of(2, 2, 2), Case(), np.random.default_rng(0)
    add_tensor(case, mesh, rng, "w", (16, 8), ("tp", None))
    arrays, _ = load(case, write_checkpoint(tmp_path, case.tensors))
    np.testing.assert_allclose(jnp.sum(arrays["w"], axis=1), case.expected["w"].sum(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"threads": 0}, "at least one thread; got threads=0"), ({"staging_bytes": 3}, "some memory per thread")],
)
def test_options_are_checked(options, message, tmp_path):
    mesh, case = mesh_of(2, 2, 2), Case()
    add_tensor(case, mesh, np.random.default_rng(0), "w", (2,))
    with pytest.raises(ValueError, match=message):
        load(case, write_checkpoint(tmp_path, case.tensors), **options)

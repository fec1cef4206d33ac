"""Expected bytes against the collectives of the compiled program, and against the rows that were really sent."""

import numpy as np
import pytest

from jaxmoe.dispatch import DISPATCHES, DispatchLayout, DispatchShape, expected_bytes
from jaxmoe.dispatch.collectives import distinct_destinations
from jaxmoe.mesh import AXES
from tests.support.dispatch_programs import LAYOUTS, D, Program, program, promised
from tests.support.hlo import collectives
from tests.support.routings import draw_ids

pytestmark = pytest.mark.covering(most=4)

RUNS_HERE = [name for name, backend in DISPATCHES.items() if "cpu" not in backend.cannot_run]


# 8: a token a device, and no loop; 320: buffers smaller than all tokens, where a token reaches few devices.
@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("mesh_shape", "expert_axes", "T"), [*((*layout, 320) for layout in LAYOUTS), ((2, 2, 2), ("ep",), 8)]
)
@pytest.mark.parametrize("backend", RUNS_HERE)
def test_compiled_program_exchanges_what_the_backend_lists(backend, mesh_shape, expert_axes, T):
    run = program(backend=backend, mesh_shape=mesh_shape, expert_axes=expert_axes, T=T)
    assert collectives(run.compiled.as_text()) == promised(run)


@pytest.mark.parametrize(
    ("backend", "op", "rows", "metadata"), [("all_gather", "all_gather", 1, 1), ("all_to_all", "all_to_all", 4, 2)]
)
def test_bfloat16_is_sent_as_bfloat16(backend, op, rows, metadata):
    """In the program as it is given to XLA, which widens it for simulated devices; an exchange is in it twice."""
    run = program(backend=backend, mesh_shape=(1, 1, 8), expert_axes=("ep",), dtype="bfloat16")
    lines = [line for line in run.lower(run.body).as_text().splitlines() if f'"stablehlo.{op}"' in line]
    assert len(lines) == rows + metadata
    assert sum(f"x{D}xbf16>" in line for line in lines) == rows


@pytest.mark.parametrize("K", [1, 3, 6])
@pytest.mark.parametrize(("mesh_shape", "expert_axes"), [layout for layout in LAYOUTS if layout[0] != (8, 1, 1)])
def test_even_routing_sends_each_token_once_to_each_destination(mesh_shape, expert_axes, K):
    """Rows on the wire are T·Dst·(n-1)/n, within chance, and a tp rank sends its part of them only."""
    run = Program(backend="all_to_all", mesh_shape=mesh_shape, expert_axes=expert_axes, T=4096, K=K)
    n, layout = run.layout.num_devices, run.layout
    ids_TK = np.argsort(np.random.default_rng(3).random((run.T, layout.num_slots)), axis=1)[:, :K]  # slots as experts
    lengths = run.queue_lengths(ids_TK)
    sent = lengths.sum() - sum(lengths[device, rank] for device, rank in enumerate(_ranks(run)))
    bytes_sent = sent * D * 4 / 8
    expected = run.T / 8 * distinct_destinations(K, layout.num_slots, n) * (n - 1) / n * D * 4
    assert bytes_sent == pytest.approx(expected, rel=0.1, abs=1e-9)

    there, *_, back = [
        each for each in run.dispatch.collectives(run.shape) if each.payload and each.axes == expert_axes
    ]
    assert there == back
    assert expected_bytes((there,)).payload == pytest.approx(expected)


def _ranks(run: Program) -> list[int]:
    """The place along the expert axes of each device that has tokens, in the order in which it has them."""
    sizes = dict(zip(AXES, run.mesh_shape, strict=True))
    order = run.dispatch.token_axes(run.layout)
    places = np.indices([sizes[axis] for axis in order]).reshape(len(order), -1)
    along = [places[order.index(axis)] for axis in run.expert_axes]
    return np.ravel_multi_index(along, [sizes[axis] for axis in run.expert_axes]).tolist()


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("backend", [*RUNS_HERE, "ragged_all_to_all"])
@pytest.mark.parametrize(("mesh_shape", "expert_axes"), [((2, 2, 2), ("ep",)), ((1, 2, 4), ("ep", "tp"))])
def test_rows_reported_are_those_of_the_routing(backend, mesh_shape, expert_axes):
    run = program(backend=backend, mesh_shape=mesh_shape, expert_axes=expert_axes)
    slots_TK = run.slots(draw_ids("zipf", 5, run.T, run.K, 8))
    _, stats = run(slots_TK, np.ones(slots_TK.shape))
    sent = stats.rows_sent_n
    assert sent.shape == (*mesh_shape, run.layout.num_devices)
    if backend == "replicated":
        assert not sent.any()
    elif backend == "all_gather":
        assert (sent == run.T // 8).all()
    else:
        # Tokens lie on the devices in the order (dp, ep, tp); the report is by (dp, tp, ep).
        dp, tp, ep = mesh_shape
        lengths = run.queue_lengths(slots_TK).reshape(dp, ep, tp, -1).transpose(0, 2, 1, 3)
        np.testing.assert_array_equal(sent, lengths)


def test_payload_metadata_and_padding_add_up():
    layout = DispatchLayout(
        mesh_shape=(("dp", 1), ("tp", 2), ("ep", 4)), expert_axes=("ep",), partial_axes=("tp",), num_slots=128
    )
    shape = DispatchShape(tokens=4096, choices=8, width=2048, itemsize=2, layout=layout)
    padded, ragged = (DISPATCHES[name].collectives(shape) for name in ("all_to_all", "ragged_all_to_all"))
    total = sum(each.wire_bytes for each in padded)
    assert expected_bytes(padded).total == pytest.approx(total)
    assert expected_bytes(padded).padding > 0
    # Only what tp ranks exchange is padded where the exchange itself is not.
    assert expected_bytes(ragged).padding < expected_bytes(padded).padding
    assert expected_bytes(ragged).payload == pytest.approx(expected_bytes(padded).payload)
    # Slots and weights of 8 choices beside 2048 bfloat16 numbers there, back, and over tp.
    assert expected_bytes(padded).metadata < 0.02 * total


def test_distinct_destinations():
    assert distinct_destinations(1, 64, 8) == pytest.approx(1)
    assert distinct_destinations(64, 64, 8) == 8
    rng = np.random.default_rng(0)
    drawn = [len(set(rng.permutation(128)[:8] // 16)) for _ in range(4000)]
    assert distinct_destinations(8, 128, 8) == pytest.approx(np.mean(drawn), rel=0.02)


def test_text_is_read_in_both_spellings():
    text = """
      %a = f32[4,8]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,2},{1,3}}, dimensions={0}
      %b = (f32[1,8]{1,0}, f32[1,8]{1,0}) all-to-all(%y, %z), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0)
      %c = bf16[3]{0} reduce-scatter(%x), replica_groups=[1,4]<=[4], dimensions={0}
      %d = s32[] all-reduce(%y), replica_groups={{0},{1},{2},{3}}
    """
    assert collectives(text) == {
        ("all-gather", ((0, 2), (1, 3))): 128,
        ("all-to-all", ((0, 2), (1, 3))): 64,
        ("reduce-scatter", ((0, 1, 2, 3),)): 24,
    }

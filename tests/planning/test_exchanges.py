"""The collectives read from a program's text: by hand, and against another reading of what XLA compiles here."""

from collections import Counter

import pytest

from jaxmoe.mesh import AXES
from jaxmoe.planning import describe_exchanges, read_exchanges
from jaxmoe.planning.exchanges import groups_along, read_groups
from tests.support.dispatch_programs import program
from tests.support.hlo import collectives

MESH = (("dp", 1), ("tp", 2), ("ep", 4))
# As XLA writes programs for GPUs, shortened.
TEXT = """
%inner (p: bf16[8,4]) -> bf16[8,4] {
  ROOT %a2a = bf16[8,4]{1,0} all-to-all(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%body (q: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %c = bf16[8,4]{1,0} call(%x), to_apply=%inner
}

%condition (q: (s32[], bf16[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main_spmd (x: bf16[8,4], w: bf16[4,4]) -> bf16[8,4] {
  %a2a-start = ((bf16[8,4]{1,0}), bf16[8,4]{1,0}) all-to-all-start(%x), replica_groups=NAMED, METADATA
  %view = bf16[32]{0} bitcast(%w)
  %shared.1 = bf16[8,4]{1,0} fusion(%x, %w), kind=kLoop, calls=%fused
  %a2a-start.1 = ((bf16[16,4]{1,0}), bf16[16,4]{1,0}) all-to-all-start(%y), replica_groups=[2,4]<=[8]
  %a2a-done.1 = bf16[16,4]{1,0} all-to-all-done(%a2a-start.1)
  %product = bf16[8,4]{1,0} custom-call(%x, %w), custom_call_target="mosaic_gpu_v2"
  %a2a-done = bf16[8,4]{1,0} all-to-all-done(%a2a-start)
  %late = bf16[8,4]{1,0} fusion(%a2a-done), kind=kLoop, calls=%fused.1
  %loop = (s32[], bf16[8,4]{1,0}) while(%init), condition=%condition, body=%body
  %sum = f32[8,4]{1,0} all-reduce(%late), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %scatter = f32[2,4]{1,0} reduce-scatter(%sum), replica_groups=[1,8]<=[8], dimensions={0}
  %gather-start = (bf16[2,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%b), replica_groups={}, dimensions={0}
  %gather-done = bf16[16,4]{1,0} all-gather-done(%gather-start)
  %r-start = ((bf16[6,4]{1,0}, bf16[6,4]{1,0}, s32[4]{0}), bf16[6,4]{1,0}) ragged-all-to-all-start(%x), replica_groups=FOURS
  %r-done = bf16[6,4]{1,0} ragged-all-to-all-done(%r-start)
  %moved = bf16[8,4]{1,0} collective-permute(%late), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %alone = f32[8]{0} all-reduce(%d), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
}
"""
TEXT = TEXT.replace("METADATA", 'metadata={op_name="jit(prefill)/jit(routed_experts)/shard_map/all_to_all"}')
TEXT = TEXT.replace("FOURS", "[2,4]<=[8]").replace("NAMED", "mesh['dp'=1,'tp'=2,'ep'=4] {'ep'}")


def test_kind_axes_bytes_and_what_hides_each() -> None:
    told = [
        (
            each.op,
            each.axes,
            each.devices,
            each.nbytes,
            each.wire_bytes,
            each.asynchronous,
            each.hidden_by,
            each.in_loop,
        )
        for each in read_exchanges(TEXT, MESH)
    ]
    assert told == [
        ("all-to-all", ("ep",), 4, 64, 48, False, (), True),
        ("all-to-all", ("ep",), 4, 64, 48, True, ("shared.1", "product"), False),
        ("all-to-all", ("ep",), 4, 128, 96, True, (), False),
        ("all-reduce", ("tp",), 2, 128, 128, False, (), False),
        ("reduce-scatter", ("tp", "ep"), 8, 256, 224, False, (), False),
        ("all-gather", ("tp", "ep"), 8, 128, 112, True, (), False),
        ("ragged-all-to-all", ("ep",), 4, 48, 36, True, (), False),
        ("collective-permute", None, 2, 64, 64, False, (), False),
    ]


def test_lines_say_how_often_and_beside_what() -> None:
    lines = describe_exchanges(read_exchanges(TEXT, MESH))
    assert lines[0] == "1 all-to-all over ep, in a loop, 48 bytes sent each, waited for at once (no known place)"
    assert lines[1] == (
        "1 all-to-all over ep, 48 bytes sent each, beside product, shared (routed_experts: shard_map/all_to_all)"
    )
    assert lines[2].endswith("96 bytes sent each, with nothing beside it (no known place)")
    assert lines[4] == "1 reduce-scatter over tp and ep, 224 bytes sent each, waited for at once (no known place)"
    assert lines[7].startswith("1 collective-permute over other groups, 64 bytes")
    assert describe_exchanges(read_exchanges(TEXT, MESH)[1:2] * 2)[0].startswith(
        "2 all-to-all over ep, 48 bytes sent each"
    )


def test_groups_in_every_spelling() -> None:
    tp = ((0, 4), (1, 5), (2, 6), (3, 7))
    mesh = "mesh['dp'=1,'tp'=2,'ep'=4]"
    other = "mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}"
    for text in ("{{0,4},{1,5},{2,6},{3,7}}", "[4,2]<=[2,4]T(1,0)", f"{mesh} {{'tp'}}", other):
        assert read_groups(text, 8) == tp == groups_along(MESH, ["tp"])
        line = f"  %g = f32[8] all-gather(%x), channel_id=5, replica_groups={text}, dimensions={{0}}"
        [found] = read_exchanges(f"ENTRY %main (x: f32[4]) -> f32[8] {{\n{line}\n}}", MESH)
        assert found.axes == ("tp",)
    assert read_groups("{}", 3) == ((0, 1, 2),)
    # The order of axes is that in which devices of a group are numbered.
    assert groups_along(MESH, ["ep", "tp"]) == ((0, 4, 1, 5, 2, 6, 3, 7),)


@pytest.mark.parametrize("backend", ["all_to_all", pytest.param("all_gather", marks=pytest.mark.full)])
def test_what_xla_compiles_here_is_read_alike(backend) -> None:
    run = program(backend=backend, mesh_shape=(2, 2, 2), expert_axes=("ep",), T=320)
    sizes = tuple(zip(AXES, run.mesh_shape, strict=True))
    found: Counter = Counter()
    for each in read_exchanges(run.compiled.as_text(), sizes):
        assert each.axes is not None
        found[each.op, frozenset(each.axes)] += each.nbytes
    other: Counter = Counter()
    for (op, groups), nbytes in collectives(run.compiled.as_text()).items():
        axes = next(
            frozenset(axes)
            for axes in (("dp",), ("tp",), ("ep",), ("dp", "tp"), ("dp", "ep"), ("tp", "ep"), AXES)
            if set(map(frozenset, groups_along(sizes, axes))) == set(map(frozenset, groups))
        )
        other[op, axes] += nbytes
    assert found == other

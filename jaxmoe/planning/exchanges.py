"""The collectives of a compiled program: their kind, bytes and devices, and the work that hides them."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np

_OPS = "all-to-all|ragged-all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute|collective-broadcast"
# A computation's head, and an instruction: its name, what it gives, its operation, and the rest.
_HEAD = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<op>[\w-]+)\((?P<rest>.*)$")
_COLLECTIVE = re.compile(rf"(?P<op>{_OPS})(?P<part>-start|-done|)")
_ARRAY = re.compile(r"(?P<dtype>pred|[a-z]+\d+)[a-z0-9]*\[(?P<dims>[\d,]*)\]")
_GROUPS = re.compile(
    r"replica_groups=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|"
    r"mesh\[[^\]]*\](?:, device_ids=\(.*?\)\))? ?\{[^}]*\})"
)
_PAIRS = re.compile(r"source_target_pairs=(\{\{.*?\}\})")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ORIGIN = re.compile(r'op_name="([^"]*)"')
# Instructions that are work; others are views, constants, or steps of collectives.
_WORK = {
    "fusion",
    "custom-call",
    "dot",
    "convolution",
    "while",
    "conditional",
    "call",
    "sort",
    "scatter",
    "gather",
    "copy",
}
# Bytes that a device sends to others, over (g - 1) / g of the bytes of the operand or result, whichever is larger.
_TIMES = {"all-reduce": 2}

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """One collective instruction of a compiled program.

    Attributes:
        op: name of the operation, as XLA has it.
        name: name of the instruction.
        axes: mesh axes that it runs along; None where its groups of devices are those of no axes.
        devices: number g of devices that meet.
        nbytes: bytes of its operand or its result on one device, whichever is larger.
        asynchronous: flag that it is started and awaited by two instructions.
        hidden_by: names of the instructions of work that are scheduled between these two.
        in_loop: flag that it is in a loop, so is done any number of times.
        origin: place in the program that it was made from, as JAX names it; "" if that is not known.
    """

    op: str
    name: str
    axes: tuple[str, ...] | None
    devices: int
    nbytes: int
    asynchronous: bool
    hidden_by: tuple[str, ...]
    in_loop: bool
    origin: str = ""

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends to others, each time; of a permutation all of them."""
        if self.op.startswith("collective"):
            return float(self.nbytes)
        return _TIMES.get(self.op, 1) * self.nbytes * (self.devices - 1) / self.devices


def read_exchanges(text: str, mesh_shape: Sequence[tuple[str, int]]) -> tuple[Exchange, ...]:
    r"""Read the collectives of a program, in the order of its text; those of one device alone are left out.

    Args:
        text: compiled program as XLA writes it.
        mesh_shape: (axis, size) of each axis of the mesh that it was compiled for, in order.

    >>> line = "  %g = f32[8,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}"
    >>> [found] = read_exchanges(f"ENTRY %main (x: f32[2,4]) -> f32[8,4] {{\n{line}\n}}", [("dp", 2), ("ep", 4)])
    >>> found.op, found.axes, found.nbytes, found.wire_bytes
    ('all-gather', ('ep',), 128, 96.0)
    """
    program = _Program(text)
    found = []
    for computation, lines in program.computations.items():
        for place, line in enumerate(lines):
            kind = _COLLECTIVE.fullmatch(line["op"])
            if kind is None or kind["part"] == "-done":
                continue
            groups = _groups_of(line["rest"], math.prod(size for _, size in mesh_shape))
            if len(groups[0]) == 1:
                continue
            found.append(
                Exchange(
                    op=kind["op"],
                    name=line["name"],
                    axes=_axes_of(groups, mesh_shape),
                    devices=len(groups[0]),
                    nbytes=_nbytes(kind["op"], line["shape"], len(groups[0]), started=kind["part"] == "-start"),
                    asynchronous=kind["part"] == "-start",
                    hidden_by=tuple(_until_done(lines[place + 1 :], line["name"])) if kind["part"] else (),
                    in_loop=computation in program.in_loops,
                    origin=match[1] if (match := _ORIGIN.search(line["rest"])) else "",
                )
            )
    return tuple(found)


class _Program:
    """The instructions of a program's text, by computation."""

    def __init__(self, text: str):
        self.computations: dict[str, list[re.Match[str]]] = {}
        lines: list[re.Match[str]] = []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                lines = self.computations.setdefault(head["name"], [])
            elif instruction := _INSTRUCTION.match(line):
                lines.append(instruction)

    @cached_property
    def in_loops(self) -> set[str]:
        """Computations that a loop runs, itself or through others."""
        called = {name: set(itertools.chain(*map(_called_by, lines))) for name, lines in self.computations.items()}
        found: set[str] = set()
        new = {
            name
            for lines in self.computations.values()
            for line in lines
            if line["op"] == "while"
            for name in _called_by(line)
        }
        while new:
            found |= new
            new = set(itertools.chain(*(called.get(name, set()) for name in new))) - found
        return found


def _called_by(line: re.Match[str]) -> Iterator[str]:
    yield from _CALLED.findall(line["rest"])
    for branches in _BRANCHES.findall(line["rest"]):
        yield from re.findall(r"[\w.-]+", branches)


def _until_done(lines: Iterable[re.Match[str]], started: str) -> Iterator[str]:
    """Names of the instructions of work before the one that awaits what was started."""
    for line in lines:
        if line["op"].endswith("-done") and re.match(rf"%?{re.escape(started)}\b(?![.-])", line["rest"]):
            return
        if line["op"] in _WORK:
            yield line["name"]


def _nbytes(op: str, shape: str, devices: int, *, started: bool) -> int:
    """Bytes of operand or result, whichever is larger; a start gives both, and a scatter its result alone."""
    if started and shape.startswith("(("):
        operands, _, results = shape.partition("), ")
        if op == "ragged-all-to-all":  # its operands are places and sizes too
            return _bytes_of(results)
        return max(_bytes_of(operands), _bytes_of(results))
    if started and op == "all-gather" and shape.startswith("("):  # (operand, result)
        return max(_bytes_of(array) for array in re.findall(r"[a-z]+\d+\[[\d,]*\]", shape))
    return _bytes_of(shape) * (devices if op == "reduce-scatter" else 1)


def _bytes_of(shape: str) -> int:
    total = 0
    for array in _ARRAY.finditer(shape):
        bits = 8 if array["dtype"] == "pred" else int(re.findall(r"\d+", array["dtype"])[0])
        total += math.prod(int(dim) for dim in array["dims"].split(",") if dim) * bits // 8
    return total


def _groups_of(rest: str, count: int) -> Groups:
    if pairs := _PAIRS.search(rest):
        # Devices that send to each other, one to the next, are one group.
        return _joined(read_groups(pairs[1], count))
    match = _GROUPS.search(rest)
    assert match is not None, f"a collective without groups: {rest[:200]}"
    return read_groups(match[1], count)


def _joined(pairs: Groups) -> Groups:
    groups: list[set[int]] = []
    for pair in map(set, pairs):
        apart = [group for group in groups if not group & pair]
        groups = [*apart, set().union(pair, *(group for group in groups if group & pair))]
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def read_groups(text: str, count: int) -> Groups:
    """Groups of devices as XLA writes them: ``{{0,1},{2,3}}``, ``[2,2]<=[2,2]T(1,0)``, ``mesh['dp'=1,'tp'=2] {'tp'}``.

    Args:
        text: groups.
        count: devices of the program; all of them meet where no group is written.
    """
    if text.startswith("mesh"):
        match = re.fullmatch(r"mesh\[(.*?)\](?:, device_ids=\((\[.*)\))? ?\{(.*)\}", text)
        assert match is not None
        sizes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])]
        along = groups_along(sizes, re.findall(r"'(\w+)'", match[3]))
        if match[2] is None:
            return along
        # The devices of the mesh in its order, as a shape and a transposition of their numbers.
        [devices] = read_groups(f"[1,{count}]<={match[2]}", count)
        return tuple(sorted([tuple([devices[place] for place in group]) for group in along]))
    if text.startswith("{"):
        groups = [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text)]
        return tuple(sorted(groups)) or (tuple(range(count)),)
    match = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match is not None
    shape, source, order = ([int(number) for number in part.split(",")] if part else None for part in match.groups())
    ids = np.arange(math.prod(source or [])).reshape(source)
    if order:
        ids = ids.transpose(order)
    return tuple(sorted(map(tuple, ids.reshape(shape).tolist())))


def describe_exchanges(exchanges: Sequence[Exchange]) -> list[str]:
    """Say what a program exchanges, in a line for each kind: how often, bytes that a device sends, and what hides it."""
    kinds: dict[tuple[object, ...], list[Exchange]] = {}
    for each in exchanges:
        kinds.setdefault((each.in_loop, each.op, each.axes, each.nbytes, each.asynchronous, each.origin), []).append(
            each
        )
    lines = []
    for same in kinds.values():
        first = same[0]
        hidden = {name.partition(".")[0] for each in same for name in each.hidden_by}
        how = "waited for at once"
        if first.asynchronous:
            how = f"beside {', '.join(sorted(hidden))}" if hidden else "with nothing beside it"
        over = "other groups" if first.axes is None else " and ".join(first.axes)
        loop = "in a loop, " if first.in_loop else ""
        place = first.origin.rpartition("jit(")[2].replace(")/", ": ", 1) or "no known place"
        lines.append(
            f"{len(same)} {first.op} over {over}, {loop}{first.wire_bytes:,.0f} bytes sent each, {how} ({place})"
        )
    return lines


def groups_along(mesh_shape: Sequence[tuple[str, int]], axes: Iterable[str]) -> Groups:
    """Groups of devices that differ in their place along `axes` only, numbered in the order of `axes`.

    Args:
        mesh_shape: (axis, size) of each axis, in the order in which devices are numbered.
        axes: names of axes.

    >>> groups_along([("tp", 2), ("ep", 2)], ["tp"])
    ((0, 2), (1, 3))
    """
    names, axes = [name for name, _ in mesh_shape], list(axes)
    ids = np.arange(math.prod(size for _, size in mesh_shape)).reshape([size for _, size in mesh_shape])
    others = [place for place, name in enumerate(names) if name not in axes]
    ids = ids.transpose([*others, *(names.index(axis) for axis in axes)])
    size = math.prod(size for name, size in mesh_shape if name in axes)
    return tuple(sorted(map(tuple, ids.reshape(-1, size).tolist())))


def _axes_of(groups: Groups, mesh_shape: Sequence[tuple[str, int]]) -> tuple[str, ...] | None:
    """The axes whose groups those are, whatever the order within a group; axes of one device are left out."""
    wanted = {frozenset(group) for group in groups}
    names = [name for name, size in mesh_shape if size > 1]
    for number in range(1, len(names) + 1):
        for axes in itertools.combinations(names, number):
            if {frozenset(group) for group in groups_along(mesh_shape, axes)} == wanted:
                return axes
    return None

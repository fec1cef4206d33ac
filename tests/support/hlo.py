"""The collectives in a compiled program's text."""

import re
from collections import Counter

import numpy as np

_OP = re.compile(
    r"= (?P<shape>.*?) (?P<op>all-to-all|ragged-all-to-all|all-gather|reduce-scatter|all-reduce)(?:-start)?\("
    r".*?replica_groups=(?P<groups>\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
    r"|mesh\[[^\]]*\] ?\{[^}]*\})"
)
_SHAPE = re.compile(r"(?P<dtype>pred|[a-z]+\d+)\[(?P<dims>[\d,]*)\]")


def collectives(text: str) -> Counter[tuple[str, tuple[tuple[int, ...], ...]]]:
    """Bytes by (op, groups of devices that meet), of the operand or the result, whichever is larger, on one device.

    Groups of one device exchange nothing and are left out.
    """
    found: Counter = Counter()
    for match in _OP.finditer(text):
        groups = _groups(match["groups"])
        size = len(groups[0])
        if size > 1:
            bytes_ = sum(_bytes(*shape) for shape in _SHAPE.findall(match["shape"]))
            found[match["op"], groups] += bytes_ * (size if match["op"] == "reduce-scatter" else 1)
    return found


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return int(np.prod([int(dim) for dim in dims.split(",") if dim])) * bits // 8


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Reads ``{{0,1},{2,3}}``, a transposed iota ``[2,2]<=[2,2]T(1,0)`` and ``mesh['dp'=2,'tp'=2] {'tp'}``."""
    if text.startswith("mesh"):
        sizes, axes = re.fullmatch(r"mesh\[(.*)\] ?\{(.*)\}", text).groups()
        names = tuple(re.findall(r"'(\w+)'", sizes))
        return groups_along(tuple(_ints(re.sub(r"'\w+'=", "", sizes))), tuple(re.findall(r"'(\w+)'", axes)), names)
    if text.startswith("{"):
        return tuple(sorted(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text)))
    shape, source, transposed = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(np.prod(_ints(source))).reshape(_ints(source))
    if transposed:
        ids = ids.transpose(_ints(transposed))
    return tuple(sorted(map(tuple, ids.reshape(_ints(shape)).tolist())))


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def groups_along(mesh_shape: tuple[int, ...], axes: tuple[str, ...], names: tuple[str, ...]):
    """Groups of devices that differ in their place along `axes` only, numbered in the order of `axes`."""
    ids = np.arange(np.prod(mesh_shape)).reshape(mesh_shape)
    others = [names.index(name) for name in names if name not in axes]
    ids = ids.transpose([*others, *(names.index(axis) for axis in axes)])
    size = int(np.prod([mesh_shape[names.index(axis)] for axis in axes]))
    return tuple(sorted(map(tuple, ids.reshape(-1, size).tolist())))

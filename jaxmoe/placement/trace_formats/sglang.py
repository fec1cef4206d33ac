"""SGLang's expert distribution recorder.

Letters here, beside the common ones of docs/concepts/letters.md: W windows.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.placement.trace import RoutingTrace


def from_sglang(dumps: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> RoutingTrace:
    """Turn what the recorder dumps into a trace, one window per forward pass.

    Modes "stat" and "stat_approx" dump ``{"logical_count": [passes, layers, E]}`` once; modes
    "per_token" and "per_pass" dump ``{"records": [...], "last_physical_to_logical_map": [layers, P]}``
    on each rank, in physical expert ids. The recorder counts every layer of the model: layers that
    never routed a token are dense and left out, and so are passes of an unfilled buffer.

    Args:
        dumps: dump of one rank, or those of all, as nested dicts, lists and arrays.

    Raises:
        ValueError: a dump is none of the recorder's, or nothing was recorded.

    Example:
        >>> from_sglang({"rank": 0, "logical_count": np.array([[[0, 0], [3, 1]]])}).counts.tolist()
        [[[3, 1]]]

    Source: SGLang, python/sglang/srt/eplb/expert_distribution.py.
    """
    parts = [dumps] if isinstance(dumps, Mapping) else list(dumps)
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError("a dump of the recorder is a dict; got none, or something else")
    if len(parts) == 1 and "logical_count" in parts[0]:
        return _from_counts(np.asarray(parts[0]["logical_count"]))
    if all("records" in part and "last_physical_to_logical_map" in part for part in parts):
        return _from_records(parts)
    raise ValueError(
        "a dump of the recorder has logical_count (one file), or records and last_physical_to_logical_map (a file "
        f"a rank); got {len(parts)} with {sorted(map(str, parts[0]))}"
    )


def _from_counts(counts_WLE: np.ndarray) -> RoutingTrace:
    if counts_WLE.ndim != 3 or counts_WLE.dtype.kind not in "iu":
        raise ValueError(f"logical_count is integers [passes, layers, E]; got {counts_WLE.dtype} {counts_WLE.shape}")
    passes, layers = counts_WLE.any(axis=(1, 2)), counts_WLE.any(axis=(0, 2))
    if not passes.any():
        raise ValueError("the recorder counted no token: start it before sending requests")
    return RoutingTrace(counts=counts_WLE[passes][:, layers])


def _from_records(parts: Sequence[Mapping[str, Any]]) -> RoutingTrace:
    map_LP = np.asarray(parts[0]["last_physical_to_logical_map"])
    if map_LP.ndim != 2 or map_LP.dtype.kind not in "iu" or not map_LP.size or map_LP.min() < 0:
        raise ValueError(
            f"last_physical_to_logical_map is integers [layers, P] from 0 up; got {map_LP.dtype} {map_LP.shape}"
        )
    # Every logical expert has a physical one, so the largest id is the last expert.
    num_experts = int(map_LP.max()) + 1
    passes = _by_pass(parts)
    if all("topk_ids_of_layer" in record for records in passes for record in records):
        return _from_tokens(passes, map_LP, num_experts)
    counts_WLE = np.zeros((len(passes), len(map_LP), num_experts), np.int64)
    for window, records in enumerate(passes):
        for record in records:
            physical_LP = np.asarray(record.get("global_physical_count"))
            if physical_LP.shape != map_LP.shape or physical_LP.dtype.kind not in "iu":
                raise ValueError(
                    f"global_physical_count is integers [layers, P] = {map_LP.shape}; got {physical_LP.dtype} "
                    f"{physical_LP.shape}"
                )
            for layer, experts_P in enumerate(map_LP):
                np.add.at(counts_WLE[window, layer], experts_P, physical_LP[layer])
    return _from_counts(counts_WLE)


def _by_pass(parts: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The records of all ranks, those of a forward pass together."""
    passes: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for part in parts:
        if not isinstance(part["records"], Sequence):
            raise ValueError(f"records are a list of dicts; got a {type(part['records']).__name__}")
        for record in part["records"]:
            if not isinstance(record, Mapping) or not isinstance(record.get("forward_pass_id"), int):
                raise ValueError(f"a record is a dict with an integer forward_pass_id; one is a {_kind(record)}")
            passes[record["forward_pass_id"]].append(record)
    if not passes:
        raise ValueError("the recorder has no record: start it before sending requests")
    return [passes[number] for number in sorted(passes)]


def _kind(record: Any) -> str:
    return f"dict of {', '.join(map(str, record))}" if isinstance(record, Mapping) else type(record).__name__


def _from_tokens(passes: Sequence[Sequence[Mapping[str, Any]]], map_LP: np.ndarray, num_experts: int) -> RoutingTrace:
    windows = [np.concatenate([_logical_ids(record, map_LP) for record in records]) for records in passes]
    ids = np.concatenate(windows)
    tokens, layers, choices = ((ids >= 0).any(axis=axes) for axes in ((1, 2), (0, 2), (0, 1)))
    if not tokens.any():
        raise ValueError("no token of the recorder's dump has an expert")
    # Rows of padding tokens and columns beyond the model's K are -1 throughout.
    sizes = [int((window >= 0).any(axis=(1, 2)).sum()) for window in windows]
    kept = ids[tokens][:, layers][:, :, choices]
    return RoutingTrace.from_expert_ids(kept, num_experts, window=[size for size in sizes if size])


def _logical_ids(record: Mapping[str, Any], map_LP: np.ndarray) -> np.ndarray:
    """Logical ids [tokens, layers, K] of one record, which holds physical ids [layers, tokens, K]."""
    ids_LTK = np.asarray(record["topk_ids_of_layer"])
    L, P = map_LP.shape
    if ids_LTK.ndim != 3 or ids_LTK.shape[0] != L or ids_LTK.dtype.kind not in "iu":
        raise ValueError(f"topk_ids_of_layer is integers [{L} layers, tokens, K]; got shape {ids_LTK.shape}")
    if ids_LTK.size and (ids_LTK.min() < -1 or ids_LTK.max() >= P):
        raise ValueError(f"physical experts are 0..{P - 1}, or -1; got {ids_LTK.min()}..{ids_LTK.max()}")
    logical = map_LP[np.arange(L)[:, None, None], ids_LTK]
    return np.where(ids_LTK < 0, -1, logical).transpose(1, 0, 2).astype(np.int32)

"""Megatron-LM's router trace: JSON lines, one record per step, rank and layer."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.placement.trace import RoutingTrace


def from_megatron(records: Iterable[Mapping[str, Any]], *, num_experts: int, block: str = "decoder") -> RoutingTrace:
    """Turn the records of a router trace into a trace with one window per step.

    Token-level ids are kept where every rank recorded every layer of its tokens; under pipeline
    parallelism a rank sees some layers only, and the trace has counts alone.

    Args:
        records: parsed lines, of all ranks: ``{"step", "block", "layer", "rank", "top_indices"}``
            with top_indices [tokens, K].
        num_experts: E.
        block: "decoder", or "mtp" for the layers of multi-token prediction.

    Raises:
        ValueError: a record lacks a field or does not fit, or none is of `block`.

    Source: Megatron-LM, megatron/core/transformer/moe/router_trace.py.
    """
    chosen: dict[tuple[int, int], dict[tuple[int, int], list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for number, record in enumerate(records, 1):
        try:
            if record.get("block", "decoder") != block:
                continue
            ids = np.asarray(record["top_indices"])
            # A head of multi-token prediction numbers its layers from 0 again.
            layer = (int(record.get("mtp_idx", 0)), int(record["layer"]))
            part = (int(record["step"]), int(record.get("rank", 0)))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"record {number} is none of a router trace: {error!r}") from error
        in_range = ids.dtype.kind in "iu" and ids.min(initial=0) >= 0 and ids.max(initial=0) < num_experts
        if ids.ndim != 2 or (ids.size and not in_range):
            raise ValueError(
                f"top_indices are [tokens, K] of experts 0..{num_experts - 1}; record {number} has shape {ids.shape}"
                + (f" and ids {ids.min()}..{ids.max()}" if ids.size and ids.dtype.kind in "iuf" else "")
            )
        # Micro-batches of a step are records of the same layer, in order.
        chosen[part][layer].append(ids.astype(np.int32))
    if not chosen:
        raise ValueError(f"the router trace has no record of block {block!r}")
    joined = {part: {layer: _join(ids) for layer, ids in layers.items()} for part, layers in sorted(chosen.items())}
    layers = sorted({layer for by_layer in joined.values() for layer in by_layer})
    steps = sorted({step for step, _ in joined})
    whole = [by_layer for by_layer in joined.values() if len(by_layer) == len(layers)]
    shapes = {ids.shape[1] for by_layer in joined.values() for ids in by_layer.values()}
    if len(whole) == len(joined) and len(shapes) == 1 and all(_same_tokens(by_layer) for by_layer in whole):
        ids = np.concatenate([np.stack([by_layer[layer] for layer in layers], axis=1) for by_layer in whole])
        sizes = Counter[int]()
        for (step, _), by_layer in joined.items():
            sizes[step] += _tokens(by_layer)
        return RoutingTrace.from_expert_ids(ids, num_experts, window=[sizes[step] for step in steps])
    counts = np.zeros((len(steps), len(layers), num_experts), np.int64)
    window_of = {step: window for window, step in enumerate(steps)}
    for (step, _), by_layer in joined.items():
        for place, layer in enumerate(layers):
            if layer in by_layer:
                counts[window_of[step], place] += np.bincount(by_layer[layer].reshape(-1), minlength=num_experts)
    return RoutingTrace(counts=counts)


def read_jsonl(file: Path) -> Iterator[Mapping[str, Any]]:
    """The records of one rank's file.

    Raises:
        ValueError: a line is no JSON object.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: a router trace is JSON lines: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{file}, line {number}: a router trace is one JSON object a line")
            yield record


def _join(ids: list[np.ndarray]) -> np.ndarray:
    widths = {array.shape[1] for array in ids}
    if len(widths) != 1:
        raise ValueError(f"records of one layer choose the same number of experts per token; got {sorted(widths)}")
    return np.concatenate(ids)


def _tokens(by_layer: Mapping[tuple[int, int], np.ndarray]) -> int:
    return len(next(iter(by_layer.values())))


def _same_tokens(by_layer: Mapping[tuple[int, int], np.ndarray]) -> bool:
    return len({len(ids) for ids in by_layer.values()}) == 1

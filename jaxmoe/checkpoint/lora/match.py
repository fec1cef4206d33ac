"""The checkpoint tensors that a LoRA adapter changes.

Each pair of factors becomes one `LowRankUpdate` per matrix it changes, in terms of the checkpoint's own tensors, whichever
layout those have. A 3-D parameter of all experts has one pair for all of them: A [r·E, in] with the experts one after
another, B [out, r·E] with the experts interleaved.

A fused parameter [E, d1, d2] is read as (out, in) by current PEFT, and as (in, out) by older versions and for modules
that say they are transposed; the shapes of A and B tell which.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.checkpoint.boxes import Box, whole
from jaxmoe.checkpoint.errors import CheckpointError, Problems
from jaxmoe.checkpoint.lora.config import LoraConfig
from jaxmoe.checkpoint.lora.pairs import Pair, Shape, read_pairs
from jaxmoe.checkpoint.lora.targets import NAMINGS, TargetTensors
from jaxmoe.checkpoint.lora.update import LowRankUpdate
from jaxmoe.checkpoint.mapping import detect_expert_layout

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
# Wrappers are nested in the order in which modules declare their parameters: the first is the innermost.
_MAX_WRAPPERS = 4
_DECLARED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def find_updates(
    config: LoraConfig,
    adapter: Mapping[str, Shape],
    tensors: Mapping[str, Shape],
    *,
    rename: Callable[[str], str] = lambda name: name,
) -> list[LowRankUpdate]:
    """Find what an adapter changes in a checkpoint.

    Args:
        config: settings from `read_lora_config`.
        adapter: name -> shape of the adapter's tensors.
        tensors: name -> shape of the checkpoint's.
        rename: function from the name that a parameter has in transformers, which the adapter uses, to the name on disk.

    Returns:
        The updates. Every tensor of the adapter is in at least one.

    Raises:
        CheckpointError: the adapter has other tensors than A and B, or they fit no tensor of the checkpoint. One error
            for all modules that do not fit.
    """
    modules: dict[str, list[Pair]] = defaultdict(list)
    for pair in read_pairs(adapter):
        modules[pair.module].append(pair)
    target = TargetTensors(tensors, rename)
    problems = Problems("the adapter")
    updates = []
    for module, pairs in modules.items():
        try:
            updates += _module(config, module, pairs, target)
        except CheckpointError as error:
            problems.add(str(error))
    problems.raise_if_any()
    return updates


def _module(config: LoraConfig, module: str, pairs: list[Pair], target: TargetTensors) -> list[LowRankUpdate]:
    """The updates by all pairs of one module."""
    parameters = _target_parameters(config, module)
    expert = _EXPERT.fullmatch(module)
    weight = target.rename(f"{module}.weight")
    if len(pairs) == 1 and len(target.tensors.get(weight, ())) == 2:
        # A 2-D parameter that is targeted itself has its own name in rank and alpha patterns.
        return [_plain(config, pairs[0], target, f"{module}.weight" if "weight" in parameters else module)]
    if expert and len(pairs) == 1:
        return [_one_expert(config, pairs[0], target, expert[1], int(expert[2]), expert[3])]
    if parameters:
        return _fused(config, pairs, target, parameters)
    if len(pairs) == 1 and (updates := _gate_and_up(config, pairs[0], target)):
        return updates
    hint = "is the adapter for this model, and does its configuration list all target_parameters?"
    raise target.missing("an adapted module", weight, hint)


def _target_parameters(config: LoraConfig, module: str) -> list[str]:
    """The parameters of `module` that the configuration targets, in the order in which modules declare them."""
    names = set()
    for target in config.target_parameters:
        parameter = target.rpartition(".")[-1]
        if f".{module}.{parameter}".endswith(f".{target}"):
            names.add(parameter)
    return sorted(names, key=lambda name: (_DECLARED.index(name) if name in _DECLARED else len(_DECLARED), name))


def _check_rank(config: LoraConfig, pair: Pair, key: str, experts: int = 1) -> int:
    rank = config.rank_of(key)
    if pair.shape_a[0] != rank * experts:
        times = f" for each of {experts} experts" if experts > 1 else ""
        raise CheckpointError(
            f"the configuration gives {key!r} the rank {rank}{times}; {pair.a!r} has shape {pair.shape_a}"
        )
    return rank


def _update(
    config: LoraConfig, pair: Pair, key: str, *, target: str, box: Box, expert: int | None, **how: Any
) -> LowRankUpdate:
    """The update of one matrix by all of a pair; `key` is what patterns of the configuration are matched with."""
    rank = slice(0, _check_rank(config, pair, key))
    return LowRankUpdate(
        target=target,
        box=box,
        expert=expert,
        a=pair.a,
        b=pair.b,
        rank_a=rank,
        rank_b=rank,
        scale=config.scale_of(key),
        **how,
    )


def _plain(config: LoraConfig, pair: Pair, target: TargetTensors, key: str) -> LowRankUpdate:
    """The update of one whole matrix; `key` as for `_update`."""
    name = target.rename(f"{pair.module}.weight")
    size = (pair.shape_b[0], pair.shape_a[1])
    # The factors of an embedding [vocabulary, width] are those of its transpose, which is what it multiplies with.
    transposed = pair.embedding or config.fan_in_fan_out
    if target.tensors[name] != (size[::-1] if transposed else size):
        raise CheckpointError(
            f"B·A must have the shape of the weight it is added to; that of {pair.module!r} has {size}, and {name!r} has "
            f"{target.tensors[name]}"
        )
    matched = _EXPERT.fullmatch(pair.module)
    return _update(
        config,
        pair,
        key,
        target=name,
        box=whole(target.tensors[name]),
        expert=int(matched[2]) if matched else None,
        transposed=transposed,
    )


def _one_expert(
    config: LoraConfig, pair: Pair, target: TargetTensors, module: str, expert: int, part: str
) -> LowRankUpdate:
    """The update of one projection of one expert, where the checkpoint has the experts in one tensor."""
    names = next((names for names in NAMINGS if part in names), None)
    out, inputs = pair.shape_b[0], pair.shape_a[1]
    fused = names is not None and target.find(f"{module}.gate_up_proj", f"{module}.down_proj")
    if names is None or not fused:
        raise target.missing("an adapted module", target.rename(f"{pair.module}.weight"))
    place = names.index(part)
    width, model = (inputs, out) if place == 2 else (out, inputs)
    prefix = fused.rpartition(".")[0]
    detect_expert_layout(target.tensors, prefix, model_width=model, expert_width=width, expected="fused")
    name = f"{prefix}.down_proj" if place == 2 else f"{prefix}.gate_up_proj"
    if expert >= target.tensors[name][0]:
        raise CheckpointError(f"{pair.module!r} adapts expert {expert}; {name!r} has {target.tensors[name][0]} experts")
    start = width if place == 1 else 0
    box = ((expert, expert + 1), (start, start + out), (0, inputs))
    return _update(config, pair, pair.module, target=name, box=box, expert=expert)


def _gate_and_up(config: LoraConfig, pair: Pair, target: TargetTensors) -> list[LowRankUpdate]:
    """The updates of a dense MLP's gate and up, one matrix in the adapter and two in the checkpoint, or the reverse.

    Gate's rows come before up's. There are none where the checkpoint has neither.
    """
    mlp, _, part = pair.module.rpartition(".")
    halves = [target.find(f"{mlp}.{half}_proj.weight") for half in ("gate", "up")]
    joined = target.find(f"{mlp}.gate_up_proj.weight")
    out, inputs = pair.shape_b[0], pair.shape_a[1]
    places: list[tuple[str, Box, int]] = []  # of each target its name, the region, and the first row of B for it
    if part == "gate_up_proj" and None not in halves:
        start = 0
        for name in filter(None, halves):
            rows = target.tensors[name][0]
            places.append((name, ((0, rows), (0, inputs)), start))
            start += rows
    elif part in ("gate_proj", "up_proj") and joined is not None:
        start = out if part == "up_proj" else 0
        places.append((joined, ((start, start + out), (0, inputs)), 0))
    rows_of_both = sum(target.tensors[name][0] for name, _, _ in places)
    fits = rows_of_both == (out if part == "gate_up_proj" else 2 * out)
    if not (fits and all(target.tensors[name][1:] == (inputs,) for name, _, _ in places)) and places:
        raise CheckpointError(
            f"B·A must have the rows of gate, of up, or of both; that of {pair.module!r} has the shape {(out, inputs)}, and "
            f"{places[0][0]!r} has {target.tensors[places[0][0]]}"
        )
    return [
        _update(config, pair, pair.module, target=name, box=box, expert=None, out_start=out_start)
        for name, box, out_start in places
    ]


def _fused(config: LoraConfig, pairs: list[Pair], target: TargetTensors, parameters: list[str]) -> list[LowRankUpdate]:
    """The updates of all experts of a module by pairs for its fused parameters."""
    module = pairs[0].module
    pairs = sorted(pairs, key=lambda pair: -pair.depth)  # innermost first
    if len(pairs) != len(parameters) or len(pairs) > _MAX_WRAPPERS:
        raise CheckpointError(
            f"each of the target_parameters {', '.join(parameters)} of {module!r} needs a pair of factors; there are "
            f"{len(pairs)}, and may be up to {_MAX_WRAPPERS}"
        )
    found = {parameter: target.fused(module, parameter) for parameter in parameters}
    shapes = {parameter: shape for parameter, (shape, _) in found.items()}
    # The order of declaration comes first; another one counts only if the shapes rule that out.
    orders = [order for order in itertools.permutations(parameters) if _fits(pairs, [shapes[name] for name in order])]
    if not orders or (tuple(parameters) not in orders and len(orders) > 1):
        raise CheckpointError(
            f"the factors must fit {shapes} of {module!r}, in the order of the wrappers; they have "
            f"{[(pair.shape_a, pair.shape_b) for pair in pairs]}"
        )
    order = tuple(parameters) if tuple(parameters) in orders else orders[0]
    in_out = _is_in_out(module, pairs, [shapes[name] for name in order])
    updates = []
    for pair, parameter in zip(pairs, order, strict=True):
        (experts, _, _), pieces = found[parameter]
        key = f"{module}.{parameter}"
        rank = _check_rank(config, pair, key, experts)
        for piece in pieces:
            updates.append(
                LowRankUpdate(
                    target=piece.target,
                    box=piece.box,
                    expert=piece.expert,
                    a=pair.a,
                    b=pair.b,
                    rank_a=slice(piece.expert * rank, (piece.expert + 1) * rank),
                    rank_b=slice(piece.expert, None, experts),
                    scale=config.scale_of(key),
                    out_start=0 if in_out else piece.start,
                    in_start=piece.start if in_out else 0,
                    transposed=in_out,
                )
            )
    return updates


def _fits(pairs: list[Pair], shapes: list[Shape]) -> bool:
    """Whether every pair has the sizes of its parameter, in one or the other direction."""
    return all(
        {(pair.shape_b[0], pair.shape_a[1]), (pair.shape_a[1], pair.shape_b[0])} & {shape[1:]}
        for pair, shape in zip(pairs, shapes, strict=True)
    )


def _is_in_out(module: str, pairs: list[Pair], shapes: list[Shape]) -> bool:
    """Whether the parameters of `module` were read as [E, in, out]; they all were, or none."""
    told = {
        (pair.shape_a[1], pair.shape_b[0]) == shape[1:]
        for pair, shape in zip(pairs, shapes, strict=True)
        if shape[1] != shape[2]
    }
    if len(told) != 1:
        raise CheckpointError(
            f"the shapes of lora_A and lora_B must tell whether a parameter is (out, in) or (in, out); those of {module!r} "
            f"{'contradict each other' if told else 'are square'}; merge the adapter with PEFT and load the result"
        )
    return told.pop()

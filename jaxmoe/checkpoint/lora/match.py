"""The checkpoint tensors that a LoRA adapter changes.

PEFT names the factors after the module they adapt, ``base_model.model.<module>.lora_A.weight``. A 3-D parameter of all
experts has one pair for all of them: A [r·E, in] with the experts one after another, B [out, r·E] with the experts
interleaved. Here each pair becomes one `LowRankUpdate` per matrix it changes, in terms of the checkpoint's own tensors,
whichever layout those have.

A fused parameter [E, d1, d2] is read as (out, in) by current PEFT, and as (in, out) by older versions and for modules
that say they are transposed; the shapes of A and B tell which.
"""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from jaxmoe.checkpoint.boxes import Box, whole
from jaxmoe.checkpoint.errors import CheckpointError, Problems
from jaxmoe.checkpoint.lora.config import LoraConfig
from jaxmoe.checkpoint.lora.update import LowRankUpdate
from jaxmoe.checkpoint.mapping import detect_expert_layout
from jaxmoe.checkpoint.nearest import nearest_name

Shape = tuple[int, ...]

_NAME = re.compile(
    r"(?:base_model\.model\.)?(.+?)((?:\.base_layer)*)\.lora_(embedding_)?([AB])(?:\.[^.]+)?(?:\.weight)?"
)
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
# Gate, up and down of one expert.
_NAMINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# Wrappers are nested in the order in which modules declare their parameters: the first is the innermost.
_MAX_WRAPPERS = 4
_DECLARED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, slots=True)
class _Pair:
    """The factors that adapt one module or parameter."""

    module: str
    depth: int  # wrappers around it
    a: str
    b: str
    shape_a: Shape
    shape_b: Shape
    embedding: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """A matrix of a checkpoint tensor that is one expert's matrix of a fused parameter, or rows of it from `start`."""

    target: str
    box: Box
    expert: int
    start: int


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
    modules: dict[str, list[_Pair]] = defaultdict(list)
    for pair in _pairs(adapter):
        modules[pair.module].append(pair)
    target = _Checkpoint(tensors, rename)
    problems = Problems("the adapter")
    updates = []
    for module, pairs in modules.items():
        try:
            updates += _module(config, module, pairs, target)
        except CheckpointError as error:
            problems.add(str(error))
    problems.raise_if_any()
    return updates


def _module(config: LoraConfig, module: str, pairs: list[_Pair], target: "_Checkpoint") -> list[LowRankUpdate]:
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


def _pairs(adapter: Mapping[str, Shape]) -> list[_Pair]:
    """The A and B tensors, two by two."""
    found: dict[tuple[str, int, bool], dict[str, str]] = defaultdict(dict)
    for name in adapter:
        match = _NAME.fullmatch(name)
        if match is None:
            reason = " (DoRA)" if "lora_magnitude_vector" in name else ""
            way_out = "merge it with PEFT (merge_and_unload) and load the result"
            raise CheckpointError(
                f"an adapter's tensors are lora_A and lora_B of its modules; {name!r} is neither{reason}; {way_out}"
            )
        module, wrappers, embedding, side = match.groups()
        # Of a wrapped module inside a wrapped one the name has base_layer in the middle as well.
        key = (module.replace(".base_layer", ""), wrappers.count("base_layer"), embedding is not None)
        if side in found[key]:
            raise CheckpointError(
                f"an adapter has one pair for a module; {found[key][side]!r} and {name!r} are for the same"
            )
        found[key][side] = name
    pairs = []
    for (module, depth, embedding), sides in found.items():
        if len(sides) != 2:
            raise CheckpointError(
                f"lora_A and lora_B come in pairs; of {module!r} there is {next(iter(sides.values()))!r} only"
            )
        shape_a, shape_b = adapter[sides["A"]], adapter[sides["B"]]
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
            raise CheckpointError(
                f"lora_A is [rank, in] and lora_B [out, rank]; those of {module!r} are {shape_a} and {shape_b}"
            )
        pairs.append(_Pair(module, depth, sides["A"], sides["B"], shape_a, shape_b, embedding))
    return pairs


class _Checkpoint:
    """The tensors of a checkpoint, under the names that transformers has for them."""

    def __init__(self, tensors: Mapping[str, Shape], rename: Callable[[str], str]) -> None:
        self.tensors = tensors
        self.rename = rename
        # An adapter for another model misses thousands of names: the first tells as much as all of them.
        self._suggest = True

    def missing(self, what: str, name: str, hint: str = "is the adapter for this model?") -> CheckpointError:
        """The error that `name` is not there."""
        nearest = nearest_name(name, self.tensors) if self._suggest else None
        self._suggest = False
        suggestion = f"; the nearest is {nearest!r}" if nearest else ""
        return CheckpointError(f"{what} must be in the checkpoint; {name!r} is not{suggestion}; {hint}")

    def find(self, *names: str) -> str | None:
        """The name on disk of the first that is there."""
        return next((name for name in map(self.rename, names) if name in self.tensors), None)

    def fused(self, module: str, parameter: str) -> tuple[Shape, list[_Piece]]:
        """Shape [E, d1, d2] of a fused parameter, and where its matrices are: in a fused tensor or one of each expert."""
        name = self.find(f"{module}.{parameter}", f"{module}.{parameter}.weight")
        if name is not None:
            shape = self.tensors[name]
            if len(shape) != 3:
                raise CheckpointError(f"a parameter of all experts has 3 dims; {name!r} has shape {shape}")
            experts, rows, columns = shape
            boxes = [((expert, expert + 1), (0, rows), (0, columns)) for expert in range(experts)]
            return shape, [_Piece(name, box, expert, 0) for expert, box in enumerate(boxes)]
        halves = [self.find(f"{module}.{half}_proj", f"{module}.{half}_proj.weight") for half in ("gate", "up")]
        if parameter == "gate_up_proj" and None not in halves:
            return self.stacked(halves)
        for gate, up, down in _NAMINGS:
            parts = {"gate_up_proj": (gate, up), "down_proj": (down,), "up_proj": (up,)}.get(parameter, ())
            if parts and self.find(f"{module}.0.{parts[0]}.weight"):
                return self.per_expert(module, parts)
        name = self.rename(f"{module}.{parameter}")
        raise self.missing("an adapted parameter, or its experts one by one,", name)

    def stacked(self, names: Sequence[str | None]) -> tuple[Shape, list[_Piece]]:
        """The same of experts in a tensor for each half, which follow each other in the fused parameter."""
        pieces: list[_Piece] = []
        start = experts = columns = 0
        for name in filter(None, names):
            experts, rows, columns = self.tensors[name]
            for expert in range(experts):
                pieces.append(_Piece(name, ((expert, expert + 1), (0, rows), (0, columns)), expert, start))
            start += rows
        return (experts, start, columns), pieces

    def per_expert(self, module: str, parts: tuple[str, ...]) -> tuple[Shape, list[_Piece]]:
        """The same of experts that have a tensor each, or two that follow each other in the fused parameter."""
        pieces: list[_Piece] = []
        start = columns = 0
        for expert in itertools.count():
            names = [self.find(f"{module}.{expert}.{part}.weight") for part in parts]
            if None in names:
                return (expert, start, columns), pieces
            start = 0
            for name in filter(None, names):
                rows, columns = self.tensors[name]
                pieces.append(_Piece(name, ((0, rows), (0, columns)), expert, start))
                start += rows
        raise AssertionError("counting never ends")


def _target_parameters(config: LoraConfig, module: str) -> list[str]:
    """The parameters of `module` that the configuration targets, in the order in which modules declare them."""
    names = set()
    for target in config.target_parameters:
        parameter = target.rpartition(".")[-1]
        if f".{module}.{parameter}".endswith(f".{target}"):
            names.add(parameter)
    return sorted(names, key=lambda name: (_DECLARED.index(name) if name in _DECLARED else len(_DECLARED), name))


def _check_rank(config: LoraConfig, pair: _Pair, key: str, experts: int = 1) -> int:
    rank = config.rank_of(key)
    if pair.shape_a[0] != rank * experts:
        times = f" for each of {experts} experts" if experts > 1 else ""
        raise CheckpointError(
            f"the configuration gives {key!r} the rank {rank}{times}; {pair.a!r} has shape {pair.shape_a}"
        )
    return rank


def _plain(config: LoraConfig, pair: _Pair, target: _Checkpoint, key: str) -> LowRankUpdate:
    """The update of one whole matrix; `key` is what patterns of the configuration are matched with."""
    name = target.rename(f"{pair.module}.weight")
    rank = _check_rank(config, pair, key)
    size = (pair.shape_b[0], pair.shape_a[1])
    # The factors of an embedding [vocabulary, width] are those of its transpose, which is what it multiplies with.
    transposed = pair.embedding or config.fan_in_fan_out
    if target.tensors[name] != (size[::-1] if transposed else size):
        raise CheckpointError(
            f"B·A must have the shape of the weight it is added to; that of {pair.module!r} has {size}, and {name!r} has "
            f"{target.tensors[name]}"
        )
    matched = _EXPERT.fullmatch(pair.module)
    return LowRankUpdate(
        target=name,
        box=whole(target.tensors[name]),
        expert=int(matched[2]) if matched else None,
        a=pair.a,
        b=pair.b,
        rank_a=slice(0, rank),
        rank_b=slice(0, rank),
        scale=config.scale_of(key),
        transposed=transposed,
    )


def _one_expert(
    config: LoraConfig, pair: _Pair, target: _Checkpoint, module: str, expert: int, part: str
) -> LowRankUpdate:
    """The update of one projection of one expert, where the checkpoint has the experts in one tensor."""
    names = next((names for names in _NAMINGS if part in names), None)
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
    rank = _check_rank(config, pair, pair.module)
    return LowRankUpdate(
        target=name,
        box=((expert, expert + 1), (start, start + out), (0, inputs)),
        expert=expert,
        a=pair.a,
        b=pair.b,
        rank_a=slice(0, rank),
        rank_b=slice(0, rank),
        scale=config.scale_of(pair.module),
    )


def _gate_and_up(config: LoraConfig, pair: _Pair, target: _Checkpoint) -> list[LowRankUpdate]:
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
    rank = _check_rank(config, pair, pair.module) if places else 0
    return [
        LowRankUpdate(
            target=name,
            box=box,
            expert=None,
            a=pair.a,
            b=pair.b,
            rank_a=slice(0, rank),
            rank_b=slice(0, rank),
            scale=config.scale_of(pair.module),
            out_start=out_start,
        )
        for name, box, out_start in places
    ]


def _fused(config: LoraConfig, pairs: list[_Pair], target: _Checkpoint, parameters: list[str]) -> list[LowRankUpdate]:
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


def _fits(pairs: list[_Pair], shapes: list[Shape]) -> bool:
    """Whether every pair has the sizes of its parameter, in one or the other direction."""
    return all(
        {(pair.shape_b[0], pair.shape_a[1]), (pair.shape_a[1], pair.shape_b[0])} & {shape[1:]}
        for pair, shape in zip(pairs, shapes, strict=True)
    )


def _is_in_out(module: str, pairs: list[_Pair], shapes: list[Shape]) -> bool:
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

"""Lists of modules as quantization settings write them: whole names, names with `*`, and expressions after `re:`."""

import re
from collections.abc import Iterable, Iterator

from jaxmoe.quant.errors import QuantizationError

# Expressions come with a checkpoint, and are tried on each of its names: nested repetitions may take exponential time.
_REPEATED_GROUP = re.compile(r"[*+}]\)+[*+{]")
_UNBOUNDED = re.compile(r"(?<!\\)[*+{]")
_MAX_UNBOUNDED = 4
_MAX_LENGTH = 500

EXPERTS = r"re:.*\bexperts\."
"""An entry that names all of a model's routed experts; those that it shares are called otherwise."""

_NOT_LINEAR = re.compile(
    r"(^|[._])(embed\w*|embeddings?|wte|\w*norm\w*|ln_\w+|conv1d|router|rotary_emb)(\.|$)"
    r"|(^|\.)(mlp|moe|mixer|ffn|feed_forward|block_sparse_moe)\.gate$"
)
_HEAD = re.compile(r"(^|\.)(lm_head|head|output|embed_out)$")
# A number that begins a part of a name; an expression may have classes of digits, or any one character.
_NUMBER = re.compile(r"(?<![A-Za-z0-9_])\d")
_DIGITS = re.compile(r"(?<![A-Za-z0-9_])\d|\\[dDwW]|\[|(?<!\\)\.(?![*+])")
_LAYER = re.compile(r"layers\\?\.\d+")
# What need not be there: a tied head, and parts that are published or left out at will.
_OPTIONAL = re.compile(r"head|embed|vision|visual|audio|mm_projector|mtp|multi_modal")


class Names:
    r"""Modules that a list of entries names, those inside of them included.

    An entry is a name or a run of whole parts of one ("gate" is the router of every layer, and not "gate_proj"); a name
    with `*` for anything, from the first letter on; or "re:" and a regular expression, from the first letter on.

    >>> names = Names(["gate", "model.layers.*.self_attn", r"re:.*mlp\.(up|down)_proj"])
    >>> names.matches("model.layers.3.mlp.gate"), names.matches("model.layers.3.mlp.gate_proj")
    (True, False)
    >>> names.matches("model.layers.0.self_attn.q_proj"), names.matches("model.layers.0.mlp.up_proj")
    (True, True)
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self.entries = tuple(entries)
        for entry in self.entries:
            if not isinstance(entry, str):
                raise QuantizationError(f"a list of modules must hold names; one is {entry!r:.80}")
        self._whole = frozenset(entry for entry in self.entries if not _is_pattern(entry))
        self._lengths = {entry.count(".") + 1 for entry in self._whole}
        self._patterns = {entry: _compile(entry) for entry in self.entries if _is_pattern(entry)}
        # Lists have hundreds of names with `*`, and models ten thousands of modules: all of them are one expression.
        globs = [pattern.pattern for entry, pattern in self._patterns.items() if not entry.startswith("re:")]
        self._expressions = [pattern for entry, pattern in self._patterns.items() if entry.startswith("re:")]
        if globs:
            self._expressions.append(re.compile("|".join(globs)))

    def __bool__(self) -> bool:
        return bool(self.entries)

    def matches(self, module: str) -> bool:
        """Whether an entry names this module or one that it is in."""
        return any(run in self._whole for run in self._runs(module)) or any(
            expression.match(module) for expression in self._expressions
        )

    @property
    def may_tell_experts_apart(self) -> bool:
        """Whether an entry may name one expert of a layer and not another: it has a number that is no layer's."""
        return any(
            (_DIGITS if entry.startswith("re:") else _NUMBER).search(_LAYER.sub("layers", entry))
            for entry in self.entries
        )

    def unused(self, modules: Iterable[str]) -> list[str]:
        """The entries that name none of these modules."""
        left, patterns = set(self._whole), dict(self._patterns)
        for module in modules:
            if left:
                left.difference_update(self._runs(module))
            for entry in [entry for entry, pattern in patterns.items() if pattern.match(module)]:
                del patterns[entry]
            if not left and not patterns:
                break
        return [entry for entry in self.entries if entry in left or entry in patterns]

    def _runs(self, module: str) -> Iterator[str]:
        """The runs of whole parts of a name that are as long as an entry: of "a.b.c" and 2, a.b and b.c."""
        parts = module.split(".")
        for length in self._lengths:
            for first in range(len(parts) - length + 1):
                yield ".".join(parts[first : first + length])


def may_be_absent(entry: str) -> bool:
    """Whether a checkpoint without what an ignore list's entry names is an ordinary one."""
    return _OPTIONAL.search(entry) is not None


def is_linear(module: str) -> bool:
    """Whether a module may be a linear layer, by its name: no embedding, norm, router or convolution."""
    return _NOT_LINEAR.search(module) is None


def is_head(module: str) -> bool:
    """Whether a module is the one that makes logits, by its name."""
    return _HEAD.search(module) is not None


def ancestors(module: str) -> Iterator[str]:
    """A module's name and those of what it is in, innermost first."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _is_pattern(entry: str) -> bool:
    return entry.startswith("re:") or "*" in entry


def _compile(entry: str) -> re.Pattern[str]:
    if not entry.startswith("re:"):
        glob = ".*".join(re.escape(part) for part in re.split(r"\*+", entry))
        return re.compile(rf"(?:{glob})(?:\..*)?$")
    expression = entry.removeprefix("re:")
    most = max(len(_UNBOUNDED.findall(part)) for part in expression.split("|"))
    if len(expression) > _MAX_LENGTH or _REPEATED_GROUP.search(expression) or most > _MAX_UNBOUNDED:
        raise QuantizationError(
            f"an expression for modules must be matched in short time: no repeated groups, at most {_MAX_UNBOUNDED} "
            f"repetitions and {_MAX_LENGTH} characters; one is {entry!r:.80}; write the names of the modules"
        )
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise QuantizationError(f"{entry!r:.80} must be a regular expression: {error}") from error

"""The format of each module of a checkpoint, as its settings say."""

import dataclasses
from collections.abc import Mapping

from jaxmoe.quant.base import QuantFormat
from jaxmoe.quant.names import Names, ancestors, is_head, is_linear


@dataclasses.dataclass(frozen=True)
class Rules:
    """Formats of modules, the first rule that names a module deciding: ignored, modules, groups, default.

    Attributes:
        ignored: modules that are not quantized.
        modules: format of a module and of what is in it; the innermost name counts.
        groups: formats of lists of modules, in order; None where a list is left plain.
        default: format of every other linear layer; None where what no rule names is plain.
        head: whether the default is the head's too.
    """

    ignored: Names = dataclasses.field(default_factory=Names)
    modules: Mapping[str, QuantFormat] = dataclasses.field(default_factory=dict)
    groups: tuple[tuple[Names, QuantFormat | None], ...] = ()
    default: QuantFormat | None = None
    head: bool = False

    def named(self, module: str) -> tuple[bool, QuantFormat | None]:
        """Whether a rule names the module, and the format that it gives it."""
        if self.ignored.matches(module):
            return True, None
        if self.modules:
            for name in ancestors(module):
                if name in self.modules:
                    return True, self.modules[name]
        for names, form in self.groups:
            if names.matches(module):
                return True, form
        return False, self.default

    @property
    def may_tell_experts_apart(self) -> bool:
        """Whether a rule may name one expert of a layer and not another; where it is False, experts are stored alike."""
        lists = (self.ignored, Names(self.modules), *(names for names, _ in self.groups))
        return any(names.may_tell_experts_apart for names in lists)

    def format_of(self, module: str) -> QuantFormat | None:
        """The format of a module's weight, as far as settings and names tell."""
        named, form = self.named(module)
        if named or form is None:
            return form
        return form if is_linear(module) and (self.head or not is_head(module)) else None


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The quantization that a checkpoint declares: one answer for each of its modules.

    Attributes:
        method: name in the settings, such as "fp8" or "modelopt".
        source: file that says so.
        rules: formats of modules.
        notes: sentences about what is read past, such as scales of the cache.
    """

    method: str
    source: str
    rules: Rules
    notes: tuple[str, ...] = ()

    def format_of(self, module: str) -> QuantFormat | None:
        """The format of a module's weight, None where it is plain.

        Args:
            module: name of the module, which is the weight's without ".weight".
        """
        return self.rules.format_of(module)

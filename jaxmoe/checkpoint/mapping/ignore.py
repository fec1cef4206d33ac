"""Named rules for tensors that a model does not need."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class IgnoreRule:
    r"""Tensors that a model does not need, by name.

    Attributes:
        name: name of the rule; the load report lists the tensors under it.
        pattern: regular expression that the whole tensor name matches; "" where the rule lists names instead.
        names: names of tensors.

    Example:
        >>> rule = IgnoreRule(name="rotary tables", pattern=r".*\.rotary_emb\.inv_freq")
        >>> rule.matches("model.layers.0.self_attn.rotary_emb.inv_freq")
        True
    """

    name: str
    pattern: str = ""
    names: frozenset[str] = frozenset()

    def matches(self, tensor: str) -> bool:
        """Whether the rule is about `tensor`."""
        return tensor in self.names or (self.pattern != "" and re.fullmatch(self.pattern, tensor) is not None)

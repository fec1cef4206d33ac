"""`SamplingParams`: the settings by which a token is chosen."""

import dataclasses
import warnings
from typing import Any

from jaxmoe.checks import instance_of, integer, real_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings by which tokens are chosen, in the order in which they act on the logits.

    Attributes:
        repetition_penalty: number by which logits of tokens that the prompt or the text so far holds are divided where
            positive and multiplied where negative; 1.0 for none, above 1.0 discourages repetition.
        temperature: number that logits are divided by; 0.0 takes the likeliest token, the lowest id among equals.
        top_k: number of likeliest tokens that stay, and those tied with the last of them; 0 or None for all.
        top_p: probability to which the likeliest tokens that stay sum up, as few of them as reach it; 1.0 for all.
        min_p: fraction of the likeliest token's probability that a token needs to stay; 0.0 for all.

    Raises:
        ValueError: a setting is outside its range.

    Example:
        >>> SamplingParams(temperature=0.7, top_k=40).greedy
        False
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            object.__setattr__(self, name, real_number(name, getattr(self, name)))
        if self.top_k is not None:
            object.__setattr__(self, "top_k", integer("top_k", self.top_k))
        self._require("temperature", self.temperature >= 0.0, "at least 0 (0 is greedy)")
        self._require("top_k", self.top_k is None or self.top_k >= 0, "an integer of at least 0 (0 keeps all)")
        self._require("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1 (1 keeps all)")
        self._require("min_p", 0.0 <= self.min_p <= 1.0, "from 0 (keeps all) to 1")
        self._require("repetition_penalty", self.repetition_penalty > 0.0, "above 0 (1 is none)")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {rule}; got {getattr(self, name)!r}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, with nothing left to chance."""
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p leaves tokens out."""
        return bool(self.top_k) or self.top_p < 1.0

    @property
    def without_effect(self) -> str:
        """Sentence on settings that say which tokens to choose among where the likeliest is taken; empty where none does."""
        idle = {"top_k": (self.top_k or 1) > 1, "top_p": self.top_p < 1.0, "min_p": self.min_p > 0.0}
        names = ", ".join(name for name, given in idle.items() if given)
        if not names or not self.greedy:
            return ""
        return f"without effect: {names}; the likeliest token is taken at temperature 0, and sampling wants one above, as 1"

    @property
    def penalizes(self) -> bool:
        """Whether tokens seen before count less (or more)."""
        return self.repetition_penalty != 1.0


def sampling_params_of(params: SamplingParams | None, **settings: Any) -> SamplingParams:
    """Settings given as one object, one by one, or both ways alike; a setting that is None is not given.

    The caller's caller is warned of settings that have no effect at a temperature that nobody gave.

    Raises:
        TypeError: `params` is something else.
        ValueError: a setting is outside its range, or differs from that in `params`.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    one_by_one = SamplingParams(**given)
    if params is None:
        if "temperature" not in given and one_by_one.without_effect:
            warnings.warn(one_by_one.without_effect, stacklevel=3)
        return one_by_one
    instance_of("sampling_params", params, SamplingParams, "a jaxmoe.SamplingParams")
    for name in given:
        value, other = getattr(one_by_one, name), getattr(params, name)
        if value != other:
            raise ValueError(
                f"two settings of one thing are the same: {name} is {value} and sampling_params.{name} is {other}; "
                "give one of them"
            )
    return params

"""A dispatch for prompts and another for single tokens: prefill and decode ask for different things."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseDispatch:
    """The backend of each phase, by name or "auto".

    Attributes:
        prefill: backend for prompts, and for whole sequences without a cache.
        decode: backend for one more token of each sequence.
    """

    prefill: str = "auto"
    decode: str = "auto"

    @classmethod
    def of(cls, dispatch: "str | Mapping[str, str] | PhaseDispatch") -> "PhaseDispatch":
        """Make one of one name for both phases, or {"prefill": ..., "decode": ...}, of which one may be left out for "auto".

        Raises:
            ValueError: another phase is named.

        Example:
            >>> PhaseDispatch.of({"decode": "replicated"})
            PhaseDispatch(prefill='auto', decode='replicated')
        """
        if isinstance(dispatch, PhaseDispatch):
            return dispatch
        if isinstance(dispatch, str):
            return cls(prefill=dispatch, decode=dispatch)
        phases: dict[str, Any] = dict(dispatch)
        unknown = sorted(phases.keys() - {"prefill", "decode"})
        if unknown:
            raise ValueError(f'dispatch is a name, or names by phase, "prefill" and "decode"; got {unknown[0]!r}')
        return cls(**phases)

"""Counts and times of a generation: `GenerationStats`."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class GenerationStats:
    """Counts and times of one `jaxmoe.generate` call; pass one in and read it afterwards.

    Times are wall clock in seconds and none of them holds compile time, which stands apart.

    Attributes:
        prompts: number of prompts served.
        prompt_tokens: real tokens in them (padding not counted).
        generated_tokens: tokens handed out, over all prompts.
        decode_tokens: tokens among them that a decode step made; the first of each prompt comes from prefill.
        decode_steps: decode steps in which a prompt's text went on.
        drafted_tokens: tokens that were guessed and checked, over all prompts; 0 without speculation.
        accepted_tokens: tokens among them that were handed out.
        compile_seconds: time of tracing and compiling; 0 when every program was there already.
        prefill_seconds: time from prompts on the devices to first tokens on the host.
        decode_seconds: time from the first tokens to the last.
        first_token_seconds: time from the call to the first token of the first batch, without compiling.

    Example:
        >>> GenerationStats(decode_tokens=30, decode_seconds=0.5).decode_tokens_per_second
        60.0
    """

    prompts: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float | None = None

    def __add__(self, other: "GenerationStats") -> "GenerationStats":
        """Counts and times of two calls, one after the other; the first token is that of the first."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "first_token_seconds"]
        total = GenerationStats(**{name: getattr(self, name) + getattr(other, name) for name in names})
        first = self if self.first_token_seconds is not None else other
        total.first_token_seconds = first.first_token_seconds
        return total

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second of prefill."""
        return _rate(self.prompt_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second of decoding, over all rows; 0 where nothing was decoded."""
        return _rate(self.decode_tokens, self.decode_seconds)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the guessed tokens that were handed out; None where none was guessed."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Counts, times and rates as plain numbers, for JSON."""
        return {
            **dataclasses.asdict(self),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "acceptance_rate": self.acceptance_rate,
        }

    def summary(self) -> str:
        """One line for a person."""
        parts = [f"prefill {self.prompt_tokens} tokens at {self.prefill_tokens_per_second:,.0f} tok/s"]
        if self.decode_tokens:
            parts.append(f"decode {self.decode_tokens} tokens at {self.decode_tokens_per_second:,.1f} tok/s")
        if self.acceptance_rate is not None:
            parts.append(f"{self.acceptance_rate:.0%} of drafts accepted, {self.decode_steps} steps")
        if self.first_token_seconds is not None:
            parts.append(f"first token after {self.first_token_seconds:.3f} s")
        parts.append(f"compile {self.compile_seconds:.1f} s")
        return ", ".join(parts)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0

"""Text generation: tokenizer, engine, sampling, streaming.

`generate` is the whole of it for most uses, as ``jaxmoe.generate(model, prompts)``. `Engine` is
the part that knows token ids only. Names are imported on first use, so that this package is
cheap to import and starts no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "generate": "jaxmoe.generation.api",
    "encode": "jaxmoe.generation.api",
    "Output": "jaxmoe.generation.output",
    "TokenEvent": "jaxmoe.generation.output",
    "SamplingParams": "jaxmoe.generation.params",
    "GenerationStats": "jaxmoe.generation.stats",
    "Engine": "jaxmoe.generation.engine",
    "Tokenizer": "jaxmoe.generation.tokenizer",
    "expert_bytes_table": "jaxmoe.generation.report",
    "terminal_text": "jaxmoe.generation.report",
    "read_prompt_file": "jaxmoe.generation.prompt_file",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from jaxmoe.generation.api import encode as encode
    from jaxmoe.generation.api import generate as generate
    from jaxmoe.generation.engine import Engine as Engine
    from jaxmoe.generation.output import Output as Output
    from jaxmoe.generation.output import TokenEvent as TokenEvent
    from jaxmoe.generation.params import SamplingParams as SamplingParams
    from jaxmoe.generation.prompt_file import read_prompt_file as read_prompt_file
    from jaxmoe.generation.report import expert_bytes_table as expert_bytes_table
    from jaxmoe.generation.report import terminal_text as terminal_text
    from jaxmoe.generation.stats import GenerationStats as GenerationStats
    from jaxmoe.generation.tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxmoe.generation' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

"""Text generation: tokenizer, engine, sampling, streaming.

`generate` is the whole of it for most uses, as ``jaxmoe.generate(model, prompts)``. `Engine` is
the part that knows token ids only. Names are imported on first use, so that this package is
cheap to import and starts no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxmoe.callable_package import make_callable

_HOME = {
    "generate": "jaxmoe.generate.api",
    "encode": "jaxmoe.generate.api",
    "Output": "jaxmoe.generate.output",
    "TokenEvent": "jaxmoe.generate.output",
    "SamplingParams": "jaxmoe.generate.params",
    "GenerationStats": "jaxmoe.generate.stats",
    "Engine": "jaxmoe.generate.engine",
    "Tokenizer": "jaxmoe.generate.tokenizer",
    "expert_bytes_table": "jaxmoe.generate.report",
    "terminal_text": "jaxmoe.generate.report",
    "read_prompt_file": "jaxmoe.generate.prompt_file",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from jaxmoe.generate.api import encode as encode
    from jaxmoe.generate.api import generate as generate
    from jaxmoe.generate.engine import Engine as Engine
    from jaxmoe.generate.output import Output as Output
    from jaxmoe.generate.output import TokenEvent as TokenEvent
    from jaxmoe.generate.params import SamplingParams as SamplingParams
    from jaxmoe.generate.prompt_file import read_prompt_file as read_prompt_file
    from jaxmoe.generate.report import expert_bytes_table as expert_bytes_table
    from jaxmoe.generate.report import terminal_text as terminal_text
    from jaxmoe.generate.stats import GenerationStats as GenerationStats
    from jaxmoe.generate.tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxmoe.generate' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


make_callable(__name__)

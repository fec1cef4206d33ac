"""Text generation: tokenizer, engine, sampling, streaming.

`generate` is the whole of it for most uses, as ``jaxmoe.generate(model, prompts)``. `Engine` is
the part that knows token ids only. `ContinuousEngine` serves requests that come and go.
"""

from jaxmoe.generation.api import encode, generate
from jaxmoe.generation.continuous import ContinuousEngine
from jaxmoe.generation.engine import Engine
from jaxmoe.generation.output import Output, TokenEvent
from jaxmoe.generation.params import SamplingParams
from jaxmoe.generation.prompt_file import read_prompt_file
from jaxmoe.generation.report import expert_bytes_table, terminal_text
from jaxmoe.generation.requests import EngineCounts, Request, TokenConstraint, TokenResult
from jaxmoe.generation.stats import GenerationStats
from jaxmoe.generation.streaming import EventStream, stream
from jaxmoe.generation.tokenizer import Tokenizer

__all__ = [
    "ContinuousEngine",
    "Engine",
    "EngineCounts",
    "EventStream",
    "GenerationStats",
    "Output",
    "Request",
    "SamplingParams",
    "TokenConstraint",
    "TokenEvent",
    "TokenResult",
    "Tokenizer",
    "encode",
    "expert_bytes_table",
    "generate",
    "read_prompt_file",
    "stream",
    "terminal_text",
]

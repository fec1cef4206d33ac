"""Text generation: tokenizer, engine, sampling, streaming.

`generate` is the whole of it for most uses, as ``jaxmoe.generate(model, prompts)``. `Engine` is
the part that knows token ids only.
"""

from jaxmoe.generation.api import encode, generate
from jaxmoe.generation.engine import Engine
from jaxmoe.generation.output import Output, TokenEvent
from jaxmoe.generation.params import SamplingParams
from jaxmoe.generation.prompt_file import read_prompt_file
from jaxmoe.generation.report import expert_bytes_table, terminal_text
from jaxmoe.generation.stats import GenerationStats
from jaxmoe.generation.stream import EventStream, stream
from jaxmoe.generation.tokenizer import Tokenizer

__all__ = [
    "Engine",
    "EventStream",
    "GenerationStats",
    "Output",
    "SamplingParams",
    "TokenEvent",
    "Tokenizer",
    "encode",
    "expert_bytes_table",
    "generate",
    "read_prompt_file",
    "stream",
    "terminal_text",
]

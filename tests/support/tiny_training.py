"""A model, a text and a recipe of a size for tests."""

from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from jaxmoe.models import Decoder
from scripts._train.corpus import Batches, Document, encode, train_tokenizer, windows
from scripts._train.model import CONFIG, make_model, write_side_files
from scripts._train.run import HeldOut
from scripts._train.step import Recipe

TINY = CONFIG | {
    "hidden_size": 32,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "vocab_size": 300,
}
RECIPE = Recipe(steps=30, rows=8, length=24, learning_rate=1e-2, warmup=5)

DOCUMENTS = [
    Document(f"module_{i}.py", "".join(f"def f{i}_{j}(x, y):\n    return x * {i} + y * {j}\n\n\n" for j in range(12)))
    for i in range(24)
]


def tiny_model(directory: Path, mesh: Mesh, *, seed: int = 0, dispatch: str = "replicated") -> Decoder:
    """A model with random weights; `directory` gets its config and tokenizer."""
    if not (directory / "config.json").exists():
        write_side_files(directory, TINY, train_tokenizer((d.text for d in DOCUMENTS), TINY["vocab_size"]))
    return make_model(directory, mesh, seed=seed, expert_axes=("ep", "tp"), dispatch=dispatch)


def tiny_text() -> tuple[Batches, HeldOut]:
    """Batches of all documents but the last two, and those."""
    tokenizer = train_tokenizer((d.text for d in DOCUMENTS), TINY["vocab_size"])
    stream, held_out = encode(DOCUMENTS[:-2], tokenizer), encode(DOCUMENTS[-2:], tokenizer)
    assert stream.dtype == np.int32
    batches = Batches(stream, length=RECIPE.length, rows=RECIPE.rows, seed=0)
    return batches, HeldOut(*windows(held_out, RECIPE.length))

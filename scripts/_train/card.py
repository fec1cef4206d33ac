"""The model card, with every figure in it from the run itself."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from scripts._train.corpus import HELD_OUT_SHARE, SKIPPED_FILES, SKIPPED_FOLDERS, Corpus, Document
from scripts._train.result import Measured, favorite_tokens, text_bytes
from scripts._train.run import EVALUATION_BATCHES, LOG_EVERY
from scripts._train.step import Recipe

# Tokens shown for each expert.
FAVORITES = 8
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy")


def model_card(
    *,
    recipe: Recipe,
    steps_done: int,
    command: str,
    mesh: str,
    config: Mapping[str, Any],
    parameters: int,
    active: int,
    documents: Corpus,
    tokenizer: Tokenizer,
    stream: np.ndarray,
    held_out_stream: np.ndarray,
    log: Sequence[Mapping[str, Any]],
    measured: Measured,
) -> str:
    """The text of demo/README.md.

    Args:
        recipe: what was asked for.
        steps_done: updates that the weights have had.
        command: with which the run can be repeated.
        mesh: "dp=2,tp=2,ep=2".
        config: the model's config.json.
        parameters: of the model.
        active: parameters that a token uses.
        documents: what was trained on, and held out.
        tokenizer: of the model.
        stream: tokens of the training text.
        held_out_stream: tokens of the rest.
        log: of the run.
        measured: on the held-out text, with the weights as they were written.
    """
    tokens = steps_done * recipe.rows * recipe.length
    rates = [record["tokens_per_second"] for record in log if "tokens_per_second" in record]
    seconds = sum(recipe.rows * recipe.length * LOG_EVERY / rate for rate in rates)
    held_out_modules = ", ".join(sorted({document.module for document in documents.held_out}))
    skipped = ", ".join([*sorted(SKIPPED_FOLDERS - {"__pycache__"}), *sorted(SKIPPED_FILES)])
    windows = measured.trace.num_windows
    layer = measured.trace.num_layers // 2
    whole = "" if steps_done == recipe.steps else f" of {recipe.steps:,} planned ones, so at a learning rate still high"
    return f"""\
# A small Mixture-of-Experts model that writes Python

A Qwen3-MoE of {parameters / 1e6:.1f} million parameters, of which a token uses {active / 1e6:.1f} million: \
{config["num_hidden_layers"]} layers of {config["num_local_experts"]}
experts, {config["num_experts_per_tok"]} to a token. It was trained from random weights by jaxmoe's own layer on a \
simulated {mesh} mesh, and
is here to show real text and real routing. The layout is the one of transformers, in bfloat16.

## Data

The source text of the standard library of Python {platform.python_version()}: {len(documents.train)} files, \
{_bytes(documents.train):,} bytes,
{len(stream):,} tokens. Held out is one module in {HELD_OUT_SHARE}, by a hash of its name:
{len(documents.held_out)} files, {_bytes(documents.held_out):,} bytes, {len(held_out_stream):,} tokens of {held_out_modules}.
Left out of both are tests, bundled programs, and files that are tables: {skipped}.
The tokenizer is a byte-level BPE of {config["vocab_size"]:,} tokens, made from the training files alone.
The text is under Python's own licence (PSF).

## Held-out loss

| model | bits per byte |
|---|---|
{_rows(measured.bits_per_byte)}

All of them predict the same tokens, ends of text included; the bits are divided by the bytes of the text. The n-gram
models are of tokens, with interpolated Kneser-Ney smoothing. The model is the one in this folder, its bfloat16
weights computed with in float32; it reads rows of {recipe.length} tokens, and the first tokens of a row have little
before them.

![Loss over the steps](loss.png)

The curve's held-out loss is that of the first {EVALUATION_BATCHES * recipe.rows * recipe.length:,} held-out tokens.

## Training

{steps_done:,} steps{whole}, each of {recipe.rows} rows of {recipe.length} tokens: {tokens / 1e6:.1f} million tokens, \
{tokens / len(stream):.1f} times the text, in {seconds / 60:.0f}
minutes at {np.median(rates):,.0f} tokens/s (median) on {mesh} over simulated CPU devices, on a machine that had other work \
to do.
AdamW, peak learning rate {recipe.learning_rate:g} after {recipe.warmup} steps, cosine to a twentieth, weight decay \
{recipe.weight_decay:g} on matrices, gradient
clipped at {recipe.clip:g}, load-balancing loss × {recipe.balance:g}, router z-loss × {recipe.z:g}, float32.

    {command}

with Python {platform.python_version()}, {", ".join(f"{name} {version(name)}" for name in PACKAGES)}.

## Experts

Share of the held-out tokens' choices over an even share, by layer:

| layer | busiest expert | idlest expert |
|---|---|---|
{_load(measured.trace.total_counts)}

What the experts of layer {layer} read more than the others do:

| expert | tokens |
|---|---|
{_favorites(measured, layer, held_out_stream, tokenizer)}

`traces/` holds the routing of the held-out text for work on placements, as files of `jaxmoe.placement.RoutingTrace`:
`first_half.npz` and `second_half.npz` have the expert counts of {windows} windows, in the order of the text, so that a
placement can be made on one half and judged on the other; `first_half_tokens.npz` and `second_half_tokens.npz` have every
token's experts for the first windows of each half.

## Limits

It knows the look of Python and no more: names, indentation, docstrings and common idioms come out right, meaning does
not, and code that it writes rarely runs. It was trained on rows of {recipe.length} tokens and gets worse beyond them. It
has seen no other language, no questions and no chat, and has learned parts of the standard library by heart.
"""


def _bytes(documents: Sequence[Document]) -> int:
    return sum(text_bytes(document) for document in documents)


def _rows(bits_per_byte: Mapping[str, float]) -> str:
    return "\n".join(f"| {name} | {bits:.3f} |" for name, bits in bits_per_byte.items())


def _load(counts_LE: np.ndarray) -> str:
    relative = counts_LE / counts_LE.mean(axis=1, keepdims=True)
    return "\n".join(f"| {layer} | {load.max():.2f} | {load.min():.2f} |" for layer, load in enumerate(relative))


def _favorites(measured: Measured, layer: int, held_out_stream: np.ndarray, tokenizer: Tokenizer) -> str:
    """A row for each expert; the trace has a token for each of the stream but the last, which predicts nothing."""
    ids_TLK = measured.trace.expert_ids
    best = favorite_tokens(ids_TLK[:, layer], held_out_stream[:-1], measured.trace.num_experts, FAVORITES)

    def shown(token: int) -> str:
        # A code span in a table: no bar, and backticks only inside longer ones.
        text = repr(tokenizer.decode([token], skip_special_tokens=False))[1:-1].replace("|", "\\|")
        return f"`` {text} ``" if "`" in text or text != text.strip() else f"`{text}`"

    return "\n".join(
        f"| {expert} | {' '.join(shown(int(token)) for token in tokens)} |" for expert, tokens in enumerate(best)
    )

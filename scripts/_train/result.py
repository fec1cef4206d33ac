"""What a run leaves behind: the checkpoint in torch layout, its held-out loss, and where its tokens were routed."""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmoe
from jaxmoe.layers import params_by_path
from jaxmoe.models import Decoder
from jaxmoe.placement import RoutingTrace
from scripts._train.baselines import NGramModel
from scripts._train.corpus import Corpus, Document
from scripts._train.run import HeldOut
from scripts._train.step import Params

# Sequences in one call of the model: 3,072 tokens of 384 are a window of the trace.
ROWS = 8
# Windows of each half of the trace that are kept token by token.
TOKEN_WINDOWS = 8
NGRAM_ORDERS = (1, 5)


class Measured(NamedTuple):
    """What the card tells of held-out text.

    Attributes:
        bits_per_byte: of the model and of each baseline, by name.
        trace: the routing of every held-out token, a window for each call of the model.
    """

    bits_per_byte: dict[str, float]
    trace: RoutingTrace


def export(model: Decoder, params: Params, directory: Path) -> None:
    """Write the weights in bfloat16 as transformers does, one tensor per expert; replaces what is in `directory`."""
    for path, param in params_by_path(model).items():
        # Rounded here, routers too: `jaxmoe.save` keeps float32 where bfloat16 would change a value.
        param.set_value(params[path].astype(jnp.bfloat16).astype(jnp.float32))
    jaxmoe.save(model, directory, dtype="bfloat16", overwrite=True)


def measure(model: Decoder, held_out: HeldOut, documents: Corpus, streams: tuple[np.ndarray, np.ndarray]) -> Measured:
    """Compare a loaded model with n-gram models of the same tokens.

    Every token of the held-out stream but its first is predicted, ends of text included, and the bits are divided by
    the bytes of the text. The model sees what stands before a token in its own row, the n-grams the whole stream.

    Args:
        model: as `jaxmoe.load` gives it.
        held_out: rows of the held-out stream.
        documents: for their bytes.
        streams: training and held-out tokens.
    """
    train_stream, held_out_stream = streams
    size = sum(text_bytes(document) for document in documents.held_out)
    vocab_size = model.config.vocab_size
    bits = {
        f"{order}-gram": NGramModel(train_stream, order, vocab_size).bits(held_out_stream) for order in NGRAM_ORDERS
    }
    with model.record_routing(token_ids=True) as routing:
        bits["this model"] = sum(_nats(model, rows) for rows in _calls(held_out)) / math.log(2)
    return Measured({name: total / size for name, total in bits.items()}, routing.trace())


def save_traces(trace: RoutingTrace, directory: Path) -> None:
    """Write both halves of a trace: expert counts of every window, and the tokens of the first few windows."""
    directory.mkdir(exist_ok=True)
    for name, half in zip(("first_half", "second_half"), trace.halves(), strict=True):
        RoutingTrace(counts=half.counts).save(directory / f"{name}.npz")
        sizes = half.window_sizes[:TOKEN_WINDOWS]
        tokens = RoutingTrace.from_expert_ids(half.expert_ids[: sizes.sum()], half.num_experts, window=sizes)
        tokens.save(directory / f"{name}_tokens.npz")


def favorite_tokens(ids_TK: np.ndarray, tokens_T: np.ndarray, num_experts: int, count: int) -> np.ndarray:
    """The tokens that are most each expert's own: int64 [E, count], best first.

    A token counts by the share of its occurrences that go to the expert, times the logarithm of how many there are, so
    that neither a rare token nor one that goes everywhere stands first.
    """
    vocabulary = int(tokens_T.max()) + 1
    occurrences_V = np.bincount(tokens_T, minlength=vocabulary)
    best = []
    for expert in range(num_experts):
        chosen_V = np.bincount(tokens_T[(ids_TK == expert).any(axis=1)], minlength=vocabulary)
        score_V = chosen_V / np.maximum(occurrences_V, 1) * np.log1p(occurrences_V)
        best.append(np.argsort(-score_V, kind="stable")[:count])
    return np.stack(best)


def text_bytes(document: Document) -> int:
    """Bytes of a document in UTF-8."""
    return len(document.text.encode())


def _calls(held_out: HeldOut) -> list[np.ndarray]:
    """The rows in parts of one call each; the last row, which is shorter, is one by itself."""
    full = held_out.rows[held_out.lengths == held_out.rows.shape[1] - 1]
    calls = [full[start : start + ROWS] for start in range(0, len(full), ROWS)]
    return (
        calls
        + [row[None, : length + 1] for row, length in zip(held_out.rows, held_out.lengths, strict=True)][len(full) :]
    )


@jax.jit
def _sum_of_nats(logits_BSV: jax.Array, targets_BS: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits_BSV, targets_BS).sum()


def _nats(model: Decoder, rows: np.ndarray) -> float:
    return float(_sum_of_nats(model(rows[:, :-1]), rows[:, 1:]))

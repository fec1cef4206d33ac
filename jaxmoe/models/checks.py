"""Checks of a decoder before it computes or allocates anything."""

import numpy as np

from jaxmoe.config import DecoderConfig, LayerConfig, MoEConfig
from jaxmoe.mesh import TP

_LARGEST_TP = 128


def check_token_ids(token_ids: np.ndarray, vocab_size: int) -> None:
    """Refuse what an embedding lookup would silently clip.

    Raises:
        ValueError: not integers [B, S] with at least one token, all in 0..vocab_size-1.
    """
    if token_ids.ndim != 2 or token_ids.size == 0 or not np.issubdtype(token_ids.dtype, np.integer):
        raise ValueError(
            f"token ids are integers [batch, sequence], at least one; got {token_ids.dtype} {token_ids.shape}"
        )
    if token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise ValueError(
            f"token ids are 0..{vocab_size - 1}; got {token_ids.min()}..{token_ids.max()}; "
            f"use the tokenizer of this checkpoint"
        )


def check_length(config: DecoderConfig, length: int) -> None:
    """Refuse a sequence that the model's rotary frequencies do not hold for.

    Raises:
        ValueError: it is longer than the model was trained for, and its scaling would change the frequencies there.
    """
    ropes = [getattr(layer.attention, "rope", None) for layer in config.layers]
    most = min((rope.up_to for rope in ropes if rope is not None and rope.up_to), default=length)
    if length > most:
        raise ValueError(
            f"rope scaling 'dynamic' changes the frequencies of sequences beyond the {most} tokens of "
            f"max_position_embeddings, which jaxmoe does not compute; got {length} tokens; shorten the sequence, or give "
            "config.json a scaling whose frequencies are fixed, such as yarn"
        )


def check_tp(config: DecoderConfig, tp: int, expert_axes: tuple[str, ...]) -> None:
    """Refuse a tp that does not split heads and widths evenly.

    Raises:
        ValueError: names what does not divide, and every tp that would do.
    """

    def faults(tp: int) -> list[str]:
        return [fault for layer in config.layers for fault in _tp_faults(layer, tp, expert_axes)]

    if found := faults(tp):
        would_do = [str(size) for size in range(1, _LARGEST_TP + 1) if not faults(size)]
        raise ValueError(
            f"heads and widths are split evenly over tp: tp={tp} does not divide {found[0]}; "
            f"tp can be {', '.join(would_do)}"
        )


def _tp_faults(layer: LayerConfig, tp: int, expert_axes: tuple[str, ...]) -> list[str]:
    found = [] if layer.attention is None else layer.attention.tp_faults(tp)
    ffn = layer.feed_forward
    for dense in (ffn.shared if isinstance(ffn, MoEConfig) else ffn, layer.parallel_mlp, layer.shortcut_mlp):
        if dense is not None and dense.intermediate_size % tp:
            found.append(f"intermediate_size={dense.intermediate_size}")
    if layer.ngrams is not None and layer.ngrams.rows % tp:
        found.append(f"the rows of the table of n-grams {layer.ngrams.rows}")
    if isinstance(ffn, MoEConfig) and TP not in expert_axes and ffn.moe_intermediate_size % tp:
        found.append(f"the expert width {ffn.moe_intermediate_size}")
    return found

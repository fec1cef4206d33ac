"""The text that every Python has: its standard library's source, split by module, as tokens."""

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# Tests and bundled programs are not the library; the rest is generated or data: tables, character sets, help topics.
SKIPPED_FOLDERS = {
    "__pycache__", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
SKIPPED_FILES = {"html/entities.py", "msilib/schema.py"}
# One module in so many is held out.
HELD_OUT_SHARE = 16


class Document(NamedTuple):
    """One source file.

    Attributes:
        name: its path below the library, with slashes.
        text: its content.
    """

    name: str
    text: str

    @property
    def module(self) -> str:
        """The top-level module or package it belongs to."""
        return self.name.partition("/")[0].removesuffix(".py")


class Corpus(NamedTuple):
    """The documents, those of one module all on one side."""

    train: list[Document]
    held_out: list[Document]


def standard_library(root: Path | None = None) -> list[Document]:
    """Every source file of the running interpreter's standard library that a person wrote, by name."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    documents = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        # _sysconfigdata_*.py is written where Python is built and holds that machine's paths.
        generated = name in SKIPPED_FILES or path.name.startswith("_sysconfigdata")
        if generated or SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]):
            continue
        text = path.read_text(encoding="utf-8")
        if text.strip():
            documents.append(Document(name, text))
    return sorted(documents)


def split(documents: Iterable[Document]) -> Corpus:
    """Hold out one module in sixteen, chosen by a hash of its name alone: the same ones whatever else there is."""
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        digest = hashlib.sha256(document.module.encode()).digest()
        sides[digest[0] % HELD_OUT_SHARE == 0].append(document)
    return Corpus(*sides)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE; the same texts give the same merges."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one order of counting, so one result
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one stream of int32 ids, the end-of-text token after each and before the first."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [[end]]
    for document in documents:
        pieces += [tokenizer.encode(document.text).ids, [end]]
    return np.concatenate([np.asarray(piece, np.int32) for piece in pieces])


def windows(stream: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a stream into rows of `length` predictions, so that every token but the first is predicted once.

    Returns:
        int32 [N, length + 1], each row beginning with the token that the row before ends with, padded with zeros; and
        int32 [N], the predictions in each row.
    """
    predictions = len(stream) - 1
    count = -(-predictions // length)
    padded = np.zeros(count * length + 1, np.int32)
    padded[: len(stream)] = stream
    rows = np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::length]
    return rows.copy(), np.minimum(length, predictions - np.arange(count) * length).astype(np.int32)


class Batches:
    """Training batches as a function of the step alone, so that a run goes on exactly where it stopped.

    Each epoch cuts the stream at another offset and shuffles the windows; a batch never spans two epochs.

    Args:
        stream: ids of all training documents.
        length: tokens predicted in a row.
        rows: rows of a batch.
        seed: of offsets and order.
    """

    def __init__(self, stream: np.ndarray, *, length: int, rows: int, seed: int):
        self.stream, self.length, self.rows, self.seed = stream, length, rows, seed
        # One window less than fit: the offset eats up to one.
        self.steps_per_epoch = ((len(stream) - 1) // length - 1) // rows
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"a batch takes {rows} rows of {length} tokens, one row more for the offset; the stream has "
                f"{len(stream)} tokens: use shorter or fewer rows"
            )
        self._epoch, self._starts = -1, np.zeros(0, np.int64)

    def __getitem__(self, step: int) -> np.ndarray:
        """int32 [rows, length + 1], the batch of a step counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            offset = rng.integers(self.length)
            order = rng.permutation((len(self.stream) - 1 - offset) // self.length)
            self._epoch, self._starts = epoch, offset + order * self.length
        starts = self._starts[index * self.rows : (index + 1) * self.rows]
        return self.stream[starts[:, None] + np.arange(self.length + 1)]

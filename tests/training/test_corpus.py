"""The text, its split, its windows and its batches."""

import itertools

import numpy as np
import pytest

from scripts._train.corpus import (
    END_OF_TEXT,
    Batches,
    Document,
    encode,
    split,
    standard_library,
    train_tokenizer,
    windows,
)
from tests.support.tiny_training import DOCUMENTS


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")


def test_only_what_a_person_wrote_is_read(tmp_path):
    kept = ["abc.py", "email/message.py", "email/mime/text.py", "html/__init__.py"]
    left_out = [
        "test/test_abc.py",
        "unittest/test/test_case.py",
        "ctypes/test/__init__.py",
        "encodings/cp437.py",
        "idlelib/pyshell.py",
        "site-packages/numpy/__init__.py",
        "html/entities.py",
        "_sysconfigdata__linux_.py",
        "abc.txt",
    ]
    write(tmp_path, *kept, *left_out)
    (tmp_path / "empty.py").write_text("\n")
    assert [document.name for document in standard_library(tmp_path)] == kept


def test_the_library_of_this_python_is_found():
    names = {document.name for document in standard_library()}
    assert {"argparse.py", "json/decoder.py", "collections/__init__.py"} <= names
    assert not any("idlelib" in name or "/test/" in name for name in names)


def test_a_module_is_on_one_side_whatever_else_there_is():
    names = [f"module{i}/{file}.py" for i in range(200) for file in "ab"] + [f"single{i}.py" for i in range(200)]
    documents = [Document(name, "text") for name in names]
    corpus = split(documents)
    train, held_out = ({document.module for document in side} for side in corpus)
    assert not train & held_out
    assert len(train | held_out) == 400
    assert 400 / 16 / 2 < len(held_out) < 400 / 16 * 2
    assert {document.name for document in split(documents[::3]).held_out} <= {d.name for d in corpus.held_out}


def test_documents_are_separated_and_come_back():
    tokenizer = train_tokenizer((document.text for document in DOCUMENTS), 300)
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = encode(DOCUMENTS[:3], tokenizer)
    ends = np.flatnonzero(stream == end)
    assert (ends[0], ends[-1], len(ends)) == (0, len(stream) - 1, 4)
    texts = [tokenizer.decode(stream[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]
    assert texts == [document.text for document in DOCUMENTS[:3]]


def test_a_tokenizer_is_made_the_same_again_and_round_trips_any_text():
    first, again = (train_tokenizer((document.text for document in DOCUMENTS), 300) for _ in range(2))
    assert first.to_str() == again.to_str()
    assert first.get_vocab_size() == 300
    text = "def f(x):\n\treturn 'é – 漢字 🙂'  # any bytes\r\n"
    assert first.decode(first.encode(text).ids) == text


@pytest.mark.parametrize("size", [2, 12, 13, 14, 100])
def test_windows_predict_every_token_once(size):
    stream = np.arange(100, 100 + size, dtype=np.int32)
    rows, lengths = windows(stream, 12)
    assert rows.shape == (len(lengths), 13)
    predicted = [row[1 : length + 1] for row, length in zip(rows, lengths, strict=True)]
    np.testing.assert_array_equal(np.concatenate(predicted), stream[1:])
    seen = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    np.testing.assert_array_equal(np.concatenate(seen), stream[:-1])


def test_batches_are_a_function_of_seed_and_step():
    stream = np.arange(1000, dtype=np.int32)
    batches, again = (Batches(stream, length=10, rows=8, seed=3) for _ in range(2))
    steps = [5, 40, 0, 5, 39]
    for step, other in zip(steps, [again[step] for step in reversed(steps)][::-1], strict=True):
        np.testing.assert_array_equal(batches[step], other)
        np.testing.assert_array_equal(np.diff(batches[step], axis=1), 1)  # rows of consecutive tokens
    assert not np.array_equal(batches[0], Batches(stream, length=10, rows=8, seed=4)[0])


def test_an_epoch_sees_a_token_once_at_most_and_nearly_all():
    stream = np.arange(1000, dtype=np.int32)
    batches = Batches(stream, length=10, rows=8, seed=0)
    assert batches.steps_per_epoch == 12
    epochs = []
    for epoch in range(3):
        predicted = np.concatenate([batches[epoch * 12 + i][:, 1:].reshape(-1) for i in range(12)])
        assert len(np.unique(predicted)) == len(predicted) == 960
        epochs.append(predicted)
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_text_too_short_for_a_batch_is_refused():
    with pytest.raises(
        ValueError, match=r"a batch takes 8 rows of 10 tokens.*has 81 tokens: use shorter or fewer rows"
    ):
        Batches(np.zeros(81, np.int32), length=10, rows=8, seed=0)

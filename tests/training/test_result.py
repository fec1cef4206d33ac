"""What a run leaves behind: the checkpoint, its figures, the traces, the picture and the card."""

import math

import jax
import numpy as np
import pytest

import jaxmoe
from jaxmoe.checkpoint.formats.files import open_checkpoint
from jaxmoe.placement import RoutingTrace
from scripts._train.card import model_card
from scripts._train.corpus import Corpus, encode, train_tokenizer
from scripts._train.plot import loss_curve
from scripts._train.result import export, favorite_tokens, measure, save_traces, text_bytes
from scripts._train.run import evaluate
from scripts._train.step import Trainer
from tests.support.meshes import mesh_of
from tests.support.tiny_training import DOCUMENTS, RECIPE, TINY, tiny_model, tiny_text

CORPUS = Corpus(DOCUMENTS[:-2], DOCUMENTS[-2:])
LOG = [
    {"step": step, "loss": 5 / step, "tokens_per_second": 1000 + step, "held_out_loss": 6 / step} for step in (10, 20)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer, its state after some steps, and the directory that it was written to."""
    directory = tmp_path_factory.mktemp("run")
    model = tiny_model(directory / "model", mesh_of(2, 2, 2))
    trainer = Trainer(model, RECIPE)
    batches, _ = tiny_text()
    state = trainer.init()
    for step in range(12):
        state, _ = trainer.step(state, trainer.shard(batches[step]))
    export(model, state.params, directory / "out")
    return trainer, state, directory / "out"


@pytest.fixture(scope="module")
def measured(trained):
    _, _, directory = trained
    tokenizer = train_tokenizer((document.text for document in DOCUMENTS), TINY["vocab_size"])
    streams = encode(CORPUS.train, tokenizer), encode(CORPUS.held_out, tokenizer)
    model = jaxmoe.load(directory, mesh=mesh_of(2, 2, 2), dtype="float32")
    _, held_out = tiny_text()
    return measure(model, held_out, CORPUS, streams), held_out, tokenizer, streams


@pytest.mark.full
def test_the_checkpoint_is_whole_and_bfloat16(trained):
    trainer, state, directory = trained
    assert {path.name for path in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {tensor.dtype_name for tensor in open_checkpoint(directory).tensors.values()} == {"BF16"}
    model = jaxmoe.load(directory, mesh=mesh_of(1, 2, 4), dtype="float32", placement="round_robin")
    batches, _ = tiny_text()
    tokens = batches[0][:, :-1]
    expected = trainer._model(state.params)(tokens)
    rounding = float(np.abs(expected).max()) * 2**-7
    np.testing.assert_allclose(model(tokens), expected, atol=rounding)


@pytest.mark.full
def test_bits_are_of_every_token_and_byte(trained, measured):
    trainer, state, _ = trained
    result, held_out, _, _ = measured
    nats, _ = evaluate(trainer, state, held_out)
    size = sum(len(document.text.encode()) for document in CORPUS.held_out)
    bits = nats * held_out.lengths.sum() / math.log(2) / size
    # The weights were rounded to bfloat16 in between.
    assert result.bits_per_byte["this model"] == pytest.approx(bits, rel=0.01)
    assert result.bits_per_byte["1-gram"] > result.bits_per_byte["5-gram"]


@pytest.mark.full
def test_the_traces_are_the_two_halves_of_all_tokens(measured, tmp_path):
    result, held_out, _, _ = measured
    assert result.trace.expert_ids.shape == (held_out.lengths.sum(), 2, 2)
    save_traces(result.trace, tmp_path / "traces")
    halves = [RoutingTrace.load(tmp_path / "traces" / f"{name}_half.npz") for name in ("first", "second")]
    np.testing.assert_array_equal(np.concatenate([half.counts for half in halves]), result.trace.counts)
    for name, half in zip(("first", "second"), halves, strict=True):
        tokens = RoutingTrace.load(tmp_path / "traces" / f"{name}_half_tokens.npz")
        np.testing.assert_array_equal(tokens.counts, half.counts[: tokens.num_windows])


@pytest.mark.parametrize("log", [LOG, [{"step": 10, "loss": 5.0}]], ids=["whole", "never evaluated"])
def test_the_picture_is_one(tmp_path, log):
    loss_curve(log, {"1-gram": 3.0}, 2.0, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_favorites_are_what_an_expert_gets_often_and_others_do_not():
    tokens_T = np.array([3] * 10 + [4] * 10 + [5])
    ids_TK = np.array([[0, 1]] * 10 + [[2, 1]] * 5 + [[2, 0]] * 5 + [[3, 0]])
    best = favorite_tokens(ids_TK, tokens_T, 4, 2)
    assert best[:, 0].tolist() == [3, 3, 4, 5]
    assert best[0].tolist() == [3, 4]  # half of ten outweighs the only one


@pytest.mark.full
@pytest.mark.parametrize(("done", "sentence"), [(30, "30 steps, each of"), (12, "12 steps of 30 planned ones")])
def test_the_card_has_the_figures(measured, done, sentence):
    result, _, tokenizer, (stream, held_out_stream) = measured
    card = model_card(
        recipe=RECIPE,
        steps_done=done,
        command="python scripts/train_demo.py --steps 30",
        mesh="dp=2,tp=2,ep=2",
        config=TINY,
        parameters=7_200_000,
        active=1_800_000,
        documents=CORPUS,
        tokenizer=tokenizer,
        stream=stream,
        held_out_stream=held_out_stream,
        log=LOG,
        measured=result,
    )
    assert sentence in card
    assert f"| this model | {result.bits_per_byte['this model']:.3f} |" in card
    assert f"{sum(map(text_bytes, CORPUS.train)):,} bytes" in card
    assert "    python scripts/train_demo.py --steps 30\n" in card
    assert f"jax {jax.__version__}" in card
    busiest = result.trace.total_counts[0].max() / result.trace.total_counts[0].mean()
    assert f"| 0 | {busiest:.2f} | " in card
    assert card.count("| `") == TINY["num_local_experts"]

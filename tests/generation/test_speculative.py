"""Speculative decoding: the tokens of plain greedy decoding in fewer steps, whatever each row accepts."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe.generation import GenerationStats
from jaxmoe.models.speculation import count_right
from tests.support import runs
from tests.support.meshes import mesh_of
from tests.support.mtp import LAYOUTS, write_checkpoint

PROMPTS = [np.random.default_rng(n).integers(3, 97, n).tolist() for n in (11, 3, 16, 1, 9)]
NEW = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models by family, mesh and how predictable they are, each loaded once."""
    made = {}

    def make(family: str, scale: float | None, shape: tuple[int, int, int] = (1, 1, 1)):
        key = (family, scale, shape)
        if key not in made:
            path = write_checkpoint(family, tmp_path_factory.mktemp(family) / "checkpoint", scale=scale)
            made[key] = jaxmoe.load(path, mesh=mesh_of(*shape), placement="round_robin", mtp=True)
        return made[key]

    return make


def both(model, *, num_drafts: int | None = None, **settings) -> tuple[list, list, GenerationStats]:
    """The outputs without and with speculation, and the statistics of the second."""
    settings = {"max_new_tokens": NEW, "ignore_eos": True, **settings}
    plain = jaxmoe.generate(model, PROMPTS, **settings)
    stats = GenerationStats()
    return (
        plain,
        jaxmoe.generate(model, PROMPTS, speculate="mtp", num_drafts=num_drafts, stats=stats, **settings),
        stats,
    )


# Of these the short run has a recurrent state, and three depths with windows and sinks.
SHORT = ("qwen3_next",)


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in SHORT else pytest.mark.full) for f in LAYOUTS])
def test_the_same_tokens_where_some_drafts_are_right(models, family) -> None:
    shape = (2, 2, 2) if runs.full and family == "qwen3_next" else (1, 1, 1)
    plain, speculated, stats = both(models(family, 0.3, shape))
    assert speculated == plain
    assert stats.acceptance_rate is not None
    assert 0 < stats.acceptance_rate < 1
    assert stats.decode_steps < NEW - 1
    assert stats.generated_tokens == NEW * len(PROMPTS)


@pytest.mark.parametrize("num_drafts", [1, pytest.param(4, marks=pytest.mark.full)])
def test_every_draft_right_is_as_few_steps_as_can_be(models, num_drafts) -> None:
    plain, speculated, stats = both(models("glm4_moe", 0.0), num_drafts=num_drafts)
    assert speculated == plain
    assert stats.decode_steps == -(-(NEW - 1) // (num_drafts + 1))
    # What the last step found beyond max_new_tokens was not handed out.
    handed_out = (NEW - 1) - stats.decode_steps + ((NEW - 1) % (num_drafts + 1) > 0)
    assert stats.accepted_tokens == handed_out * len(PROMPTS)
    assert stats.to_dict()["acceptance_rate"] == stats.accepted_tokens / (
        num_drafts * stats.decode_steps * len(PROMPTS)
    )
    assert "of drafts accepted" in stats.summary()


@pytest.mark.full
def test_no_draft_right_is_one_token_a_step(models) -> None:
    for count in (6, 1):
        plain, speculated, stats = both(models("glm4_moe", None), max_new_tokens=count)
        assert speculated == plain
        assert stats.decode_steps == count - 1
        assert not stats.acceptance_rate


def test_text_ends_within_a_step(models) -> None:
    """At an EOS token, where a listener says so, and at max_new_tokens: what the step found behind it is dropped."""
    model = models("glm4_moe", 0.0)
    # The token behind t is t + 1.
    eos = [prompt[-1] + offset for prompt, offset in zip(PROMPTS, (2, 3, 4, 5, 6), strict=True)]
    plain, speculated, _ = both(model, ignore_eos=False, eos_token_id=[token % 97 for token in eos])
    assert speculated == plain
    assert {out.finish_reason for out in plain} == {"stop"}
    for count in (NEW - 2, NEW - 1):
        plain, speculated, stats = both(model, max_new_tokens=count)
        assert speculated == plain
        assert stats.generated_tokens == count * len(PROMPTS)
    events: list[jaxmoe.TokenEvent] = []
    both(model, stream=events.append)
    assert len(events) == 2 * NEW * len(PROMPTS)


def test_a_count_ends_at_the_first_wrong_draft() -> None:
    drafts = jnp.array([[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 9]])
    greedy = jnp.array([[1, 2, 3, 4]] * 4)
    assert count_right(drafts, greedy).tolist() == [3, 1, 0, 2]


@pytest.mark.full
def test_experts_of_these_layers_are_recorded_and_move_with_the_others(models) -> None:
    model = models("glm4_moe", 0.0, (1, 2, 4))
    settings = {"max_new_tokens": 6, "ignore_eos": True}
    with model.record_routing() as routing:
        plain = jaxmoe.generate(model, PROMPTS, **settings)
    counts = routing.counts()
    assert counts.shape == (2, 12)
    assert (counts[0].sum() > 0, counts[1].sum()) == (True, 0)  # of a layer that was not run
    with model.record_routing() as routing:
        jaxmoe.generate(model, PROMPTS, speculate="mtp", **settings)
    assert routing.counts()[1].sum() > 0
    moved = model.rebalance(jaxmoe.ExpertPlacement.from_counts(routing.counts(), ep=4))
    assert moved.total > 0
    stats = GenerationStats()
    assert jaxmoe.generate(model, PROMPTS, speculate="mtp", stats=stats, **settings) == plain
    assert stats.decode_steps == 3


@pytest.mark.full
def test_packed_weights_speculate_as_well(tmp_path) -> None:
    path = write_checkpoint("glm4_moe", tmp_path / "glm4_moe", scale=0.0)
    model = jaxmoe.load(path, mesh=mesh_of(1, 1, 1), mtp=True, quantize="int8")
    plain, speculated, stats = both(model)
    assert speculated == plain
    assert stats.acceptance_rate is not None
    assert stats.acceptance_rate > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculate": "eagle"}, "speculate is \"mtp\", or None for one token a step; got 'eagle'"),
        ({"speculate": "mtp", "temperature": 0.7}, "temperature 0 and no repetition penalty; got temperature 0.7"),
        ({"speculate": "mtp", "repetition_penalty": 1.2}, "and repetition_penalty 1.2; leave speculate out"),
        ({"speculate": "mtp", "num_drafts": 0}, "num_drafts is an integer from 1 to 16; got 0"),
        ({"num_drafts": 2}, 'num_drafts goes with speculate="mtp"; got num_drafts=2 without it'),
    ],
)
def test_what_does_not_go_together_is_told(models, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        jaxmoe.generate(models("glm4_moe", 0.0), PROMPTS, **settings)


def test_a_model_that_cannot_is_told(models) -> None:
    model = jaxmoe.load(models("glm4_moe", 0.0).source, mesh=mesh_of(1, 1, 1))
    with pytest.raises(ValueError, match=r"this model has none; load it with mtp=True, or leave speculate out"):
        jaxmoe.generate(model, PROMPTS, speculate="mtp")
    model = models("glm4_moe", 0.0)
    message = r"thrown away; leave speculate out, or record counts alone"
    with model.record_routing(token_ids=True), pytest.raises(ValueError, match=message):
        jaxmoe.generate(model, PROMPTS, speculate="mtp")

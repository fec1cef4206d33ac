"""Tiny models with what transformers computed of them, and comparisons with it."""

from pathlib import Path

import numpy as np

import jaxmoe
from jaxmoe.layers import params_by_path

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"


# The error is given as a share of the largest absolute logit.
LOGIT_TOLERANCE = 2e-4


def read_expected(family: str) -> dict[str, list[np.ndarray]]:
    with np.load(GOLDENS / family / "expected.npz") as arrays:
        count = len(arrays.files) // 3
        return {kind: [arrays[f"{kind}_{i}"] for i in range(count)] for kind in ("prompt", "logits", "greedy")}


def check_logits(model, expected: dict[str, list[np.ndarray]]) -> None:
    """The logits of all prompts in one batch padded with anything."""
    largest = max(np.abs(logits).max() for logits in expected["logits"])
    longest = max(map(len, expected["prompt"]))
    batch = np.full((len(expected["prompt"]), longest), 5)
    for row, prompt in zip(batch, expected["prompt"], strict=True):
        row[: len(prompt)] = prompt
    together = np.asarray(model(batch))
    assert together.dtype == np.float32
    for row, logits in zip(together, expected["logits"], strict=True):
        assert np.abs(row[: len(logits)] - logits).max() < LOGIT_TOLERANCE * largest


def check_greedy(model, expected: dict[str, list[np.ndarray]]) -> None:
    """The greedy tokens of a batch of prompts of different lengths."""
    prompts = [prompt.tolist() for prompt in expected["prompt"]]
    new_tokens = len(expected["greedy"][0])
    outs = jaxmoe.generate(model, prompts, max_new_tokens=new_tokens, ignore_eos=True)
    for out, greedy in zip(outs, expected["greedy"], strict=True):
        assert out.token_ids == greedy.tolist()


def check_alone(model, expected: dict[str, list[np.ndarray]]) -> None:
    """The logits and greedy tokens of one prompt that is not in a batch."""
    alone = np.asarray(model(expected["prompt"][0][None]))[0]
    assert np.abs(alone - expected["logits"][0]).max() < LOGIT_TOLERANCE * np.abs(expected["logits"][0]).max()
    prompt, greedy = (expected[kind][1].tolist() for kind in ("prompt", "greedy"))
    (out,) = jaxmoe.generate(model, [prompt], max_new_tokens=len(greedy), ignore_eos=True)
    assert out.token_ids == greedy


def check_same_parameters(model, other) -> None:
    """Two models that compute the same, as they have the same numbers in the same places."""
    ours, theirs = params_by_path(model), params_by_path(other)
    assert ours.keys() == theirs.keys()
    for path, param in ours.items():
        assert param[...].sharding == theirs[path][...].sharding, path
        np.testing.assert_array_equal(param[...], theirs[path][...], err_msg=path)

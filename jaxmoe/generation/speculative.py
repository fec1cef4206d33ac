"""The device side of speculative decoding, in the place of the engine's own: each step gives a row one token or several."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checks import integer
from jaxmoe.generation.model import Model
from jaxmoe.generation.params import SamplingParams
from jaxmoe.generation.programs import Leaves, Programs, Record, Shape
from jaxmoe.models import Decoder
from jaxmoe.models.padding import bucket_length
from jaxmoe.models.routing import Routing
from jaxmoe.models.speculation import Checked, Progress

MOST_DRAFTS = 16


class SpeculativeStep(NamedTuple):
    """One step under way on the devices."""

    checked: Checked
    progress: Progress
    routing: Routing | None

    def tokens(self) -> list[list[int]]:
        """The tokens of each row that count, all but the last of which were drafts."""
        counts = np.asarray(self.checked.counts)
        return [row[:count].tolist() for row, count in zip(np.asarray(self.checked.tokens), counts, strict=True)]


class SpeculativeBatch:
    """The device side of one `Engine.run` with drafts: padded inputs, the caches and the programs for their shape.

    Args:
        programs: programs of the model.
        leaves: arrays of the model.
        model: model with layers for multi-token prediction.
        prompts: token ids.
        max_new_tokens: most tokens of a row.
        num_drafts: number of tokens that each step guesses.
        record: part of their routing that the steps have to tell.
    """

    def __init__(
        self,
        programs: Programs,
        leaves: Leaves,
        model: Model,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        num_drafts: int,
        record: Record,
    ):
        decoder = cast(Decoder, model)
        limit = decoder.config.max_position_embeddings
        longest = max(map(len, prompts))
        # A row that goes on has room for its drafts, whether or not the model has positions for tokens there.
        shape = Shape(
            rows=decoder.padded_batch(len(prompts)),
            prompt=bucket_length(longest, limit),
            cache=bucket_length(max(longest + max_new_tokens + num_drafts, 2 * num_drafts)),
        )
        self.leaves, self._put = leaves, programs.put
        init_cache = programs.init_speculation(leaves, shape, num_drafts)
        self._begin = programs.begin(leaves, shape, num_drafts, record)
        width, dtype = decoder.config.hidden_size, jnp.dtype(decoder.dtype)
        self._advance = (
            programs.advance(leaves, shape, num_drafts, record, width, dtype) if max_new_tokens > 1 else None
        )
        tokens, lengths = np.zeros((shape.rows, shape.prompt), np.int32), np.zeros(shape.rows, np.int32)
        for index, prompt in enumerate(prompts):
            tokens[index, : len(prompt)] = prompt
            lengths[index] = len(prompt)
        self._tokens, self._lengths = programs.put(tokens), programs.put(lengths)
        self._active = np.arange(shape.rows) < len(prompts)
        self._active_on_device = programs.put(self._active.copy())
        self._cache = init_cache(leaves)

    def retire(self, rows: Sequence[int]) -> None:
        """Let these rows stay where they are from the next step on, and spare the experts."""
        self._active[list(rows)] = False
        self._active_on_device = self._put(self._active.copy())  # a CPU device may keep using the array it is given

    def prefill(self) -> SpeculativeStep:
        """Run the prompts."""
        checked, progress, self._cache, routing = self._begin(self.leaves, self._tokens, self._lengths, self._cache)
        return self._step(checked, progress, routing)

    def decode(self, last: SpeculativeStep) -> SpeculativeStep:
        """Check the drafts of the last step."""
        assert self._advance is not None
        checked, progress, self._cache, routing = self._advance(
            self.leaves, self._active_on_device, last.progress, self._cache
        )
        return self._step(checked, progress, routing)

    def _step(self, checked: Checked, progress: Progress, routing: Routing | None) -> SpeculativeStep:
        jax.tree.map(lambda array: array.copy_to_host_async(), checked)
        return SpeculativeStep(checked, progress, routing)


def check_speculation(model: Model, speculate: str | None, num_drafts: int | None, params: SamplingParams) -> int:
    """Find the number of tokens that each step guesses.

    Args:
        model: model to generate with.
        speculate: "mtp", or None for no speculation.
        num_drafts: number that was asked for; None for one by each layer for multi-token prediction.
        params: settings by which tokens are chosen.

    Returns:
        The number of drafts, 0 without speculation.

    Raises:
        ValueError: the argument is none of those, the model has no such layers, or the settings or what is active on the
            model do not go with speculation.
    """
    if speculate is None:
        if num_drafts is not None:
            raise ValueError(f'num_drafts goes with speculate="mtp"; got num_drafts={num_drafts} without it')
        return 0
    if speculate != "mtp":
        raise ValueError(f'speculate is "mtp", or None for one token a step; got {speculate!r}')
    if not isinstance(model, Decoder) or model.config.mtp is None:
        raise ValueError(
            'speculate="mtp" guesses tokens with layers for multi-token prediction, and this model has none; load it with '
            "mtp=True, or leave speculate out"
        )
    if not params.greedy or params.penalizes:
        raise ValueError(
            "speculation checks guesses against the likeliest token: it goes with temperature 0 and no repetition penalty; "
            f"got temperature {params.temperature} and repetition_penalty {params.repetition_penalty}; leave speculate out "
            "for those"
        )
    if model.replay is not None or (model.recorder is not None and model.recorder.token_ids):
        raise ValueError(
            "choices of each token are recorded and replayed one token a step, and speculation runs tokens that are then "
            "thrown away; leave speculate out, or record counts alone (record_routing() without token_ids)"
        )
    if num_drafts is None:
        return model.config.mtp.num_layers
    return integer("num_drafts", num_drafts, least=1, most=MOST_DRAFTS)

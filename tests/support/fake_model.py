"""A model whose next token is plain arithmetic on the whole history, with the decoder's interface.

What it generates is known without running it (`expected`), and it compiles in no time, so the tests
of the engine are exact and quick.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.mesh import batch_axes, named, padded_batch

VOCAB = 37


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    vocab_size: int = VOCAB
    max_position_embeddings: int = 512


class FakeModel(nnx.Module):
    """Remembers the tokens in its cache; the logits are a permutation of 0..V-1 that depends on all of them.

    It has no experts: nothing of it is recorded, replayed or balanced.
    """

    recorder = replay = None
    placements: ClassVar[list] = []

    def __init__(self, mesh: Mesh, *, offset: int = 0, source: Path | None = None, config: FakeConfig | None = None):
        self.config, self.mesh, self.source = config or FakeConfig(), mesh, source
        self.offset = nnx.Param(jax.device_put(jnp.int32(offset), named(mesh)))

    def padded_batch(self, batch_size: int) -> int:
        return padded_batch(self.mesh, batch_size)

    def describe(self, *, batch_size: int = 1, prompt_length: int = 512) -> str:
        return f"a fake for {batch_size} prompts"

    def init_cache(self, batch_size: int, max_length: int) -> dict[str, jax.Array]:
        tokens = jnp.full((batch_size, max_length), -1, jnp.int32)
        return {"tokens": jax.lax.with_sharding_constraint(tokens, named(self.mesh, batch_axes(self.mesh, batch_size)))}

    def rebalance(self, placement, *, num_nodes=1, optimizer=None):
        raise NotImplementedError("there is nothing to place")

    def split_network(self):
        return nnx.split(self)

    def prefill_and_stats(self, tokens_BS, lengths_B, cache, expert_ids_BSLK):
        S = tokens_BS.shape[1]
        kept_BS = jnp.where(jnp.arange(S) < lengths_B[:, None], tokens_BS, -1)
        cache = {"tokens": cache["tokens"].at[:, :S].set(kept_BS)}
        return self._logits(cache, lengths_B), cache, ()

    def decode_and_stats(self, tokens_B, positions_B, cache, active_B, expert_ids_BLK):
        cache = {"tokens": cache["tokens"].at[jnp.arange(len(tokens_B)), positions_B].set(tokens_B)}
        # What an inactive row gives must not matter, so give it nonsense.
        return jnp.where(active_B[:, None], self._logits(cache, positions_B + 1), 0.0), cache, ()

    def _logits(self, cache, lengths_B):
        history_BL = cache["tokens"]
        places_L = jnp.arange(history_BL.shape[1])
        terms_BL = (history_BL + 2) * (places_L + 7) % 101
        state_B = jnp.sum(jnp.where(places_L < lengths_B[:, None], terms_BL, 0), axis=1) + self.offset[...]
        V = self.config.vocab_size
        return ((jnp.arange(V) * 11 + state_B[:, None] * 5) % V).astype(jnp.float32)


def next_logits(history: list[int], offset: int = 0) -> np.ndarray:
    """What the fake's logits are after a history."""
    state = sum((token + 2) * (place + 7) % 101 for place, token in enumerate(history)) + offset
    return ((np.arange(VOCAB) * 11 + state * 5) % VOCAB).astype(np.float32)


def expected(prompt: list[int], count: int, offset: int = 0) -> list[int]:
    """The fake's greedy continuation."""
    history = list(prompt)
    for _ in range(count):
        history.append(int(next_logits(history, offset).argmax()))
    return history[len(prompt) :]

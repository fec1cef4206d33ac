"""Tied embeddings: the output projection that a checkpoint has where config.json says that it is the embedding."""

import dataclasses
import re
from typing import NamedTuple

from jaxmoe.checkpoint.formats import Checkpoint, TensorInfo
from jaxmoe.checkpoint.mapping.ignore import IgnoreRule
from jaxmoe.config import DecoderConfig
from jaxmoe.models import Family

TIED_RULE = "tied output projection"


class Settled(NamedTuple):
    """The two ends of a model, settled by `settle_tied`.

    Attributes:
        checkpoint: tensors, with the embedding under its own name.
        config: config with the tie that the checkpoint has.
        rules: a rule for a tensor that is the embedding again; none where there is no such tensor.
    """

    checkpoint: Checkpoint
    config: DecoderConfig
    rules: tuple[IgnoreRule, ...]


def settle_tied(checkpoint: Checkpoint, family: Family, config: DecoderConfig) -> Settled:
    """Find the two ends of a tied model in a checkpoint, which may have either or both, without reading them.

    * Only the output projection: it is the embedding too.
    * Both, and they are the same bytes, as in every ``.bin`` file: the second is ignored by the rule `TIED_RULE`.
    * Both, each with bytes of its own: the model is loaded as one that is not tied. That is right whether or not they
      are equal. transformers compares them and leaves them untied where they differ.

    Args:
        checkpoint: tensors under the family's names.
        family: family of the model.
        config: config as config.json has it. Where it does not tie, all stays as it is.
    """
    rules: tuple[IgnoreRule, ...] = ()
    output, embedding = (_find(checkpoint, family, path) for path in ("lm_head.weight", "embed.weight"))
    if config.tie_word_embeddings and output is not None:
        if embedding is None:
            name = family.tensors["embed.weight"][0]
            checkpoint = checkpoint.renamed(lambda old: name if old == output.name else old)
        elif dataclasses.replace(output, name=embedding.name) == embedding:
            rules = (IgnoreRule(name=TIED_RULE, pattern=re.escape(output.name)),)
        else:
            config = dataclasses.replace(config, tie_word_embeddings=False)
    return Settled(checkpoint, config, rules)


def _find(checkpoint: Checkpoint, family: Family, path: str) -> TensorInfo | None:
    return next((checkpoint.tensors[name] for name in family.tensors[path] if name in checkpoint.tensors), None)

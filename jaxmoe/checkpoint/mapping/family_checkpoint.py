"""A checkpoint as its family maps it: the one way from files to parameters.

Loading, saving, converting, moving and inspecting all start here. No value is read. A tensor passes five stations:

1. `open_checkpoint` finds it in the header of a file: its dtype, its shape, the place of its bytes. Those that are the
   parts of one quantized weight become one tensor with the shape of that weight (`decode_checkpoint`).
2. `Family.text_name` gives it the name that it has in a text model, where it comes from a multimodal one, and `own_part`
   leaves it the rows that are the model's. Where the name is none of the family's, `find_prefix` and `find_other_experts`
   look for what other tools made of these.
3. `settle_tied` decides, where it is one end of a tied model, whether both ends are one tensor.
4. `FamilyCheckpoint.onto` finds the regions of parameters that it fills (`Block`).
5. `MappedCheckpoint.check` proves that all of it is used, or that a named rule ignores it, and that every parameter is
   filled exactly once.

After that a load plan turns blocks into reads, a conversion into the values of other tensors, and a summary into counts.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmoe.checkpoint.errors import CheckpointError, Problems
from jaxmoe.checkpoint.formats import (
    Checkpoint,
    DecodedCheckpoint,
    DecodedTensor,
    StoredCheckpoint,
    decode_checkpoint,
    is_stored,
    open_checkpoint,
    read_stored,
)
from jaxmoe.checkpoint.mapping.blocks import Block, chunk_blocks, whole_tensor_blocks
from jaxmoe.checkpoint.mapping.ignore import IgnoreRule
from jaxmoe.checkpoint.mapping.mapped import MappedCheckpoint
from jaxmoe.checkpoint.mapping.names import layer_index, model_blocks, tensor_names, wanted_names
from jaxmoe.checkpoint.mapping.other_experts import find_other_experts
from jaxmoe.checkpoint.mapping.own_part import own_part
from jaxmoe.checkpoint.mapping.prefixes import find_prefix
from jaxmoe.checkpoint.mapping.tied import settle_tied
from jaxmoe.config import DecoderConfig, MoEConfig
from jaxmoe.layers import ParamSpec
from jaxmoe.models import ExpertTensors, Family, Form, read_model_config
from jaxmoe.quant import QuantizationError

UNREAD_RULE = "scales that no weight depends on"
PREDICTING_RULE = "layers for multi-token prediction, stored beside the model's"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyCheckpoint:
    """A checkpoint under the names of its family, and what its family says of it.

    Attributes:
        checkpoint: tensors under the names of `Family.tensors` and `Family.experts`.
        family: family of the model.
        config: config of the model, tied where the checkpoint is.
        rules: rules for tensors that the model does not need.
        untied: whether config.json ties the embedding and the output projection, and the checkpoint has bytes for each.
        formats: {quantized format and its settings: weights that have it}.
        notes: sentences about the quantization, for a report.
        renamed: {rule: tensors that have other names than the family gives them}.
        other_experts: names of the routed experts in the checkpoint, where they are none of the family's.
        stored: the same where it has a model's parameters as Orbax arrays, and not tensors under names of the family.
    """

    checkpoint: Checkpoint
    family: Family
    config: DecoderConfig
    rules: tuple[IgnoreRule, ...]
    untied: bool
    formats: Mapping[str, int]
    notes: tuple[str, ...]
    renamed: Mapping[str, int]
    other_experts: ExpertTensors | None
    stored: StoredCheckpoint | None = None

    @classmethod
    def open(cls, path: Path, *, mtp: bool = False) -> "FamilyCheckpoint":
        """Open a checkpoint to read weights from, a directory or one file with its directory's config.json.

        Args:
            path: checkpoint.
            mtp: whether its layers for multi-token prediction are a part of the model.

        Raises:
            FileNotFoundError: there is no checkpoint, or a part of it is missing.
            ValueError: config.json is of no known family, or a file breaks a rule, or the checkpoint is quantized in a way
                that is not decoded, or `mtp` and it has no such layers.
        """
        family, config = read_model_config(path, mtp=mtp)
        if is_stored(path):
            return cls.of_stored(read_stored(path), family, config)
        return cls.of(decode_checkpoint(open_checkpoint(path)), family, config)

    @classmethod
    def of(cls, decoded: DecodedCheckpoint, family: Family, config: DecoderConfig) -> "FamilyCheckpoint":
        """Bring an opened checkpoint under the names of a family.

        Args:
            decoded: checkpoint from `decode_checkpoint`.
            family: family of its model.
            config: config of its model, as config.json has it.

        Raises:
            CheckpointError: two tensors would have one name.
        """
        inner = own_part(decoded.checkpoint, family, config).renamed(family.text_name)
        prefix = find_prefix(inner.tensors, family, config)
        settled = settle_tied(inner.renamed(prefix.rename), family, config)
        _check_mtp(settled.checkpoint, family, settled.config)
        other = find_other_experts(settled.checkpoint.tensors, family, config)
        own = [IgnoreRule(name=name, pattern=pattern) for name, pattern in family.ignored_in(settled.config).items()]
        names = frozenset([prefix.rename(family.text_name(name)) for name in decoded.unread])
        unread = [IgnoreRule(name=UNREAD_RULE, names=names)]
        renamed = {prefix.rule: sum(prefix.rename(name) != name for name in inner.tensors)} if prefix.rule else {}
        if other is not None:
            renamed[other.rule] = _count_experts(settled.checkpoint.tensors, other.names, family, config)
        return cls(
            checkpoint=settled.checkpoint,
            family=family,
            config=settled.config,
            rules=(*own, *prefix.ignored, *settled.rules, *(unread if decoded.unread else ())),
            untied=settled.config.tie_word_embeddings != config.tie_word_embeddings,
            formats=decoded.formats,
            notes=decoded.notes,
            renamed=renamed,
            other_experts=None if other is None else other.names,
        )

    @classmethod
    def of_stored(cls, stored: StoredCheckpoint, family: Family, config: DecoderConfig) -> "FamilyCheckpoint":
        """Take a checkpoint of Orbax arrays, whose names and order are those of a model's parameters.

        Args:
            stored: checkpoint from `read_stored`.
            family: family of its model.
            config: config of its model, as config.json has it.

        Raises:
            CheckpointError: layers for multi-token prediction are asked for, and it was converted without.
        """
        if len(config.layers) > config.num_main_layers and not stored.mtp:
            raise CheckpointError(
                f"{stored.checkpoint.path}: mtp=True (--mtp, --speculate mtp) loads layers for multi-token prediction, and "
                "this checkpoint was converted without; load it without, or convert the original with mtp=True (--mtp)"
            )
        behind = [path for path in stored.chunks if (layer_index(path) or 0) >= config.num_main_layers]
        formats = Counter(tensor.form for tensor in stored.checkpoint.tensors.values())
        names = frozenset([tensor.name for path in behind for _, tensor in stored.chunks[path]])
        rules = (IgnoreRule(name=PREDICTING_RULE, names=names),) if len(config.layers) == config.num_main_layers else ()
        return cls(
            checkpoint=stored.checkpoint,
            family=family,
            config=dataclasses.replace(config, tie_word_embeddings=stored.tied),
            rules=rules,
            untied=False,
            formats={form: count for form, count in formats.items() if form != "plain"},
            notes=(),
            renamed={},
            other_experts=None,
            stored=stored,
        )

    def decoding_to(self, dtype: np.dtype) -> "FamilyCheckpoint":
        """The same with quantized weights whose values are given in `dtype`, and not in float32 as they are computed."""
        tensors = {
            name: dataclasses.replace(tensor, dtype=dtype) if isinstance(tensor, DecodedTensor) else tensor
            for name, tensor in self.checkpoint.tensors.items()
        }
        return dataclasses.replace(self, checkpoint=dataclasses.replace(self.checkpoint, tensors=tensors))

    def onto(self, specs: Mapping[str, ParamSpec], *, form: Form | None = None) -> "MappedCheckpoint":
        """Map the tensors to the parameters of a model, on whichever mesh.

        Args:
            specs: parameters of a model of `config`, by path.
            form: form that experts are taken to have; None for the one that is there.

        Raises:
            CheckpointError: the experts of a layer are there in both forms, or in none; or a quantized weight has parts of
                another shape.
        """
        if self.stored is not None:
            chunks, blocks = self.stored.chunks, list[Block]()
            for path, spec in specs.items():
                # Of a parameter that is not there the check says so.
                blocks += chunk_blocks(spec, chunks[path]) if path in chunks else whole_tensor_blocks(spec, path)
            return MappedCheckpoint.of(self.checkpoint, specs.values(), blocks, self.rules)
        names = self.checkpoint.tensors if form is None else wanted_names(specs, self.family, form)
        family = self.family
        if form is None and self.other_experts is not None:
            family = dataclasses.replace(family, renamed_experts=self.other_experts)
        try:
            blocks = list(model_blocks(specs, family, names))
        except CheckpointError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {error}") from None
        return MappedCheckpoint.of(_bound(self.checkpoint, blocks), specs.values(), blocks, self.rules)


def _check_mtp(checkpoint: Checkpoint, family: Family, config: DecoderConfig) -> None:
    """Refuse a checkpoint that lacks layers for multi-token prediction which are to be loaded.

    Raises:
        CheckpointError: names the first tensor that is missing.
    """
    for layer in range(config.num_main_layers, len(config.layers)):
        names = tensor_names(family, f"layers.{layer}.prediction.w_in")
        if not any(name in checkpoint.tensors for name in names):
            raise CheckpointError(
                f"{checkpoint.path}: mtp=True (--mtp, --speculate mtp) loads layers for multi-token prediction, here "
                f"{len(config.layers) - config.num_main_layers}, and the checkpoint has no tensor {names[0]!r} "
                "(transformers leaves these layers out when it saves a model); load it without, or take the files that the "
                "publisher released"
            )


def _count_experts(tensors: Collection[str], names: ExpertTensors, family: Family, config: DecoderConfig) -> int:
    """Number of tensors of routed experts under these names."""
    found = 0
    for layer in config.moe_layers:
        own, moe = family.experts_in_layer(names, layer), config.layers[layer].feed_forward
        assert isinstance(moe, MoEConfig)
        for expert in range(moe.num_experts):
            found += sum(name in tensors for name in own.per_expert(expert) + own.per_expert_biases(expert))
        found += sum(name in tensors for name in own.fused)
    return found


def _bound(checkpoint: Checkpoint, blocks: Sequence[Block]) -> Checkpoint:
    """The same with quantized weights of the shapes that a model's blocks expect, which headers may leave open.

    Raises:
        CheckpointError: the parts of one are of another shape.
    """
    shapes = {block.tensor: block.tensor_shape for block in blocks if block.tensor is not None}
    problems, tensors = Problems(str(checkpoint.path)), dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, DecodedTensor) and shapes.get(name, tensor.shape) != tensor.shape:
            try:
                tensors[name] = tensor.bound(shapes[name])
            except QuantizationError as error:
                problems.add(str(error))
    problems.raise_if_any()
    return dataclasses.replace(checkpoint, tensors=tensors)

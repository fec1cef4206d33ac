"""What a model family adds to the shared decoder: how its config reads, and what its tensors are called."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertTensors:
    """Where routed experts are in a checkpoint, in the two layouts transformers writes.

    Every name has ``{layer}`` in it until `for_layer` fills it in, the per-expert ones ``{expert}``
    too. Which layout a layer has is decided by the names that exist.

    Attributes:
        gate, up, down: one 2-D tensor per expert, [F, D], [F, D] and [D, F].
        fused_gate_up: all experts in one tensor [E, 2 F, D], the rows of gate before those of up.
        fused_down: all experts in one tensor [E, D, F].
    """

    gate: str
    up: str
    down: str
    fused_gate_up: str
    fused_down: str

    def for_layer(self, layer: int) -> "ExpertTensors":
        """The names of layer `layer`."""
        names = {name: template.replace("{layer}", str(layer)) for name, template in dataclasses.asdict(self).items()}
        return ExpertTensors(**names)

    def per_expert(self, expert: int) -> tuple[str, str, str]:
        """Names of one expert's gate, up and down tensors."""
        gate, up, down = (name.replace("{expert}", str(expert)) for name in (self.gate, self.up, self.down))
        return gate, up, down

    @property
    def fused(self) -> tuple[str, str]:
        """Names of the fused gate_up and down tensors."""
        return self.fused_gate_up, self.fused_down


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Attributes:
        model_type: its name in config.json.
        read_config: from config.json's dictionary to the decoder's config.
        tensors: parameter path -> the checkpoint's names for it, the first that exists is used;
            ``{layer}`` stands for the layer's index in both. Parameters a model does not have
            (biases, a tied output projection) are left out of it.
        experts: names of the routed experts.
        ignored: rule name -> regular expression (of whole tensor names) for tensors that are
            rightly in a checkpoint and not in the model.
        spellings: parts of names that mean the same, where transformers calls a module otherwise than files do: an
            adapter's names are looked for in each spelling.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    tensors: Mapping[str, tuple[str, ...]]
    experts: ExpertTensors
    ignored: Mapping[str, str]
    spellings: tuple[tuple[str, ...], ...] = ()


def llama_tensors(feed_forward: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The names that most families share, which Llama set, with the family's own for the feed-forward part."""
    attention = {
        f"layers.{{layer}}.attention.{kind}_{part}": (f"model.layers.{{layer}}.self_attn.{part}_proj.{suffix}",)
        for part in "qkvo"
        for kind, suffix in (("w", "weight"), ("b", "bias"))
    }
    return {
        "embed.weight": ("model.embed_tokens.weight",),
        **attention,
        "layers.{layer}.attention.q_norm": ("model.layers.{layer}.self_attn.q_norm.weight",),
        "layers.{layer}.attention.k_norm": ("model.layers.{layer}.self_attn.k_norm.weight",),
        "layers.{layer}.attention_norm.weight": ("model.layers.{layer}.input_layernorm.weight",),
        "layers.{layer}.feed_forward_norm.weight": ("model.layers.{layer}.post_attention_layernorm.weight",),
        **feed_forward,
        "norm.weight": ("model.norm.weight",),
        "lm_head.weight": ("lm_head.weight",),
    }


# Buffers that old exporters wrote beside the weights.
ROTARY_BUFFERS = {"rotary buffers": r".*\.rotary_emb\.inv_freq"}

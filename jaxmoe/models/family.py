"""The contract of a model family: the reading of its config, and the names of its tensors."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from jaxmoe.config import DecoderConfig, LayerConfig, MLAConfig, MoEConfig, MTPConfig
from jaxmoe.models.wrappers import Wrapper

ExpertLayout = Literal[
    "per_expert",
    "per_expert_gate_up",
    "fused",
    "fused_transposed",
    "fused_interleaved",
    "stacked",
    "stacked_rows",
]
"""The dims of the tensors of a layer's experts: E experts of width F, in a model of width D.

* "per_expert": a tensor each for every expert, gate and up [F, D], down [D, F];
* "per_expert_gate_up": gate and up of an expert in one tensor [2 F, D], down [D, F]; no family here has it;
* "fused": gate_up [E, 2 F, D], gate's rows before up's; down [E, D, F];
* "fused_transposed": gate_up [E, D, 2 F], gate's columns before up's; down [E, F, D];
* "fused_interleaved": gate_up [E, D, 2 F], gate in even columns, up in odd ones; down [E, F, D];
* "stacked": gate and up [E, F, D]; down [E, D, F];
* "stacked_rows": gate, up and down [E F, D], the last one turned, as DBRX has them.
"""

Form = Literal["per_expert", "fused"]
"""The two ways in which transformers writes experts: tensors of each one, or tensors of all in one of the other layouts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertTensors:
    """Names of the routed experts in a checkpoint: one tensor each per expert, or fused, all experts in one tensor.

    Every name has ``{layer}`` in it, or what else `in_layer` knows, until `for_layer` fills it in, the per-expert ones
    ``{expert}`` too. A family has names for one of the two ways or for both, and then the names that exist decide
    which of them a layer uses. Orders of dims that share their names are told apart by the family alone.

    Attributes:
        gate, up, down: names of 2-D tensors, one per expert, [F, D], [F, D] and [D, F]; no `gate` where experts have none.
        fused_gate_up: name of a tensor of all experts' gate and up.
        fused_gate, fused_up: names of a tensor for each instead, in the stacked layouts; no gate where experts have none.
        fused_down: name of a tensor of all experts' down.
        fused_gate_up_bias, fused_down_bias: names of the biases that go with them.
        fused_gate_bias, fused_up_bias: the same where gate and up are a tensor each.
        fused_layout: layout of the fused tensors, one of all experts; see `ExpertLayout`.
        either_way: whether fused tensors may be (out, in) or (in, out); their shapes tell.
    """

    gate: str | None = None
    up: str | None = None
    down: str | None = None
    fused_gate_up: str | None = None
    fused_gate: str | None = None
    fused_up: str | None = None
    fused_down: str | None = None
    fused_gate_up_bias: str | None = None
    fused_gate_bias: str | None = None
    fused_up_bias: str | None = None
    fused_down_bias: str | None = None
    fused_layout: ExpertLayout = "fused"
    either_way: bool = False

    def for_layer(self, layer: int) -> "ExpertTensors":
        """Fill in the layer's index."""
        return self.map(lambda name: in_layer(name, layer))

    def map(self, change: Callable[[str], str]) -> "ExpertTensors":
        """Change every name."""
        names = {key: name for key, name in dataclasses.asdict(self).items() if isinstance(name, str)}
        changed: dict[str, Any] = {key: change(name) for key, name in names.items() if key != "fused_layout"}
        return dataclasses.replace(self, **changed)

    def per_expert(self, expert: int) -> tuple[str, ...]:
        """List the names of one expert's gate, if it has one, up and down tensors; () if the family has none."""
        return tuple([name.replace("{expert}", str(expert)) for name in (self.gate, self.up, self.down) if name])

    def per_expert_biases(self, expert: int) -> tuple[str, ...]:
        """List the names of the biases that go with the tensors of one expert."""
        return tuple([f"{name.removesuffix('.weight')}.bias" for name in self.per_expert(expert)])

    def are_in(self, tensors: Collection[str]) -> bool:
        """Tell whether a checkpoint has these experts, by the tensors of gate or up; down has one name in several forms."""
        return any(name in tensors for name in (*self.fused_weights[:1], *self.per_expert(0)[:1]))

    @property
    def fused_weights(self) -> tuple[str, ...]:
        """Names of the fused gate_up tensor, or of gate, if there is one, and up, and of the down tensor."""
        names = (self.fused_gate_up, self.fused_gate, self.fused_up, self.fused_down)
        return tuple([name for name in names if name])

    @property
    def fused_biases(self) -> tuple[str, ...]:
        """Names of the biases of gate and up, together or apart, and of down."""
        names = (self.fused_gate_up_bias, self.fused_gate_bias, self.fused_up_bias, self.fused_down_bias)
        return tuple([name for name in names if name])

    @property
    def fused(self) -> tuple[str, ...]:
        """Names of all fused tensors; () if the family has none."""
        return self.fused_weights + self.fused_biases


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPTensors:
    """The layers for multi-token prediction of a family: their configs, and the names of their tensors.

    A name has ``{layer}``, the index behind the model's own layers, or ``{mtp}``, the index among these alone.

    Attributes:
        layers: function of config.json and the decoder's config to the configs of these layers.
        tensors: names of what `jaxmoe.models.mtp.PredictionInput` and the last norm are made of, as in `Family.tensors`.
        layer: beginning of the names of a layer's tensors, which the family's own names begin with "model.layers.{layer}".
        renamed: pairs of a part of a family's own name and what stands there instead in these layers.
        copies: regular expression for tensors that are the model's embedding and output projection again.
        passes: hidden state that the next layer starts from, see `MTPConfig`.
    """

    layers: Callable[[Mapping[str, Any], DecoderConfig], Sequence[LayerConfig]]
    tensors: Mapping[str, tuple[str, ...]]
    layer: str = "model.layers.{layer}"
    renamed: tuple[tuple[str, str], ...] = ()
    copies: str | None = None
    passes: Literal["stream", "normed", "main"] = "stream"

    def name(self, name: str) -> str:
        """Give the name that a family's own name, with ``{layer}`` in it, has in one of these layers."""
        own = "model.layers.{layer}"
        if not name.startswith(own):
            return name
        for old, new in self.renamed:
            name = name.replace(old, new)
        return self.layer + name.removeprefix(own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Attributes:
        model_type: name of the family in config.json.
        read_config: function from the dictionary of config.json to the decoder's config.
        tensors: parameter path -> the checkpoint's names for it, the first that exists is used;
            ``{layer}`` stands for the layer's index in both, see `in_layer`. Parameters a model does not have
            (biases, a tied output projection) are left out of it. Parameters of one name are one
            tensor, the rows of each after those of the one before (queries, keys and values). A name with ``{part}`` is
            of several tensors, which have the rows of a parameter one after another (`ParamSpec.parts`).
        experts: names of the routed experts.
        renamed_experts: names that a checkpoint may have for them instead, where the fused tensors have two spellings.
        ignored: rule name -> regular expression (of whole tensor names) for tensors that are
            rightly in a checkpoint and not in the model; ``{mtp_layers}`` stands for the indices of the
            multi-token-prediction layers, 61|62, and ``{zero_experts}`` for the numbers of zero experts.
        written: form of the experts that is written whichever is asked for, where transformers reads one only; None for
            either. Both are read here.
        padded_experts: regular expression of whole names of fused tensors that have rows for zero experts too, behind those
            of the experts; None where there are none.
        wrapper: multimodal model that a checkpoint is of; None where it is of the text model alone.
        mtp: layers for multi-token prediction; None for a family whose layers for it are not known here, or that has none.
        mtp_from: index of the first of them, where they are loaded (`with_mtp`); None where they are not.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    tensors: Mapping[str, tuple[str, ...]]
    experts: ExpertTensors
    ignored: Mapping[str, str]
    renamed_experts: ExpertTensors | None = None
    written: Form | None = None
    padded_experts: str | None = None
    wrapper: Wrapper | None = None
    mtp: MTPTensors | None = None
    mtp_from: int | None = None

    def read(self, config_json: Mapping[str, Any], *, mtp: bool = False) -> tuple["Family", DecoderConfig]:
        """Read a config.json; with `mtp` the model has its layers for multi-token prediction, see `with_mtp`."""
        config = self.read_config(config_json)
        return self.with_mtp(config_json, config) if mtp else (self, config)

    def with_mtp(self, config_json: Mapping[str, Any], config: DecoderConfig) -> tuple["Family", DecoderConfig]:
        """Add the layers for multi-token prediction to a model's config, and their names to the family.

        Args:
            config_json: dictionary that `config` was read from.
            config: config of the model without these layers.

        Raises:
            ValueError: the family's are not known, or config.json says that there is none.
        """
        if self.mtp is None:
            raise ValueError(
                "mtp=True loads layers for multi-token prediction, which jaxmoe knows of some families, and "
                f"{self.model_type} is none of them; load it without"
            )
        layers = tuple(self.mtp.layers(config_json, config))
        if not layers:
            raise ValueError(
                "mtp=True loads layers for multi-token prediction, and config.json says that the model has none "
                "(num_nextn_predict_layers is 0); load it without"
            )
        mtp = MTPConfig(num_layers=len(layers), passes=self.mtp.passes)
        family = dataclasses.replace(
            self, tensors={**self.tensors, **self.mtp.tensors}, mtp_from=config.num_main_layers
        )
        return family, dataclasses.replace(config, layers=config.layers + layers, mtp=mtp)

    def name_in_layer(self, name: str, layer: int) -> str:
        """Fill a layer's index into one of the names, for a layer for multi-token prediction as `MTPTensors` says."""
        if self.mtp is None or self.mtp_from is None or layer < self.mtp_from:
            return in_layer(name, layer)
        filled = self.mtp.name(name).replace("{layer}", str(layer))
        return filled.replace("{mtp}", str(layer - self.mtp_from))

    def experts_in_layer(self, names: ExpertTensors, layer: int) -> ExpertTensors:
        """Fill a layer's index into names of experts, as `name_in_layer` does."""
        return names.map(lambda name: self.name_in_layer(name, layer))

    def ignored_in(self, config: DecoderConfig) -> dict[str, str]:
        """Fill in `ignored` for a model of that config, with the rules of a multimodal model around it."""
        first = config.num_main_layers
        behind = "|".join(map(str, range(first, first + config.num_mtp_layers)))
        rules = dict(self.ignored)
        if self.mtp is not None and config.mtp is not None:
            del rules[MTP_RULE]
            if self.mtp.copies is not None:
                rules["embedding and output projection again"] = self.mtp.copies
        moes = [moe for layer in config.layers if isinstance(moe := layer.feed_forward, MoEConfig)]
        zero = sorted({expert for moe in moes for expert in range(moe.num_experts, moe.num_choices)})
        filled = {"{mtp_layers}": behind, ZERO_EXPERTS: "|".join(map(str, zero))}
        own = rules
        for place, numbers in filled.items():
            own = {name: pattern.replace(place, numbers) for name, pattern in own.items()}
        return {**own, **(self.wrapper.ignored_in(config) if self.wrapper else {})}

    def text_name(self, name: str) -> str:
        """Give the name that `tensors` has for a tensor of a checkpoint; see `Wrapper.text_name`."""
        return self.wrapper.text_name(name) if self.wrapper else name

    def stored_names(self, name: str) -> list[str]:
        """Give the names that a tensor of `tensors` may have in a checkpoint, the usual one first."""
        return [*(self.wrapper.stored_names(name) if self.wrapper else ()), name]


def in_layer(name: str, layer: int) -> str:
    """Fill in the place of a layer: its index, or that of the pair that it is in and its half of that.

    Example:
        >>> in_layer("model.layers.{pair}.self_attn.{half}.o_proj.weight", 5)
        'model.layers.2.self_attn.1.o_proj.weight'
    """
    places = {"{layer}": layer, "{pair}": layer // 2, "{half}": layer % 2}
    for place, index in places.items():
        name = name.replace(place, str(index))
    return name


def llama_tensors(feed_forward: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Make the names that most families share, which Llama set, with the family's own for the feed-forward part."""
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


def mlp_tensors(path: str, module: str) -> dict[str, tuple[str, ...]]:
    """Make the usual names of a dense MLP's projections, for the parameters at `path` of a layer and its `module`."""
    return {
        f"layers.{{layer}}.{path}.{kind}_{part}": (f"model.layers.{{layer}}.{module}.{part}_proj.{suffix}",)
        for part in ("gate", "up", "down")
        for kind, suffix in (("w", "weight"), ("b", "bias"))
    }


# The names that most families give their experts.
MLP_EXPERTS = ExpertTensors(
    gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
    fused_down="model.layers.{layer}.mlp.experts.down_proj",
)

# The same as Mixtral has them; transformers 5 names the block "mlp" where it writes them fused.
BLOCK_SPARSE_EXPERTS = ExpertTensors(
    gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
    fused_down="model.layers.{layer}.mlp.experts.down_proj",
)

# The parts of a Mamba-2 layer. The projection in is one tensor, and the convolution another; their parts lie in this order.
MAMBA2_NAMES = {
    **{
        f"{kind}_in_{part}": f"in_proj.{name}"
        for kind, name in (("w", "weight"), ("b", "bias"))
        for part in ("z", "x", "b", "c", "dt")
    },
    **{f"conv_{part}": "conv1d.weight" for part in "xbc"},
    **{f"b_conv_{part}": "conv1d.bias" for part in "xbc"},
    "a_log": "A_log",
    "dt_bias": "dt_bias",
    "skip": "D",
    "out_norm": "norm.weight",
    "w_out": "out_proj.weight",
    "b_out": "out_proj.bias",
}

# Buffers that old exporters wrote beside the weights.
ROTARY_BUFFERS = {"rotary buffers": r".*\.rotary_emb\.inv_freq"}

MTP_RULE = "multi-token prediction"

# Stands in a rule for the numbers of zero experts, which are behind those of the experts.
ZERO_EXPERTS = "{zero_experts}"

# Layers that predict the tokens after the next one stand behind the model's own.
MTP_LAYERS = {MTP_RULE: r"model\.layers\.({mtp_layers})\..*"}


def last_moe_layer_again(config_json: Mapping[str, Any], config: DecoderConfig) -> list[LayerConfig]:
    """Make layers for multi-token prediction like the model's last one with routed experts, with an indexer of their own."""
    del config_json
    last = config.layers[config.moe_layers[-1] if config.moe_layers else -1]
    if isinstance(last.attention, MLAConfig) and last.attention.indexer is not None:
        indexer = dataclasses.replace(last.attention.indexer, reuses=False)
        last = dataclasses.replace(last, attention=dataclasses.replace(last.attention, indexer=indexer))
    return [last] * config.num_mtp_layers


# The names that DeepSeek-V3 set. A checkpoint has the embedding and the output projection in each of these layers again,
# which are shared with the model's (DeepSeek-AI 2024, arXiv:2412.19437, section 2.2).
MTP_BEHIND = MTPTensors(
    layers=last_moe_layer_again,
    tensors={
        "layers.{layer}.prediction.embed_norm.weight": ("model.layers.{layer}.enorm.weight",),
        "layers.{layer}.prediction.hidden_norm.weight": ("model.layers.{layer}.hnorm.weight",),
        "layers.{layer}.prediction.w_in": ("model.layers.{layer}.eh_proj.weight",),
        "layers.{layer}.prediction.out_norm.weight": ("model.layers.{layer}.shared_head.norm.weight",),
    },
    copies=r"model\.layers\.({mtp_layers})\.(embed_tokens|shared_head\.head)\.weight",
)

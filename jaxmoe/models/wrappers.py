"""Multimodal models around a text family: the place of the text part, and the parts beside it.

A wrapper's ``config.json`` has the text model's own config as ``text_config``, and its checkpoint has the text model's
tensors behind a prefix. The text part loads as the family it is; the rest is ignored by rules that have names. A
wrapper is an entry of `WRAPPERS`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxmoe.config import DecoderConfig, MoEConfig
from jaxmoe.models.ernie4_5_vl import VISION_EXPERTS, text_settings
from jaxmoe.rotary import rope_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper:
    """One multimodal model type.

    Attributes:
        model_type: name of the multimodal model in config.json.
        text: family of its text part, where ``text_config`` names none or one of `aliases`.
        aliases: model types of a text part that is `text` under another name.
        within: keys of config.json on the way to the config that has ``text_config``; () for config.json itself.
        settings: settings of config.json that the text part always has and that are a choice in `text`.
        usual: settings of the text part where its config does not give them, which are others in `text`.
        architecture: class of transformers for the text part alone.
        prefixes: pairs of a prefix that names of the text part have in a checkpoint and the family's own; the first that
            fits counts.
        ignored: rule name -> regular expression (of whole tensor names) for tensors outside of the text part;
            ``{vision_experts}`` stands for as many numbers of experts behind the text part's.
        tied_by: config whose ``tie_word_embeddings`` counts, the one that the output projection belongs to.
        fused_either_way: whether fused experts may be (out, in) or (in, out); their shapes tell.
        flat: whether config.json may have the text part's settings beside its own, without a ``text_config``.
        spell: function from the text part's settings to those of `text`, where the two spell them otherwise; None where they
            do not.
        spellings: pairs of a part of a name and of the family's own for it, behind the prefix.
        turned: regular expression of whole names in the checkpoint of matrices that are stored (in, out).
        shared_rows: the same of tensors of two rows, of which the first is the text part's.
    """

    model_type: str
    text: str
    architecture: str
    prefixes: tuple[tuple[str, str], ...]
    ignored: Mapping[str, str]
    tied_by: Literal["wrapper", "text"] = "wrapper"
    aliases: tuple[str, ...] = ()
    within: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    usual: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fused_either_way: bool = False
    flat: bool = False
    spell: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    spellings: tuple[tuple[str, str], ...] = ()
    turned: str | None = None
    shared_rows: str | None = None

    def text_name(self, name: str) -> str:
        """Give the family's name for a tensor of the text part; any other name stays as it is.

        Example:
            >>> WRAPPERS["llama4"].text_name("language_model.model.norm.weight")
            'model.norm.weight'
        """
        for prefix, own in self.prefixes:
            if name.startswith(prefix):
                name = own + name.removeprefix(prefix)
                break
        for theirs, own in self.spellings:
            name = name.replace(theirs, own)
        return name

    def stored_names(self, name: str) -> list[str]:
        """Give the names that a tensor of the text part may have behind a prefix.

        Example:
            >>> WRAPPERS["llama4"].stored_names("model.norm.weight")
            ['language_model.model.norm.weight']
        """
        names = [prefix + name.removeprefix(own) for prefix, own in self.prefixes if name.startswith(own)]
        return names + [
            stored.replace(own, theirs) for theirs, own in self.spellings for stored in names if own in stored
        ]

    def ignored_in(self, config: DecoderConfig) -> dict[str, str]:
        """Fill in `ignored` for a text part of that config: the vision part's experts have numbers behind its own."""
        layers = [layer.feed_forward for layer in config.layers]
        sizes = {moe.num_experts for moe in layers if isinstance(moe, MoEConfig)}
        numbers = "|".join(str(expert) for size in sorted(sizes) for expert in range(size, 2 * size))
        return {name: pattern.replace(VISION_EXPERTS, numbers) for name, pattern in self.ignored.items()}

    def is_turned(self, name: str) -> bool:
        """Tell whether a tensor, by its name from before `text_name`, is a matrix that is stored (in, out)."""
        return self.turned is not None and re.fullmatch(self.turned, name) is not None

    def shares_rows(self, name: str) -> bool:
        """Tell whether a tensor, by its name from before `text_name`, has one row of the text part and one that is not."""
        return self.shared_rows is not None and re.fullmatch(self.shared_rows, name) is not None

    def parts(self, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Give the config of the multimodal model, and in it the text model's.

        Raises:
            ValueError: `config` has none of the text model.
        """
        found: Any = config
        for key in self.within:
            found = found.get(key) if isinstance(found, dict) else None
        text = found.get("text_config") if isinstance(found, dict) else None
        if text is None and self.flat:
            text = {name: value for name, value in config.items() if name not in ("model_type", "vision_config")}
        if not isinstance(text, dict):
            path = ".".join([*self.within, "text_config"])
            raise ValueError(f"the config.json of {self.model_type} has a {path}, with the sizes; it is {text!r}")
        return found, text

    def text_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Make the config.json that the text part would have on its own.

        Raises:
            ValueError: `config` has none of the text model.
        """
        multimodal, text = self.parts(config)
        # Special tokens and the dtype stand on either level; transformers looks at the outer one first.
        keys = ["dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"]
        if self.tied_by == "wrapper":
            keys.append("tie_word_embeddings")
        outer = {key: level[key] for level in (multimodal, config) for key in keys if level.get(key) is not None}
        given = rope_settings(text) | {key: value for key, value in text.items() if value is not None}
        text = {**text, **{key: value for key, value in self.usual.items() if key not in given}}
        text = text if self.spell is None else self.spell(text)
        own = text.get("model_type", self.text)
        model_type = self.text if own in self.aliases else own
        return {**text, **self.settings, **outer, "model_type": model_type, "architectures": [self.architecture]}


# Qwen3-Omni's thinker. For text alone the three parts of its rotary positions are one.
_QWEN3_OMNI_THINKER = Wrapper(
    model_type="qwen3_omni_moe_thinker",
    text="qwen3_moe",
    aliases=("qwen3_omni_moe_text",),
    usual={"norm_topk_prob": True, "rope_theta": 1e6},
    architecture="Qwen3MoeForCausalLM",
    prefixes=(("model.language_model.", "model."),),
    ignored={"vision part": r"(model\.)?visual\..*", "audio part": r"(model\.)?audio_tower\..*"},
)

# ERNIE-4.5-VL, as transformers 5 has it. As released all experts are in one list, those of the text part first.
_ERNIE4_5_VL = Wrapper(
    model_type="ernie4_5_vl_moe",
    text="ernie4_5_moe",
    aliases=("ernie4_5_vl_moe_text",),
    architecture="Ernie4_5_MoeForCausalLM",
    prefixes=(("model.language_model.", "model."),),
    ignored={
        "vision part": r"(model\.)?(vision_model|vision_tower|resampler_model)\..*",
        "vision experts": rf"model\.layers\.\d+\.mlp\.(vision_moe\..*|gate\.weight_1|experts\.({VISION_EXPERTS})\..*)",
        "vision row": r"model\.layers\.\d+\.mlp\.moe_statics\.e_score_correction_bias\[rest\]",
    },
    spell=text_settings,
    spellings=((".mlp.text_moe.gate.", ".mlp.gate."), (".mlp.text_moe.experts.", ".mlp.experts.")),
    turned=r"model\.layers\.\d+\.mlp\.gate\.weight",
    shared_rows=r"model\.layers\.\d+\.mlp\.moe_statics\.e_score_correction_bias",
)

WRAPPERS: dict[str, Wrapper] = {
    wrapper.model_type: wrapper
    for wrapper in (
        Wrapper(
            model_type="gemma4",
            text="gemma4_text",
            architecture="Gemma4ForCausalLM",
            prefixes=(("model.language_model.", "model."),),
            ignored={
                "vision part": r"model\.(vision_tower|embed_vision)\..*",
                "audio part": r"model\.(audio_tower|embed_audio)\..*",
            },
        ),
        _ERNIE4_5_VL,
        # The same as released: settings of the text part are beside those of the model.
        dataclasses.replace(_ERNIE4_5_VL, model_type="ernie4_5_moe_vl", flat=True),
        # GLM-4.5V. For text alone the three parts of its rotary positions are one.
        Wrapper(
            model_type="glm4v_moe",
            text="glm4_moe",
            aliases=("glm4v_moe_text",),
            settings={"use_qk_norm": False},
            architecture="Glm4MoeForCausalLM",
            prefixes=(("model.language_model.", "model."),),
            ignored={"vision part": r"model\.visual\..*"},
        ),
        # GLM-5.3-Flash. transformers has no class for the text part alone that has an output projection.
        Wrapper(
            model_type="glm5_next",
            text="glm5_next_text",
            architecture="Glm5NextForConditionalGeneration",
            prefixes=(("model.language_model.", "model."),),
            ignored={"vision part": r"model\.visual\..*"},
            flat=True,
        ),
        # Kimi-K2.5. As transformers 5 saves it in that form, as it saves it in its own, and as released.
        Wrapper(
            model_type="kimi_k25",
            text="deepseek_v3",
            aliases=("kimi_k2",),
            architecture="DeepseekV3ForCausalLM",
            prefixes=(
                ("language_model.model.blocks.", "model.layers."),
                ("model.language_model.", "model."),
                ("language_model.", ""),
            ),
            ignored={"vision part": r"(model\.)?(vision_tower|mm_projector|multi_modal_projector)\..*"},
        ),
        # As released, which is the only form that there is.
        Wrapper(
            model_type="kimi_k3",
            text="kimi_linear",
            architecture="KimiLinearForCausalLM",
            prefixes=(("language_model.", ""),),
            ignored={"vision part": r"(vision_tower|mm_projector)\..*"},
        ),
        Wrapper(
            model_type="llama4",
            text="llama4_text",
            architecture="Llama4ForCausalLM",
            prefixes=(("language_model.", ""),),
            ignored={"vision part": r"(vision_model|multi_modal_projector)\..*"},
            tied_by="text",
        ),
        # As released, and as transformers 5 holds it.
        Wrapper(
            model_type="minimax_m3_vl",
            text="minimax_m3_vl_text",
            aliases=("minimax_m3",),
            architecture="MiniMaxM3VLForCausalLM",
            prefixes=(("model.language_model.", "model."), ("language_model.", "")),
            ignored={"vision part": r"(model\.)?(vision_tower|multi_modal_projector|patch_merge_mlp)\..*"},
        ),
        Wrapper(
            model_type="qwen3_5_moe",
            text="qwen3_5_moe_text",
            architecture="Qwen3_5MoeForCausalLM",
            prefixes=(("model.language_model.", "model."),),
            ignored={"vision part": r"model\.visual\..*"},
        ),
        Wrapper(
            model_type="qwen4_exp",
            text="qwen4_exp_text",
            architecture="Qwen4ExpForCausalLM",
            prefixes=(("model.language_model.", "model."),),
            ignored={"vision part": r"model\.visual\..*"},
        ),
        _QWEN3_OMNI_THINKER,
        # Qwen3-Omni as released, with the parts that speak.
        dataclasses.replace(
            _QWEN3_OMNI_THINKER,
            model_type="qwen3_omni_moe",
            within=("thinker_config",),
            # Not all of "thinker.model.": the other parts may be in it too.
            prefixes=(
                ("thinker.model.language_model.", "model."),
                *(
                    (f"thinker.{name}", name)
                    for name in ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
                ),
            ),
            ignored={
                "vision part": r"thinker\.(model\.)?visual\..*",
                "audio part": r"thinker\.(model\.)?audio_tower\..*",
                "speech part": r"(talker|code2wav)\..*",
            },
        ),
        # Qwen3-VL. For text alone the three parts of its rotary positions are one.
        Wrapper(
            model_type="qwen3_vl_moe",
            text="qwen3_moe",
            aliases=("qwen3_vl_moe_text",),
            settings={"norm_topk_prob": True},
            architecture="Qwen3MoeForCausalLM",
            prefixes=(("model.language_model.", "model."),),
            ignored={"vision part": r"model\.visual\..*"},
            fused_either_way=True,
        ),
        # Step-3.7-Flash. As released, where names of the text part have no prefix, and as transformers 5 holds it.
        Wrapper(
            model_type="step3p7",
            text="step3p5",
            architecture="Step3p5ForCausalLM",
            prefixes=(("model.language_model.", "model."),),
            ignored={
                "vision part": r"(model\.)?vision_model\..*",
                "projector": r"(model\.multi_modal_projector|vit_large_projector)\..*",
            },
            flat=True,
        ),
    )
}

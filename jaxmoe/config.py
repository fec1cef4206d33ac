"""Frozen configs of a decoder's parts, and the reading of a checkpoint's ``config.json``.

One config per component, each checked when it is made. A family's file turns the
dictionary that `read_config_json` returns into a `DecoderConfig`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxmoe.rotary import RopeConfig

_REQUIRED = object()


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name} is a whole number of at least 1; got {value!r}")


class TokenMixerConfig:
    """What the layers have in common through which a token sees the ones before it; see `jaxmoe.layers.mixers`."""

    def tp_faults(self, tp: int) -> list[str]:
        """What does not split over `tp` ranks, as "name=value"."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(TokenMixerConfig):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of one head.
        rope: rotary embedding of queries and keys; None for no position embedding.
        qk_norm: RMS-normalise queries and keys, per "head", over the "full" width of all heads, or per head without
            a weight, "unweighted"; None for not at all.
        qk_norm_after_rope: normalise after the rotation instead of before.
        bias: q, k and v projections have a bias.
        out_bias: the output projection has one.
        scale: of the scores; head_dim^-0.5 where None.
        clip: queries, keys and values are clipped to ±clip before the rotation, after a norm that is before it.
        sinks: each head has one more logit, whose probability is dropped (attention sinks).
        sliding_window: a token sees this many positions, itself included; None for all.
        chunk: positions are in chunks of this many, and a token sees its own chunk only; None for all.
        temperature: (floor, slope) with which queries far from the start are made longer, by
            slope · ln(1 + floor((position + 1) / floor)) + 1; None for not at all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    qk_norm: Literal["head", "full", "unweighted"] | None = None
    qk_norm_after_rope: bool = False
    bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    clip: float | None = None
    sinks: bool = False
    sliding_window: int | None = None
    chunk: int | None = None
    temperature: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"each key/value head serves the same number of query heads: num_heads={self.num_heads} is no "
                f"multiple of num_kv_heads={self.num_kv_heads}"
            )

    def tp_faults(self, tp: int) -> list[str]:
        """Heads are split over tp; with fewer key/value heads than ranks, ranks share one."""
        faults = [f"num_attention_heads={self.num_heads}"] if self.num_heads % tp else []
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            faults.append(f"num_key_value_heads={self.num_kv_heads} (neither divides the other)")
        return faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a router turns logits into experts and weights; see `jaxmoe.layers.router.route`.

    Attributes:
        score: from logits to scores, a name in `jaxmoe.layers.router.SCORES`.
        score_after_top_k: choose by the logits, and score only the K chosen ones.
        renormalize: divide the weights by their sum.
        sum_epsilon: added to that sum.
        min_sum: the sum is at least this.
        p_norm: divide the weights by their p-norm instead of their sum.
        logit_bias: the router's projection has a bias.
        correction_bias: a bias per expert that counts for the choice and not for the weight.
        num_groups: experts are in this many groups, of which `topk_groups` are eligible for a token.
        topk_groups: see `num_groups`.
        group_score: a group counts as its largest score, or as the sum of its two largest.
        scale: the weights are multiplied by it.
        sparsemixer: choose and weight by `jaxmoe.layers.router.sparsemixer` with this jitter; None for the above.
    """

    score: str = "softmax"
    score_after_top_k: bool = False
    renormalize: bool = True
    sum_epsilon: float = 0.0
    min_sum: float = 0.0
    p_norm: float | None = None
    logit_bias: bool = False
    correction_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    scale: float = 1.0
    sparsemixer: float | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "num_groups", "topk_groups")
        if self.topk_groups > self.num_groups:
            raise ValueError(f"topk_groups={self.topk_groups} is above num_groups={self.num_groups}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A dense MLP: down(act(gate x) · up x).

    Attributes:
        hidden_size: D.
        intermediate_size: width between the products.
        activation: a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
        bias: every projection has a bias.
        gated: False for down(act(up x)), without a gate.
    """

    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    bias: bool = False
    gated: bool = True

    def __post_init__(self) -> None:
        _check_positive(self, "hidden_size", "intermediate_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A layer of routed experts, each a gated MLP, and perhaps experts that serve every token.

    Attributes:
        num_experts: logical experts E.
        num_experts_per_tok: experts K that each token goes to.
        hidden_size: model width D.
        moe_intermediate_size: expert width F.
        activation: a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
        activation_limit: bound of a clamped activation, for those that have one.
        bias: every expert's projections have a bias.
        gated: False for down(act(up x)), without a gate.
        router: how experts are chosen and weighted.
        weights_on_input: the weight multiplies what goes into an expert instead of what comes out.
        shared: the experts that serve every token, as one MLP; None for none.
        shared_gate: the shared experts' output is multiplied by sigmoid(w · x).

    Raises:
        ValueError: a size below 1, K above E, or E not divisible by the router's groups.
    """

    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    activation: str = "silu"
    activation_limit: float | None = None
    bias: bool = False
    gated: bool = True
    router: RouterConfig = RouterConfig()
    weights_on_input: bool = False
    shared: MLPConfig | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"a token goes to at most all experts: num_experts_per_tok={self.num_experts_per_tok} is above "
                f"num_experts={self.num_experts}"
            )
        if self.num_experts % self.router.num_groups:
            raise ValueError(
                f"expert groups are of equal size: num_experts={self.num_experts} is no multiple of "
                f"num_groups={self.router.num_groups}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One decoder layer: attention or a recurrent layer in its place, then a dense MLP or routed experts.

    Either half may be None, for a layer that has only the other.
    """

    attention: TokenMixerConfig | None
    feed_forward: MLPConfig | MoEConfig | None

    def __post_init__(self) -> None:
        if self.attention is None and self.feed_forward is None:
            raise ValueError("a layer has attention, a feed-forward part or both; got neither")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A whole decoder, independent of the family it came from.

    Attributes:
        model_type: the family's name in ``config.json``.
        vocab_size: tokens the model knows.
        hidden_size: D.
        layers: one config per layer, first to last.
        norm_eps: epsilon of every norm.
        norm: "rms", "layer" with mean and bias, or "layer_without_bias".
        tie_word_embeddings: the output projection is the embedding.
        max_position_embeddings: positions the model was made for.
        dtype: the checkpoint's own dtype by name, None where it does not say.
        embedding_multiplier: the embedding is multiplied by it.
        residual_multiplier: what a layer's halves add to the residual stream is multiplied by it.
        logits_scaling: the logits are divided by it.
        lm_head_bias: the output projection has a bias.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str | None = None
    norm: Literal["rms", "layer", "layer_without_bias"] = "rms"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    lm_head_bias: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "vocab_size", "hidden_size", "max_position_embeddings")
        if not self.layers:
            raise ValueError("a decoder has at least one layer; got none (num_hidden_layers)")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.feed_forward, MoEConfig))


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint directory.

    Raises:
        FileNotFoundError: the directory or its config.json is not there.
        ValueError: it is no JSON object, or names no model_type.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"a checkpoint is a directory with config.json, as transformers' save_pretrained writes it: "
            f"{path} does not exist"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f'{path} names no model family: "model_type" is missing')
    return config


def pick(config: Mapping[str, Any], *names: str, default: Any = _REQUIRED) -> Any:
    """The value of the first of `names` that is present and not null.

    Checkpoints spell one setting in several ways; this is where the spellings meet.

    Raises:
        ValueError: none is there and no `default` is given.
    """
    for name in names:
        if config.get(name) is not None:
            return config[name]
    if default is _REQUIRED:
        raise ValueError(f"config.json needs one of {', '.join(names)}; none is there")
    return default


def read_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype's name in either spelling: ``"dtype": "bfloat16"`` or ``"torch_dtype": "torch.bfloat16"``."""
    name = pick(config, "dtype", "torch_dtype", default=None)
    return None if name is None else str(name).removeprefix("torch.")


def read_common(config: Mapping[str, Any], *, norm_eps: float) -> dict[str, Any]:
    """The fields of a `DecoderConfig` that most families spell alike; `norm_eps` is the family's default."""
    return {
        "model_type": config["model_type"],
        "vocab_size": pick(config, "vocab_size"),
        "hidden_size": pick(config, "hidden_size"),
        "norm_eps": pick(config, "rms_norm_eps", default=norm_eps),
        "tie_word_embeddings": pick(config, "tie_word_embeddings", default=False),
        "max_position_embeddings": pick(config, "max_position_embeddings"),
        "dtype": read_dtype(config),
    }

"""Frozen configs of a decoder's parts, and the reading of a checkpoint's ``config.json``.

One config per component, each checked when it is made. A family's file turns the
dictionary that `read_config_json` returns into a `DecoderConfig`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxmoe.rotary import RopeConfig

_REQUIRED = object()

RouterFunction = Callable[[Any, int], tuple[Any, Any]]
"""A choice of experts of one's own; see `RouterConfig.function`."""


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
        values_are_keys: the keys, before their norm and rotation, are the values too.
        v_norm: RMS-normalise the values per head, without a weight.
        zero_centred_norm: the norms of queries and keys, per "head", multiply by 1 + weight.
        output_gate: each query head has a gate beside it in the query projection; what the head gives is multiplied by
            the gate's sigmoid.
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
    values_are_keys: bool = False
    v_norm: bool = False
    zero_centred_norm: bool = False
    output_gate: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"each key/value head serves the same number of query heads: num_heads={self.num_heads} is no "
                f"multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.zero_centred_norm and self.qk_norm != "head":
            raise ValueError(
                f'the weights of a norm are around 0 with qk_norm="head" only; zero_centred_norm is set with '
                f"qk_norm={self.qk_norm!r}"
            )

    def tp_faults(self, tp: int) -> list[str]:
        """Heads are split over tp; with fewer key/value heads than ranks, ranks share one."""
        faults = [f"num_attention_heads={self.num_heads}"] if self.num_heads % tp else []
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            faults.append(f"num_key_value_heads={self.num_kv_heads} (neither divides the other)")
        return faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig(TokenMixerConfig):
    """Multi-head latent attention: the keys and values of all heads come from one small latent.

    DeepSeek-V2 (arXiv:2405.04434), section 2.1.

    Attributes:
        num_heads: heads; each has keys and values of its own, made from the latent.
        kv_rank: width of the latent that keys and values are made from.
        q_rank: width of the latent that queries are made from; None for queries straight from the activations.
        nope_head_dim: dims of a head's query and key that carry no position.
        v_head_dim: dims of a head's value.
        rope: rotary embedding of the dims that follow, all of which rotate; their key is one for all heads.
        scale: of the scores.
        bias: the projections into the latents and the output projection have a bias.
        latent_norm_eps: epsilon of the latents' norms.
    """

    num_heads: int
    kv_rank: int
    q_rank: int | None
    nope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    scale: float
    bias: bool = False
    latent_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_positive(self, "num_heads", "kv_rank", "nope_head_dim", "v_head_dim")
        if self.q_rank is not None:
            _check_positive(self, "q_rank")

    @property
    def rope_head_dim(self) -> int:
        """Dims of a head's query, and of the one key, that rotate."""
        return self.rope.rotary_dim

    def tp_faults(self, tp: int) -> list[str]:
        """Heads are split over tp; every rank has the latents."""
        return [f"num_attention_heads={self.num_heads}"] if self.num_heads % tp else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(TokenMixerConfig):
    """A recurrent layer: a memory per head that decays and overwrites, behind a short convolution.

    Yang et al. 2024 (arXiv:2412.06464).

    Attributes:
        num_key_heads: heads of queries and keys.
        num_value_heads: heads of values, each with a memory of its own; a multiple of `num_key_heads`.
        key_head_dim: width of a query and of a key.
        value_head_dim: width of a value.
        conv_kernel_size: taps of the convolution.
        activation: after the convolution, a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
        fused_projections: queries, keys, values and gates come from one projection, decays and strengths from another,
            in which the rows of a key head and of its value heads are together; otherwise from one each.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_size: int
    activation: str = "silu"
    fused_projections: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_size")
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"each key head serves the same number of value heads: num_value_heads={self.num_value_heads} is no "
                f"multiple of num_key_heads={self.num_key_heads}"
            )

    @property
    def value_heads_per_key_head(self) -> int:
        """Value heads that share a query and a key."""
        return self.num_value_heads // self.num_key_heads

    def tp_faults(self, tp: int) -> list[str]:
        """Key heads are split over tp, their value heads with them."""
        return [f"linear_num_key_heads={self.num_key_heads}"] if self.num_key_heads % tp else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(TokenMixerConfig):
    """A selective state space layer, each channel with a state of its own, behind a short convolution.

    Gu and Dao 2023 (arXiv:2312.00752), with Jamba's norms (Lieber et al. 2024, arXiv:2403.19887).

    Attributes:
        num_channels: width between the projections.
        state_size: numbers that a channel's state has.
        dt_rank: width of the projection that step sizes are made from.
        conv_kernel_size: taps of the convolution.
        activation: after the convolution, a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
        conv_bias: the convolution has a bias.
        bias: the projections in and out have one.
    """

    num_channels: int
    state_size: int
    dt_rank: int
    conv_kernel_size: int
    activation: str = "silu"
    conv_bias: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "num_channels", "state_size", "dt_rank", "conv_kernel_size")

    def tp_faults(self, tp: int) -> list[str]:
        """Channels are split over tp."""
        return [f"the Mamba width {self.num_channels}"] if self.num_channels % tp else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(TokenMixerConfig):
    """A state space layer in the dual form: a matrix state per head that decays, behind a short convolution.

    Dao and Gu 2024 (arXiv:2405.21060).

    Attributes:
        num_heads: heads, each with a state of its own.
        head_dim: width of a head's input.
        num_groups: groups of heads that share what enters their states and what reads them; divides `num_heads`. Outputs
            are normalised over the heads of each.
        state_size: a state is [head_dim, state_size].
        conv_kernel_size: taps of the convolution.
        activation: after the convolution, a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
        conv_bias: the convolution has a bias.
        bias: the projections in and out have one.
        min_step: step sizes are at least this.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_kernel_size: int
    activation: str = "silu"
    conv_bias: bool = True
    bias: bool = False
    min_step: float = 0.0

    def __post_init__(self) -> None:
        _check_positive(self, "num_heads", "head_dim", "num_groups", "state_size", "conv_kernel_size")
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"each group has the same number of heads: num_heads={self.num_heads} is no multiple of "
                f"num_groups={self.num_groups}"
            )

    @property
    def num_channels(self) -> int:
        """Inputs of all heads."""
        return self.num_heads * self.head_dim

    def tp_faults(self, tp: int) -> list[str]:
        """Heads are split over tp; with fewer groups than ranks, ranks share one."""
        faults = [f"mamba_num_heads={self.num_heads}"] if self.num_heads % tp else []
        if self.num_groups % tp and tp % self.num_groups:
            faults.append(f"the Mamba groups {self.num_groups} (neither divides the other)")
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
        zero_other_groups: experts of the other groups score 0, and so weigh nothing where they are chosen for want of
            others, instead of being no choice.
        scale: the weights are multiplied by it.
        expert_scale: the weight of each expert is multiplied by a learnt factor of that expert.
        input_norm_eps: the router sees x / rms(x) · scale / sqrt(D), with a learnt scale [D] and this epsilon; None for
            x as it is.
        sparsemixer: choose and weight by `jaxmoe.layers.router.sparsemixer` with this jitter; None for the above.
        function: choose and weight by this function of float32 logits [T, E] and K, which gives whole numbers [T, K],
            experts that differ from each other, and weights [T, K]. It is traced by JAX, and nothing but
            `input_norm_eps` and `logit_bias` counts beside it. None for the above.

    Example:
        Experts by their logits, all with the same weight:

        >>> def alike(logits_TE, K):
        ...     ids_TK = jax.lax.top_k(logits_TE, K)[1]
        ...     return ids_TK, jnp.full(ids_TK.shape, 1 / K)
        >>> router = RouterConfig(function=alike)
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
    zero_other_groups: bool = False
    scale: float = 1.0
    expert_scale: bool = False
    input_norm_eps: float | None = None
    sparsemixer: float | None = None
    function: RouterFunction | None = None

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
        latent_size: the routed experts work on a projection of x to this width, and their sum is projected back; None
            for x itself. Router and shared experts see x either way.
        latent_bias: these two projections have a bias.

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
    latent_size: int | None = None
    latent_bias: bool = False

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
        if self.latent_size is not None:
            _check_positive(self, "latent_size")
        elif self.latent_bias:
            raise ValueError("latent_bias is of the projections to latent_size, which is None")

    @property
    def expert_input_size(self) -> int:
        """Width of what a routed expert takes and gives."""
        return self.hidden_size if self.latent_size is None else self.latent_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One decoder layer: attention or a recurrent layer in its place, then a dense MLP or routed experts.

    Either half may be None, for a layer that has only the other.

    Attributes:
        attention: the layer through which a token sees those before it.
        feed_forward: what follows it.
        post_norms: what a half gives is normalised before it is added to the residual stream.
        parallel_mlp: a dense MLP beside the routed experts, on the same residual stream, which the router sees without
            the layer's norms; their results are normalised, each on its own, and added.
        output_scale: the layer's result is multiplied by a learnt number.
    """

    attention: TokenMixerConfig | None
    feed_forward: MLPConfig | MoEConfig | None
    post_norms: bool = False
    parallel_mlp: MLPConfig | None = None
    output_scale: bool = False

    def __post_init__(self) -> None:
        if self.attention is None and self.feed_forward is None:
            raise ValueError("a layer has attention, a feed-forward part or both; got neither")
        if self.parallel_mlp is not None and not isinstance(self.feed_forward, MoEConfig):
            raise ValueError("a parallel MLP stands beside routed experts; the layer has none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A whole decoder, independent of the family it came from.

    Attributes:
        model_type: the family's name in ``config.json``.
        vocab_size: tokens the model knows.
        hidden_size: D.
        layers: one config per layer, first to last.
        norm_eps: epsilon of every norm.
        norm: "rms", "rms_float32", which rounds after the weight and not before it too, "rms_zero_centred", which does
            the same and multiplies by 1 + weight, "layer" with mean and bias, or "layer_without_bias".
        tie_word_embeddings: the output projection is the embedding.
        max_position_embeddings: positions the model was made for.
        dtype: the checkpoint's own dtype by name, None where it does not say.
        embedding_multiplier: the embedding is multiplied by it.
        residual_multiplier: what a layer's halves add to the residual stream is multiplied by it.
        logits_scaling: the logits are divided by it.
        logits_softcap: the logits become softcap · tanh(logits / softcap), and so stay within ±softcap; None for not.
        lm_head_bias: the output projection has a bias.
        num_mtp_layers: layers for multi-token prediction that a checkpoint may have behind the model's own, and that
            are not loaded.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str | None = None
    norm: Literal["rms", "rms_float32", "rms_zero_centred", "layer", "layer_without_bias"] = "rms"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    logits_softcap: float | None = None
    lm_head_bias: bool = False
    num_mtp_layers: int = 0

    def __post_init__(self) -> None:
        _check_positive(self, "vocab_size", "hidden_size", "max_position_embeddings")
        if not self.layers:
            raise ValueError("a decoder has at least one layer; got none (num_hidden_layers)")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.feed_forward, MoEConfig))

    def with_router(self, function: RouterFunction) -> "DecoderConfig":
        """The same with experts chosen by `function` in every layer, see `RouterConfig.function`."""

        def changed(layer: LayerConfig) -> LayerConfig:
            moe = layer.feed_forward
            if not isinstance(moe, MoEConfig):
                return layer
            moe = dataclasses.replace(moe, router=dataclasses.replace(moe.router, function=function))
            return dataclasses.replace(layer, feed_forward=moe)

        return dataclasses.replace(self, layers=tuple(changed(layer) for layer in self.layers))


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

"""Configs of a layer and of a whole decoder."""

import dataclasses
from typing import Literal

from jaxmoe.checks import check_positive
from jaxmoe.config.feed_forward import MLPConfig, MoEConfig
from jaxmoe.config.routers import ChosenByFunction, RouterFunction
from jaxmoe.config.token_mixers import TokenMixerConfig

MAX_EXPERTS = 1_000_000  # each has names and blocks, before a file is asked whether it is there


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
        lm_head_bias: the output projection, which is then not tied, has a bias.
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
        check_positive(self, "vocab_size", "hidden_size", "max_position_embeddings")
        if not self.layers:
            raise ValueError("a decoder has at least one layer; got none (num_hidden_layers)")
        experts = sum(
            layer.feed_forward.num_experts for layer in self.layers if isinstance(layer.feed_forward, MoEConfig)
        )
        if experts > MAX_EXPERTS:
            raise ValueError(
                f"the layers of a decoder have at most {MAX_EXPERTS} experts together; config.json: {experts}"
            )
        if self.tie_word_embeddings and self.lm_head_bias:
            raise ValueError(
                "a tied output projection has no bias; config.json has tie_word_embeddings and a bias (lm_head_bias, or "
                "use_bias); no released model has both"
            )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.feed_forward, MoEConfig))

    def with_router(self, function: RouterFunction) -> "DecoderConfig":
        """The same with experts chosen by `function` in every layer; see `ChosenByFunction`."""

        def changed(layer: LayerConfig) -> LayerConfig:
            moe = layer.feed_forward
            if not isinstance(moe, MoEConfig):
                return layer
            # Parameters that the function does not look at stay: a checkpoint has tensors for them.
            router = dataclasses.replace(moe.router, choice=ChosenByFunction(function=function))
            moe = dataclasses.replace(moe, router=router)
            return dataclasses.replace(layer, feed_forward=moe)

        return dataclasses.replace(self, layers=tuple(changed(layer) for layer in self.layers))

"""Configs of a layer and of a whole decoder."""

import dataclasses
from typing import Literal

from jaxmoe.checks import check_positive
from jaxmoe.config.feed_forward import MLPConfig, MoEConfig
from jaxmoe.config.latent_attention import MLAConfig
from jaxmoe.config.ngrams import NGramConfig
from jaxmoe.config.routers import ChosenByFunction, RouterFunction
from jaxmoe.config.token_mixers import TokenMixerConfig

MAX_EXPERTS = 1_000_000  # each has names and blocks, before a file is asked whether it is there


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One decoder layer: attention or a recurrent layer in its place, then a dense MLP or routed experts.

    Either half may be None, for a layer that has only the other.

    Attributes:
        attention: token mixer, through which a token sees those before it; None for none.
        feed_forward: dense MLP or routed experts behind it; None for neither.
        pre_norms: whether what goes into a half is normalized.
        post_norms: whether the result of a half is normalized before it is added to the residual stream.
        parallel_mlp: dense MLP beside the routed experts, on the same residual stream, which the router sees without
            the layer's norms; their results are normalized, each on its own, and added. None for none.
        shortcut_mlp: dense MLP in the place of the routed experts, whose own result is added behind the next layer instead,
            so that they can run beside it (shortcut-connected experts, arXiv:2404.05019). None for none.
        output_scale: whether the layer's result is multiplied by a learned number.
        experts_by_token: whether a token's routed experts are those that a table has for its id; the router weights them.
        ngrams: embeddings of the last tokens together, which are added to the residual streams before all else; None for
            none.
        starts_block: whether the layer is the first of a block in the sense of `BlockResidualsConfig`.
    """

    attention: TokenMixerConfig | None
    feed_forward: MLPConfig | MoEConfig | None
    pre_norms: bool = True
    post_norms: bool = False
    parallel_mlp: MLPConfig | None = None
    shortcut_mlp: MLPConfig | None = None
    output_scale: bool = False
    experts_by_token: bool = False
    ngrams: NGramConfig | None = None
    starts_block: bool = False

    def __post_init__(self) -> None:
        if self.attention is None and self.feed_forward is None:
            raise ValueError("a layer has attention, a feed-forward part or both; got neither")
        if self.parallel_mlp is not None and not isinstance(self.feed_forward, MoEConfig):
            raise ValueError("a parallel MLP stands beside routed experts; the layer has none")
        if self.parallel_mlp is not None and not self.pre_norms:
            raise ValueError("a parallel MLP has a norm before it; got pre_norms=False")
        if self.shortcut_mlp is not None and (
            not isinstance(self.feed_forward, MoEConfig) or self.parallel_mlp is not None or self.post_norms
        ):
            raise ValueError(
                "a shortcut's MLP stands in the place of routed experts, without another MLP beside them or a norm behind it"
            )
        if self.experts_by_token and not isinstance(self.feed_forward, MoEConfig):
            raise ValueError("a table of the tokens' experts needs routed experts; the layer has none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperConnectionConfig:
    """Several residual streams, which every half of a layer reads from, writes to and mixes with weights of its own.

    Hyper-connections (Zhu et al. 2024, arXiv:2409.19606), whose mixing is kept doubly stochastic (Xie et al. 2025,
    arXiv:2512.24880).

    Attributes:
        streams: number of residual streams.
        iterations: number of times that the mixing weights are divided by the sums of their columns and their rows.
        eps: epsilon of these divisions, and least weight of what is read.
    """

    streams: int
    iterations: int
    eps: float

    def __post_init__(self) -> None:
        check_positive(self, "streams", "iterations")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AveragedStreamsConfig(HyperConnectionConfig):
    """Hyper-connections whose streams are averaged after the last layer, where others have learned weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedStreamsConfig:
    """Several residual streams, which every half of a layer reads feature by feature and writes to with weights of its own.

    Attributes:
        streams: number of residual streams.
        rank: width between the two projections that the weights of what is read come from.
    """

    streams: int
    rank: int

    def __post_init__(self) -> None:
        check_positive(self, "streams", "rank")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockResidualsConfig:
    """A residual stream for each block of layers, which every half of a layer reads as a mean by weights of its own.

    The embedding is a stream as well. A half's result is added to the last stream, but for the attention of a layer that
    starts a block (`LayerConfig.starts_block`), whose result is a new one: the attention
    residuals of Kimi K3.
    """

    @property
    def streams(self) -> int:
        """Number of residual streams before the first layer."""
        return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPConfig:
    """The layers for multi-token prediction that a decoder has, each of which guesses one token further ahead.

    Attributes:
        num_layers: number of them; they are the last of `DecoderConfig.layers`.
        passes: hidden state that the next guess starts from: "stream", the layer's result; "normed", the same after the
            layer's last norm; or "main", the result of the model itself, which the first one starts from.
    """

    num_layers: int
    passes: Literal["stream", "normed", "main"] = "stream"

    def __post_init__(self) -> None:
        check_positive(self, "num_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A whole decoder, independent of the family it came from.

    Attributes:
        model_type: name of the family in ``config.json``.
        vocab_size: number of tokens that the model knows.
        hidden_size: model width D.
        layers: configs of the layers, first to last; those for multi-token prediction, where they are loaded, behind the
            model's own.
        norm_eps: epsilon of every norm.
        norm: kind of every norm: "rms", "rms_float32", which rounds after the weight and not before it too,
            "rms_zero_centered", which does the same and multiplies by 1 + weight, "layer" with mean and bias, or
            "layer_without_bias".
        tie_word_embeddings: whether the output projection is the embedding.
        max_position_embeddings: number of positions that the model was made for.
        dtype: name of the checkpoint's own dtype; None where it does not say.
        embedding_multiplier: factor of the embedding.
        residual_multiplier: factor of a half's result before it is added to the residual stream.
        logits_scaling: divisor of the logits.
        logits_softcap: bound of the logits, which become softcap · tanh(logits / softcap); None for none.
        lm_head_bias: whether the output projection, which is then not tied, has a bias.
        num_mtp_layers: number of layers for multi-token prediction that a checkpoint may have behind the model's own.
        mtp: those that are loaded; None where none is.
        streams: residual streams where there are several; None for one, to which halves of layers are added.
        final_norm: whether there is a norm before the output projection.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str | None = None
    norm: Literal["rms", "rms_float32", "rms_zero_centered", "layer", "layer_without_bias"] = "rms"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    logits_softcap: float | None = None
    lm_head_bias: bool = False
    num_mtp_layers: int = 0
    mtp: MTPConfig | None = None
    streams: HyperConnectionConfig | GatedStreamsConfig | BlockResidualsConfig | None = None
    final_norm: bool = True

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
        for layer in self.layers:
            indexer = layer.attention.indexer if isinstance(layer.attention, MLAConfig) else None
            if indexer is not None and not indexer.reuses:
                break
            if indexer is not None:
                raise ValueError(
                    "a layer reuses positions that a layer before it has chosen: the first layer with an indexer has one "
                    "of its own (indexer_types)"
                )
        if not isinstance(self.streams, BlockResidualsConfig) and any(layer.starts_block for layer in self.layers):
            raise ValueError(
                "a layer starts a block of layers where blocks have residual streams (BlockResidualsConfig)"
            )
        if self.streams is None and any(layer.ngrams for layer in self.layers):
            raise ValueError(
                "embeddings of n-grams are added to several residual streams; the decoder has one (streams)"
            )
        shortcuts = [i for i, layer in enumerate(self.layers) if layer.shortcut_mlp is not None]
        if shortcuts and (self.streams is not None or shortcuts[-1] == len(self.layers) - 1):
            raise ValueError(
                "the experts of a shortcut are added to one residual stream behind the next layer: the last layer has none, "
                "and no model with several streams does"
            )
        if self.tie_word_embeddings and self.lm_head_bias:
            raise ValueError(
                "a tied output projection has no bias; config.json has tie_word_embeddings and a bias (lm_head_bias, or "
                "use_bias); no released model has both"
            )

    @property
    def num_main_layers(self) -> int:
        """Number of the layers that a token goes through; those for multi-token prediction come behind them."""
        return len(self.layers) - (0 if self.mtp is None else self.mtp.num_layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.feed_forward, MoEConfig))

    def with_router(self, function: RouterFunction) -> "DecoderConfig":
        """Make the same config with experts chosen by `function` in every layer; see `ChosenByFunction`."""

        def changed(layer: LayerConfig) -> LayerConfig:
            moe = layer.feed_forward
            if not isinstance(moe, MoEConfig):
                return layer
            # Parameters that the function does not look at stay: a checkpoint has tensors for them.
            router = dataclasses.replace(moe.router, choice=ChosenByFunction(function=function))
            moe = dataclasses.replace(moe, router=router)
            return dataclasses.replace(layer, feed_forward=moe)

        return dataclasses.replace(self, layers=tuple(changed(layer) for layer in self.layers))

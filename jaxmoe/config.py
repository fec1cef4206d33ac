"""Frozen configs of a decoder's parts, and the reading of a checkpoint's ``config.json``.

One config per component, each checked when it is made. A family's file turns the
dictionary that `read_config_json` returns into a `DecoderConfig`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_REQUIRED = object()


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name} is a whole number of at least 1; got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Attributes:
        theta: base of the geometric series of wavelengths.
        rotary_dim: leading dims of each head that rotate.
        linear_factor: positions are divided by it (linear scaling; 1.0 for none).
    """

    theta: float
    rotary_dim: int
    linear_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim is even and at least 2; got {self.rotary_dim}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of one head.
        rope: rotary embedding of queries and keys.
        qk_norm: RMS-normalise each query and key head before the rotation.
        bias: q, k, v (and o) projections have a bias.
        sliding_window: a token sees this many positions, itself included; None for all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    qk_norm: bool = False
    bias: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"each key/value head serves the same number of query heads: num_heads={self.num_heads} is no "
                f"multiple of num_kv_heads={self.num_kv_heads}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a router turns logits into experts and weights; see `jaxmoe.layers.router`.

    Attributes:
        score: the function from logits [E] to scores [E], a name in `SCORES`.
        renormalize: divide the chosen scores by their sum.
    """

    score: str = "softmax"
    renormalize: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A dense gated MLP: down(act(gate x) · up x).

    Attributes:
        hidden_size: D.
        intermediate_size: width between the products.
        activation: a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
    """

    hidden_size: int
    intermediate_size: int
    activation: str = "silu"

    def __post_init__(self) -> None:
        _check_positive(self, "hidden_size", "intermediate_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A layer of routed experts, each a gated MLP.

    Attributes:
        num_experts: logical experts E.
        num_experts_per_tok: experts K that each token goes to.
        hidden_size: model width D.
        moe_intermediate_size: expert width F.
        activation: a name in `jaxmoe.kernels.grouped_matmul.ACTIVATIONS`.
        router: how experts are chosen and weighted.

    Raises:
        ValueError: a size below 1, or K above E.
    """

    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    activation: str = "silu"
    router: RouterConfig = RouterConfig()

    def __post_init__(self) -> None:
        _check_positive(self, "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"a token goes to at most all experts: num_experts_per_tok={self.num_experts_per_tok} is above "
                f"num_experts={self.num_experts}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One decoder layer: attention, then a dense MLP or routed experts."""

    attention: AttentionConfig
    feed_forward: MLPConfig | MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A whole decoder, independent of the family it came from.

    Attributes:
        model_type: the family's name in ``config.json``.
        vocab_size: tokens the model knows.
        hidden_size: D.
        layers: one config per layer, first to last.
        norm_eps: epsilon of every RMS norm.
        tie_word_embeddings: the output projection is the embedding.
        max_position_embeddings: positions the model was made for.
        dtype: the checkpoint's own dtype by name, None where it does not say.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str | None = None

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


def read_rope(config: Mapping[str, Any], *, head_dim: int, default_theta: float) -> RopeConfig:
    """Read rotary settings in the v5 (``rope_parameters``) or v4 (``rope_theta``, ``rope_scaling``) spelling.

    Raises:
        ValueError: the scaling is of a kind that is not known here.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = pick(rope, "rope_type", "type", default="default")
    if kind not in ("default", "linear"):
        raise ValueError(f"rope scaling can be default or linear; config.json asks for {kind!r}")
    partial = pick(rope, "partial_rotary_factor", default=pick(config, "partial_rotary_factor", default=1.0))
    return RopeConfig(
        theta=float(pick(rope, "rope_theta", default=pick(config, "rope_theta", default=default_theta))),
        rotary_dim=int(head_dim * partial),
        linear_factor=float(rope["factor"]) if kind == "linear" else 1.0,
    )

"""Rotary frequencies from config.json's rope settings. NumPy only.

A scaling kind is one function and a line in `SCALINGS`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Attributes:
        frequencies: radians per position of each rotated pair of dims; the leading
            ``2 * len(frequencies)`` dims of a head rotate.
        scale: factor of cosines and sines.
        interleaved: flag that pairs are neighboring dims (2i, 2i + 1) instead of (i, i + r).
        long: frequencies and scale of sequences longer than `long_above`; None where length makes no difference.
        long_above: length of a sequence above which `long` holds.
        up_to: length of the longest sequence that they hold for; 0 for sequences of any length.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    long: "RopeConfig | None" = None
    long_above: int = 0
    up_to: int = 0

    def __post_init__(self) -> None:
        if not self.frequencies:
            raise ValueError("a rotary embedding rotates at least one pair of dims; got none")

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that rotate."""
        return 2 * len(self.frequencies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """Settings that a scaling is computed from: the rope dictionary, and those beside it in config.json."""

    rope: Mapping[str, Any]
    base: np.ndarray
    theta: float
    head_dim: int
    max_position_embeddings: int

    @property
    def original_context(self) -> int:
        """Positions that the model had before its context was stretched; all of them where that is not said."""
        context = self.rope.get("original_max_position_embeddings") or self.max_position_embeddings
        if not context:
            raise KeyError("original_max_position_embeddings")
        return int(context)


def _base_frequencies(theta: float, rotary_dim: int) -> np.ndarray:
    """theta^(-2i / rotary_dim), float32 as the reference implementations compute it."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)


def _default(settings: _Settings) -> tuple[np.ndarray, float]:
    return settings.base, 1.0


def _linear(settings: _Settings) -> tuple[np.ndarray, float]:
    """Positions divided by a factor (Chen et al. 2023, arXiv:2306.15595)."""
    return settings.base / np.float32(settings.rope["factor"]), 1.0


def _llama3(settings: _Settings) -> tuple[np.ndarray, float]:
    """Long wavelengths divided by a factor, short ones kept, those between blended (Llama 3.1)."""
    rope, original = settings.rope, settings.original_context
    factor = rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    rotations = original / (2 * np.pi / settings.base)
    # Llama 4 has both factors 1: there is nothing between, and every frequency is either kept or divided.
    blend = np.clip((rotations - low) / (high - low), 0, 1) if high > low else rotations >= low
    blend = blend.astype(np.float32)
    return (1 - blend) * settings.base / np.float32(factor) + blend * settings.base, 1.0


def _yarn(settings: _Settings) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), section 3: blend by rotations over the original context."""
    rope, dim, original = settings.rope, 2 * len(settings.base), settings.original_context
    factor = rope.get("factor") or settings.max_position_embeddings / original
    if settings.theta <= 1:
        raise ValueError(f"rope scaling 'yarn' needs a rope_theta above 1; config.json gives {settings.theta}")

    def dim_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(settings.theta))

    low, high = dim_of(rope.get("beta_fast") or 32), dim_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1).astype(np.float32)
    frequencies = settings.base / np.float32(factor) * ramp + settings.base * (1 - ramp)
    return frequencies, _yarn_scale(rope, factor)


def _yarn_scale(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_mscale(factor, rope["mscale"]) / yarn_mscale(factor, rope["mscale_all_dim"])
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1, YaRN's correction of the softmax temperature."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(settings: _Settings, kind: str = "short") -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): each frequency divided by a searched factor of its own.

    There are two sets of factors, for sequences within the original context and beyond it.
    """
    rope = settings.rope
    frequencies = settings.base / np.asarray(rope[f"{kind}_factor"], np.float32)
    scale = rope.get(f"{kind}_mscale") or rope.get("attention_factor")
    if scale is None:
        original = settings.original_context
        factor = rope.get("factor") or settings.max_position_embeddings / original
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
    return frequencies, float(scale)


def _dynamic(settings: _Settings) -> tuple[np.ndarray, float]:
    """NTK-aware scaling: theta is stretched so that the slowest pair rotates alpha times slower.

    HunYuan has a fixed alpha. Others have a factor, by which alpha grows with the length of a sequence beyond what the model
    was trained for; up to there it is 1.
    """
    dim = 2 * len(settings.base)
    if _is_by_length(settings.rope):
        settings.rope["factor"]  # transformers needs one, even where it makes no difference
        return settings.base, 1.0
    if dim == 2:
        raise ValueError("rope scaling 'dynamic' needs heads that rotate more than one pair of dims; they have 2 dims")
    return _base_frequencies(settings.theta * settings.rope["alpha"] ** (dim / (dim - 2)), dim), 1.0


def _is_by_length(rope: Mapping[str, Any]) -> bool:
    """Whether "dynamic" settings are those whose frequencies change beyond the trained length."""
    return rope.get("alpha") is None


def _proportional(settings: _Settings) -> tuple[np.ndarray, float]:
    """The fast ones of a whole head's frequencies; its other pairs stand still, and remain pairs of (i, i + h/2)."""
    rotating = int(_rotating_part(settings.rope) * settings.head_dim // 2)
    frequencies = _base_frequencies(settings.theta, settings.head_dim) / np.float32(settings.rope.get("factor") or 1.0)
    return np.where(np.arange(len(frequencies)) < rotating, frequencies, np.float32(0)), 1.0


SCALINGS: dict[str, Callable[[_Settings], tuple[np.ndarray, float]]] = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "proportional": _proportional,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope dictionary in the v5 (``rope_parameters``) and v4 (``rope_scaling``, ``rope_theta``) spellings."""
    found = [config.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(settings, dict) for settings in found):
        raise ValueError(f"rope_scaling and rope_parameters in config.json are objects; they are {found}")
    rope = {**found[0], **found[1]}
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is None and config.get(name) is not None:
            rope[name] = config[name]
    # In both places it is the outer one that transformers takes.
    if config.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return rope


_NUMBERS = (
    "rope_theta partial_rotary_factor factor attention_factor original_max_position_embeddings beta_fast beta_slow mscale "
    "mscale_all_dim low_freq_factor high_freq_factor alpha short_mscale long_mscale"
).split()
_LISTS = ("short_factor", "long_factor")
_MAY_BE_ZERO = ("mscale", "mscale_all_dim", "partial_rotary_factor")


def _checked(rope: Any) -> dict[str, Any]:
    """The settings that are there, once they are of the right kinds."""
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope settings in config.json are an object; they are {rope!r:.80}")
    rope = {name: value for name, value in rope.items() if value is not None}
    for name in ("rope_type", "type"):
        if not isinstance(rope.get(name, ""), str):
            raise ValueError(f"{name} of the rope settings is a string; it is {rope[name]!r:.80}")
    for name in rope.keys() & {*_NUMBERS, *_LISTS}:
        value = rope[name]
        for number in value if name in _LISTS and isinstance(value, list) else [value]:
            positive = type(number) in (int, float) and 0 < number < math.inf
            if not positive and not (number == 0 and name in _MAY_BE_ZERO):
                what = "numbers" if name in _LISTS else "a number"
                raise ValueError(f"{name} of the rope settings is {what} above 0; it has {number!r:.80}")
    if _rotating_part(rope) > 1:
        raise ValueError(f"partial_rotary_factor is at most 1; it is {rope['partial_rotary_factor']}")
    return rope


def _rotating_part(rope: Mapping[str, Any]) -> float:
    return float(rope.get("partial_rotary_factor", 1.0))


def read_rope(
    config: Mapping[str, Any],
    *,
    head_dim: int,
    default_theta: float,
    interleaved: bool = False,
    partial: bool = False,
    rope: Mapping[str, Any] | None = None,
) -> RopeConfig:
    """Read a config.json's rotary settings.

    Args:
        config: the dictionary of config.json.
        head_dim: dims of a head that may rotate.
        default_theta: the family's theta where the config gives none.
        interleaved: flag of `RopeConfig`.
        partial: flag that ``partial_rotary_factor`` counts in the family. Where it does not, transformers passes it over
            or fails at it, and other engines look at it.
        rope: the rope dictionary where a family keeps several; `rope_settings` of `config` by default.

    Raises:
        ValueError: the scaling is of a kind that is not known here, or a part of a head is to rotate where heads
            rotate as a whole.
    """
    rope = _checked(rope_settings(config) if rope is None else rope)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in SCALINGS:
        raise ValueError(f"rope scaling can be {', '.join(SCALINGS)}; config.json asks for {kind!r}")
    theta = float(rope.get("rope_theta") or default_theta)
    part = _rotating_part(rope)
    if part != 1 and not partial and kind != "proportional":
        raise ValueError(
            f"heads of {config['model_type']} rotate as a whole; config.json has partial_rotary_factor={part}, which "
            "transformers does not look at; set it to 1 for what transformers computes"
        )
    rotary_dim = int(head_dim * part)
    settings = _Settings(
        rope=rope,
        base=_base_frequencies(theta, rotary_dim),
        theta=theta,
        head_dim=head_dim,
        max_position_embeddings=config.get("max_position_embeddings") or 0,
    )
    try:
        frequencies, scale = SCALINGS[kind](settings)
        result = RopeConfig(frequencies=tuple(frequencies.tolist()), scale=scale, interleaved=interleaved)
        if kind == "dynamic" and _is_by_length(rope):
            return dataclasses.replace(result, up_to=settings.max_position_embeddings)
        if kind != "longrope":
            return result
        frequencies, scale = _longrope(settings, "long")
        return dataclasses.replace(
            result,
            long=dataclasses.replace(result, frequencies=tuple(frequencies.tolist()), scale=scale),
            long_above=settings.original_context,
        )
    except KeyError as error:
        raise ValueError(f"rope scaling {kind!r} needs {error} in config.json's rope settings") from error

"""The configuration of a LoRA adapter, as PEFT writes it to ``adapter_config.json``."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats import read_json

MAX_CONFIG_BYTES = 10_000_000

# Keys of rank_pattern and alpha_pattern are regular expressions that the adapter's author wrote. Python's matcher takes
# exponential time where quantifiers nest, and the n-th power of a name's length for n of them in a row.
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_QUANTIFIER = re.compile(r"(?<!\()[*+?{]")
_MAX_QUANTIFIERS = 3

# What an adapter may have beyond a low-rank update of weights. Each changes the model in another way, so an adapter that
# has one is refused and never merged in part. All are off where the value is false, none or empty.
_NOT_A_MERGE = {
    "use_dora": "DoRA scales each output by a learned magnitude",
    "use_qalora": "QA-LoRA pools its inputs by group",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "lora_bias": "its B factors have biases",
    "trainable_token_indices": "it replaces rows of the embedding",
    "layer_replication": "it repeats layers of the model",
    "alora_invocation_tokens": "it is switched on by tokens of the prompt",
    "kasa_config": "KaSA truncates the weights it is added to",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between several adapters",
}
# These initialize the factors from the base weights and change those, so the adapter does not fit the checkpoint.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The settings of an adapter that merging needs.

    Attributes:
        rank: r of modules that no pattern is about.
        alpha: lora_alpha of those.
        rank_pattern: regular expression for the end of a module's name -> its rank; the first that matches counts.
        alpha_pattern: the same for alpha.
        use_rslora: whether the scale is alpha / √r and not alpha / r.
        fan_in_fan_out: whether the weights of plain modules are stored [in, out].
        target_parameters: names, or ends of names, of 3-D parameters that are adapted themselves.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    target_parameters: tuple[str, ...] = ()

    def rank_of(self, key: str) -> int:
        """The rank of module or parameter `key`."""
        return _by_pattern(self.rank_pattern, key, self.rank)

    def scale_of(self, key: str) -> float:
        """The factor s of ΔW = s·B·A for module or parameter `key`.

        Example:
            >>> LoraConfig(rank=4, alpha=8, rank_pattern={"q_proj": 16}).scale_of("layers.0.self_attn.q_proj")
            0.5
        """
        rank, alpha = self.rank_of(key), _by_pattern(self.alpha_pattern, key, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_lora_config(path: str | os.PathLike[str]) -> LoraConfig:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: it is no such document, or the adapter is more than low-rank updates of weights.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)

    def refuse(rule: str, value: str) -> NoReturn:
        raise CheckpointError(f"{path}: {rule}; {value}")

    document = read_json(path, "an adapter's configuration", MAX_CONFIG_BYTES, refuse)
    if not isinstance(document, dict):
        refuse("an adapter's configuration must be a JSON object", f"it is a {type(document).__name__}")
    try:
        return parse_lora_config(document)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def parse_lora_config(document: Mapping[str, Any]) -> LoraConfig:
    """Make a `LoraConfig` of the content of ``adapter_config.json``.

    Raises:
        CheckpointError: as `read_lora_config`.
    """
    kind = document.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"an adapter must be of peft_type LORA to be merged; this one is of {kind!r}; merge it with PEFT"
        )
    for field, reason in _NOT_A_MERGE.items():
        if document.get(field):
            raise CheckpointError(
                f"an adapter must be low-rank updates of weights and nothing else; this one has {field}: {reason}; "
                "merge it with PEFT (merge_and_unload) and load the result"
            )
    if document.get("bias", "none") != "none":
        raise CheckpointError(
            f"an adapter must not train biases; this one has bias={document['bias']!r}; merge it with PEFT"
        )
    initial = document.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"an adapter must fit the weights of its base model; with init_lora_weights={initial!r} it fits changed ones; "
            "save it with path_initial_model_for_weight_conversion"
        )
    rank, alpha = document.get("r"), document.get("lora_alpha")
    targets = document.get("target_parameters") or []
    if not _is_rank(rank) or not _is_number(alpha):
        raise CheckpointError(f"an adapter must have a rank r and a lora_alpha; this one has {rank!r} and {alpha!r}")
    if not isinstance(targets, list) or not all(isinstance(name, str) and name for name in targets):
        raise CheckpointError(f"target_parameters must be a list of names; it is {targets!r}")
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        rank_pattern=_pattern(document, "rank_pattern", _is_rank),
        alpha_pattern=_pattern(document, "alpha_pattern", _is_number),
        use_rslora=bool(document.get("use_rslora")),
        fan_in_fan_out=bool(document.get("fan_in_fan_out")),
        target_parameters=tuple(targets),
    )


def _is_rank(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)


def _pattern(document: Mapping[str, Any], field: str, is_valid: Any) -> dict[str, Any]:
    value = document.get(field) or {}
    if not isinstance(value, dict) or not all(is_valid(number) for number in value.values()):
        raise CheckpointError(f"{field} must map names to numbers; it is {value!r}")
    for name in value:
        try:
            re.compile(name)
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(f"a key of {field} must be a regular expression; {name!r} is not: {error}") from error
        if _REPEATED_GROUP.search(name) or len(_QUANTIFIER.findall(name)) > _MAX_QUANTIFIERS:
            raise CheckpointError(
                f"a key of {field} must be matched in short time: no repeated groups and at most {_MAX_QUANTIFIERS} "
                f"quantifiers; one is {name[:80]!r}; write the names of the modules"
            )
    return value


def _by_pattern(pattern: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of the first entry that matches the end of `key` from a dot on, as PEFT's ``get_pattern_key``."""
    for name, value in pattern.items():
        if re.match(rf"(.*\.)?({name})$", key):
            return value
    return default

"""Names of a checkpoint behind another prefix than its family's: what training tools and multimodal models put before them.

A prefix is only looked for where no layer has a name of the family, and taken where names of the family come out. There is
no doubt in that: the plan of a load refuses every tensor that is left over and every parameter that nothing fills.
"""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from jaxmoe.checkpoint.mapping.ignore import IgnoreRule
from jaxmoe.config import DecoderConfig
from jaxmoe.models import WRAPPERS, Family

# Put before every name: by DistributedDataParallel and DeepSpeed, torch.compile, FSDP, and PEFT around a merged model.
_AROUND = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")

# Pairs as in `Wrapper.prefixes`, tried one list after the other.
_INSIDE: tuple[tuple[tuple[str, str], ...], ...] = (
    (("model.language_model.", "model."),),
    (("language_model.", ""),),
    (("model.text_model.", "model."),),
    (("text_model.", "model."),),
    (("model.model.", "model."), ("model.lm_head.", "lm_head.")),
    (("thinker.model.", "model."), ("thinker.lm_head.", "lm_head.")),
)


class Renaming(NamedTuple):
    """A way from the names of a checkpoint to those of its family.

    Attributes:
        rule: sentence on it, for a report; "" where names stay as they are.
        rename: function from a name to the family's.
        ignored: rules for tensors beside those of the text part.
    """

    rule: str = ""
    rename: Callable[[str], str] = str
    ignored: tuple[IgnoreRule, ...] = ()


def find_prefix(names: Collection[str], family: Family, config: DecoderConfig) -> Renaming:
    """Find the prefix that the names of a checkpoint have and its family's have not.

    Args:
        names: names of all tensors, as `Family.text_name` gives them.
        family: family of the model.
        config: config of the model.

    Returns:
        The way to the family's names; names stay as they are where layers have them, or no known prefix leads to them.
    """
    known = _layer_names(family, config)
    if any(name in known for name in names):
        return Renaming()
    around = ""
    while (prefix := next((each for each in _AROUND if _all_begin(names, around + each)), None)) is not None:
        around += prefix
    inner = [name.removeprefix(around) for name in names]
    for candidate in _candidates(family, bool(around)):
        if any(candidate.rename(name) in known for name in inner):
            return _behind(around, candidate)
    return Renaming()


def _layer_names(family: Family, config: DecoderConfig) -> set[str]:
    """Names of the family's tensors in layers, routed experts left out."""
    spellings = {name for own in family.tensors.values() for name in own if "{layer}" in name or "{pair}" in name}
    return {family.name_in_layer(name, layer) for name in spellings for layer in range(config.num_main_layers)}


def _all_begin(names: Collection[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


def _candidates(family: Family, around: bool) -> Iterator[Renaming]:
    if around:
        yield Renaming()
    for wrapper in WRAPPERS.values():
        # Tensors of a whole multimodal model beside the config.json of its text part.
        if wrapper.text == family.model_type and family.wrapper is None:
            ignored = tuple([IgnoreRule(name=name, pattern=pattern) for name, pattern in wrapper.ignored.items()])
            yield Renaming(
                f"names are those of the text part of {wrapper.model_type}, beside a config.json of the text model alone",
                wrapper.text_name,
                ignored,
            )
    for pairs in _INSIDE:
        told = " and ".join(f"{old!r} is {new!r}" if new else f"{old!r} is left out" for old, new in pairs)
        yield Renaming(f"in names {told}", _replacing(pairs))
    # A base model that was saved without its output projection's class around it.
    yield Renaming("names are put behind 'model.'", lambda name: name if name == "lm_head.weight" else f"model.{name}")


def _replacing(pairs: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for old, new in pairs:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return rename


def _behind(around: str, candidate: Renaming) -> Renaming:
    """`candidate` of the names behind a prefix that all of them have."""
    if not around:
        return candidate
    rules = [f"names begin with {around!r}, which is left out", *filter(None, [candidate.rule])]
    rename = candidate.rename
    return Renaming("; ".join(rules), lambda name: rename(name.removeprefix(around)), candidate.ignored)

"""Rope settings in several places of a config.json: they say the same, or the config is refused with both.

transformers 4 writes ``rope_scaling`` and ``rope_theta``, transformers 5 ``rope_parameters``, and people add the one by hand
to a file that has the other. transformers then takes a part of each.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_DICTIONARIES = ("rope_scaling", "rope_parameters")
_BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def check_rope_agreement(config: Mapping[str, Any], text: Mapping[str, Any] | None = None) -> None:
    """Refuse rope settings that differ between places, or that stand where the text model does not look.

    Args:
        config: dictionary of config.json.
        text: its part for the text model, where it has one.

    Raises:
        ValueError: two differ; both are named with their values.
    """
    found = list(_settings("", config))
    if text is not None:
        own = list(_settings("text_config.", text))
        for place, name, value in found:
            if name == "rope_type" and value != "default" and not any(other == name for _, other, _ in own):
                raise ValueError(
                    f"the text model of a multimodal one has its rope settings in text_config; config.json has {value!r} in "
                    f"{place}, and none in text_config; move it there"
                )
        found += own
    known: dict[str, tuple[str, Any]] = {}
    for place, name, value in found:
        first, meant = known.setdefault(name, (place, value))
        if value != meant:
            raise ValueError(
                f"config.json says one thing once; it has {name} {meant!r:.60} in {first} and {value!r:.60} in {place}, "
                "which differ; remove the one that is not meant"
            )


def _settings(prefix: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(place, setting, value) of every rope setting of one level; "type" is an old name of "rope_type"."""
    for name in _BESIDE:
        if config.get(name) is not None:
            yield f"{prefix}{name}", name, config[name]
    scaling, parameters = (config.get(name) for name in _DICTIONARIES)
    if isinstance(parameters, dict) and any(isinstance(own, dict) for own in parameters.values()):
        # Settings by kind of layer differ rightly among themselves, and a scaling beside them is looked at by nobody.
        if isinstance(scaling, dict) and scaling and scaling != parameters:
            raise ValueError(
                f"config.json says one thing once; it has {prefix}rope_scaling={scaling!r:.60} and "
                f"{prefix}rope_parameters={parameters!r:.60} by kind of layer; remove the one that is not meant"
            )
        return
    for place, rope in zip(_DICTIONARIES, (scaling, parameters), strict=True):
        if isinstance(rope, dict):
            for name, value in rope.items():
                if value is not None:
                    yield f"{prefix}{place}", "rope_type" if name == "type" else name, value

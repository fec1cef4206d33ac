"""Two settings of one thing in a config.json: equal ones are read, others refused with both values."""

import copy
import json
from typing import Any

import pytest

from jaxmoe.config import SPELLINGS
from jaxmoe.models import find_family, read_model_config
from tests.support.goldens import GOLDENS

PLAIN, WRAPPED = "qwen3_moe", "qwen3_vl_moe"
CONFIGS = {name: json.loads((GOLDENS / name / "original" / "config.json").read_text()) for name in (PLAIN, WRAPPED)}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def config_of(name: str) -> dict[str, Any]:
    return copy.deepcopy(CONFIGS[name])


def read(config: dict[str, Any]) -> Any:
    family, text = find_family(config)
    return family.read_config(text)


def other(value: Any) -> Any:
    """A value of the same kind that is another one."""
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else 2 * value


def known(config: dict[str, Any], thing: str) -> tuple[str, Any] | None:
    """The name and the value that a config has for a thing."""
    return next(((name, config[name]) for name in SPELLINGS[thing] if config.get(name) is not None), None)


@pytest.mark.parametrize("thing", SPELLINGS)
def test_another_spelling_says_the_same_or_is_refused(thing):
    config = config_of(PLAIN)
    name, value = known(config, thing) or (SPELLINGS[thing][0], 3)
    config[name] = value
    usual = read(config)
    for spelling in SPELLINGS[thing]:
        if spelling != name:
            assert read({**config, spelling: value}) == usual
            assert read({**config, spelling: None}) == usual
            with pytest.raises(ValueError, match="says one thing once; it has") as caught:
                read({**config, spelling: other(value)})
            assert f"{name}={value!r}" in str(caught.value)
            assert f"{spelling}={other(value)!r}" in str(caught.value)


@pytest.mark.parametrize("thing", sorted(SPELLINGS.keys() - {"dtype", "tied embeddings"}))
def test_the_outer_level_says_the_same_as_the_text_part_or_is_refused(thing):
    config = config_of(WRAPPED)
    found = known(config["text_config"], thing)
    for spelling in SPELLINGS[thing] if found else ():
        read({**config, spelling: found[1]})
        with pytest.raises(ValueError, match=rf"has {spelling}=.* and text_config\.{found[0]}=.*, which differ"):
            read({**config, spelling: other(found[1])})


def test_the_outer_dtype_counts_as_the_wrapper_says():
    config = {**config_of(WRAPPED), "dtype": "bfloat16"}
    assert config["text_config"]["dtype"] == "float32"
    assert read(config).dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"dtype='bfloat16' and torch_dtype='float16'"):
        read({**config, "torch_dtype": "float16"})
    assert read({**config, "torch_dtype": "torch.bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": YARN}, "rope_type 'yarn' in rope_scaling and 'default' in rope_parameters, which differ"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "rope_type 'yarn' in rope_scaling and 'linear' in rope_scaling"),
        ({"rope_theta": 5.0}, "rope_theta 5.0 in rope_theta and 1000.0 in rope_parameters, which differ"),
        ({"rope_scaling": {"rope_theta": 5.0}}, "rope_theta 5.0 in rope_scaling and 1000.0 in rope_parameters"),
        (
            {"rope_parameters": {**YARN, "rope_theta": 9.0}, "original_max_position_embeddings": 32},
            "original_max_position_embeddings 32 in original_max_position_embeddings and 64 in rope_parameters",
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_rope_settings_in_two_places_are_the_same_or_refused(changes, message, wrapped, tmp_path):
    config = config_of(WRAPPED if wrapped else PLAIN)
    part = config["text_config"] if wrapped else config
    part |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: config.json says one thing once") as caught:
        read_model_config(tmp_path)
    assert message in str(caught.value).replace("text_config.", "")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": YARN, "rope_theta": 1000.0, "rope_parameters": None},
        {"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 1000.0}},
        {"rope_scaling": {**YARN, "type": "yarn", "factor": 4}, "rope_parameters": {"rope_theta": 1000.0}},
    ],
)
def test_rope_settings_that_say_the_same_are_read(changes):
    config = config_of(PLAIN)
    wanted = read({**config, "rope_parameters": {**YARN, "rope_theta": 1000.0}})
    assert read({**config, **changes}) == wanted


def test_rope_settings_around_a_text_part_are_refused_where_they_are_not_looked_at():
    config = config_of(WRAPPED)
    del config["text_config"]["rope_parameters"]
    with pytest.raises(ValueError, match="'yarn' in rope_scaling, and none in text_config; move it there"):
        read({**config, "rope_scaling": YARN})


def test_settings_by_kind_of_layer_bear_no_scaling_beside_them():
    config = json.loads((GOLDENS / "gemma4_text" / "original" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"rope_scaling=\{'rope_type': 'yarn'.* by kind of layer"):
        read({**config, "rope_scaling": YARN})

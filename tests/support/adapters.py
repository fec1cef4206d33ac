"""LoRA adapters as PEFT writes them, and the parameters that come of them."""

import json
from pathlib import Path

import numpy as np

from jaxmoe.layers import params_by_path
from tests.support.writing import write_file

R = 2  # the rank of every adapter here


Arrays = dict[str, np.ndarray]


def factors(module: str, out: int, inputs: int, rank: int = R) -> Arrays:
    rng = np.random.default_rng([len(module), out, inputs, *module.encode()])
    a, b = rng.standard_normal((rank, inputs)), rng.standard_normal((out, rank))
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": a.astype(np.float32), f"{prefix}.lora_B.weight": b.astype(np.float32)}


def write_adapter(directory: Path, tensors: Arrays, **config) -> Path:
    directory.mkdir(parents=True)
    write_file(directory / "adapter_model.safetensors", tensors)
    document = {"peft_type": "LORA", "r": R, "lora_alpha": 3, **config}
    (directory / "adapter_config.json").write_text(json.dumps(document))
    return directory


def params(model) -> Arrays:
    return {path: np.asarray(param[...]) for path, param in params_by_path(model).items()}


def check_equal(ours: Arrays, expected: Arrays, **tolerance) -> None:
    assert ours.keys() == expected.keys()
    for path, value in ours.items():
        assert value.dtype == expected[path].dtype
        as_float = [array.astype(np.float32) for array in (value, expected[path])]
        np.testing.assert_allclose(*as_float, **({"rtol": 1e-5, "atol": 1e-5} | tolerance), err_msg=path)

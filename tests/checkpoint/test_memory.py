"""Host memory beyond the arrays stays under 512 MiB while a checkpoint of a gigabyte is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 512 * 2**20

LOAD = """
import json, re, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxmoe.checkpoint import load_arrays, make_load_plan, open_checkpoint, whole_tensor_blocks
from jaxmoe.layers.param import ParamSpec
from jaxmoe.mesh import make_mesh

def status(key):
    return 1024 * int(re.search(rf"^{key}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.M)[1])

mesh = make_mesh(dp=1, tp=2, ep=4)
checkpoint = open_checkpoint(sys.argv[1])
dims = {"experts": ("ep", None, "tp"), "columns": (None, ("tp", "ep")), "rows": ("ep", None)}
specs = [
    ParamSpec(path=name, shape=info.shape, dtype=info.dtype, sharding=NamedSharding(mesh, PartitionSpec(*dims[name])))
    for name, info in checkpoint.tensors.items()
]
blocks = [block for spec in specs for block in whole_tensor_blocks(spec, spec.path)]
plan = make_load_plan(checkpoint, specs, blocks)
jax.device_put(np.zeros(8), jax.devices()[0]).block_until_ready()
open("/proc/self/clear_refs", "w").write("5")  # VmHWM counts from here
before = status("VmRSS")
arrays, report = load_arrays(plan, staging=sys.argv[2] == "staging")
jax.block_until_ready(arrays)
held = sum({s.data.unsafe_buffer_pointer(): s.data.nbytes for a in arrays.values() for s in a.addressable_shards}.values())
print(json.dumps({"beyond": status("VmHWM") - before - held, "held": held, "read": report.bytes_read}))
"""


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory):
    """1 GB of zeros that takes no room on the disk."""
    path = tmp_path_factory.mktemp("memory") / "model.safetensors"
    shapes = {"experts": (32, 2048, 2048), "columns": (24576, 2048), "rows": (8192, 8192)}  # float32
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape[0] * shape[1] * (shape[2] if len(shape) > 2 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    assert end > 2**30 * 0.9
    return path


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("path", ["direct", "staging"])
def test_peak_memory(gigabyte, path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD, str(gigabyte), path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    # The replicas of "rows" share memory on the direct path only.
    assert measured["held"] == measured["read"] + (2**28 if path == "staging" else 0)
    assert measured["beyond"] < LIMIT

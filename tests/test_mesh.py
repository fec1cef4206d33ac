"""Mesh construction, batch axes, and devices simulated in a fresh process."""

import os
import subprocess
import sys

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxmoe
from jaxmoe.mesh import axes_size, batch_axes, padded_batch, parse_mesh
from tests.support.meshes import MESH_SHAPES, mesh_of


def test_axes_and_sizes():
    mesh = jaxmoe.make_mesh(2, 2, 2)
    assert mesh.axis_names == ("dp", "tp", "ep")
    assert dict(mesh.shape) == {"dp": 2, "tp": 2, "ep": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_mesh_that_does_not_fit():
    with pytest.raises(ValueError, match=r"dp=1 x tp=2 x ep=2 is 4 devices, but there are 8 \(cpu\)"):
        jaxmoe.make_mesh(tp=2, ep=2)
    with pytest.raises(ValueError, match=r"tp is an integer of at least 1; got 0"):
        jaxmoe.make_mesh(tp=0)


def test_parse_mesh():
    assert parse_mesh("tp=2, ep=4") == {"dp": 1, "tp": 2, "ep": 4}
    for text in ("", "pp=2", "tp=2,tp=2", "tp=-1", "tp=0", "tp", "tp=two"):
        with pytest.raises(ValueError, match=r"a mesh is written dp=1,tp=2,ep=4"):
            parse_mesh(text)


@given(shape=st.sampled_from(MESH_SHAPES), batch_size=st.integers(1, 40))
def test_batch_axes_split_evenly_and_leave_the_fewest_rows(shape, batch_size):
    mesh = mesh_of(*shape)
    size = axes_size(mesh, batch_axes(mesh, batch_size))
    rows = padded_batch(mesh, batch_size)
    assert rows % size == 0
    assert rows >= batch_size
    assert rows // size == -(-batch_size // (mesh.shape["dp"] * mesh.shape["ep"]))


def run_python(code: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_simulated_devices():
    done = run_python(
        "import jaxmoe, jax; jaxmoe.simulate_devices(6); print(jax.device_count()); "
        "jaxmoe.simulate_devices(6); print('same', flush=True); jaxmoe.simulate_devices(4)"
    )
    assert done.stdout == "6\nsame\n", done.stderr
    assert "devices are simulated before JAX starts: 6 cpu devices are already running" in done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are counted as Linux names them")
def test_simulated_devices_have_two_threads_each_on_one_core():
    """With one thread a core, collectives of devices that wait for each other would keep them all for ever."""
    done = run_python(
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import jax, jaxmoe; jaxmoe.simulate_devices(6); jax.devices()\n"
        "names = [open(f'/proc/self/task/{task}/comm').read() for task in os.listdir('/proc/self/task')]\n"
        "print(names.count('tf_XLAEigen\\n'))"
    )
    assert done.stdout == "12\n", done.stderr

"""An nnx model with MoE layers, saved and restored by plain Orbax: right on another mesh, never wrong in silence."""

import re
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe import ExpertPlacement, MoE, MoEConfig
from tests.support.meshes import mesh_of
from tests.support.processes import ROOT, environment

CONFIG = MoEConfig(num_experts=8, num_experts_per_tok=2, hidden_size=16, moe_intermediate_size=8)
X = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
REPLICAS = ExpertPlacement(8, 4, [0, 1, 2, 3, 4, 5, 6, 7, 3, 3, 5, 5])
SWAPPED = ExpertPlacement(8, 4, [0, 1, 2, 3, 4, 5, 6, 7, 5, 5, 3, 3])


class Net(nnx.Module):
    """Somebody's own model."""

    def __init__(self, shape, placement, seed):
        mesh = mesh_of(*shape)
        self.project = nnx.Linear(16, 16, rngs=nnx.Rngs(seed))
        self.moe = MoE(CONFIG, mesh=mesh, placement=placement, rngs=nnx.Rngs(seed))
        nnx.update(self.project, jax.device_put(nnx.state(self.project), NamedSharding(mesh, P())))

    def __call__(self, x):
        return self.moe(self.project(x))[0]


STATES = {"whole": nnx.state, "parameters": lambda net: nnx.state(net, nnx.Param)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories by placement and kind of state, and the output."""
    root, found = tmp_path_factory.mktemp("states"), {}
    for name, placement in (("round_robin", "round_robin"), ("replicas", REPLICAS), ("linear", "linear")):
        net = Net((1, 2, 4), placement, 0)
        with ocp.StandardCheckpointer() as checkpointer:
            for kind, state_of in STATES.items():
                checkpointer.save(root / name / kind, state_of(net))
        found[name] = root / name, np.asarray(net(X))
    return found


def restore(net, directory, kind):
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(net, checkpointer.restore(directory / kind, STATES[kind](net)))
    return net


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize(("name", "placement"), [("round_robin", "round_robin"), ("replicas", REPLICAS)])
def test_onto_another_mesh(saved, name, placement, kind) -> None:
    directory, want = saved[name]
    np.testing.assert_allclose(restore(Net((2, 1, 4), placement, 1), directory, kind)(X), want, atol=1e-5)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize(
    ("name", "placement"),
    [("round_robin", "linear"), ("linear", "round_robin"), ("replicas", SWAPPED)],
    ids=["to linear", "from linear", "other replicas"],
)
def test_another_placement_is_refused_by_name(saved, name, placement, kind) -> None:
    """The shapes are the same, so that nothing else would tell."""
    net = Net((1, 2, 4), placement, 1)
    with pytest.raises(ValueError, match=r"(?s)tree structures do not match.*value_in_slots_"):
        restore(net, saved[name][0], kind)


def test_a_layer_that_is_not_made_has_the_names_too(tmp_path) -> None:
    def make():
        return MoE(CONFIG, mesh=mesh_of(1, 2, 4), placement="round_robin", rngs=nnx.Rngs(0))

    layer = make()
    graph, abstract = nnx.split(nnx.eval_shape(make))
    target = jax.tree.map(
        lambda one, like: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=like.sharding), abstract, nnx.state(layer)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.state(layer))
        checkpointer.wait_until_finished()
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "layer", target))
    np.testing.assert_array_equal(restored(X)[0], layer(X)[0])


def test_names_change_nothing_but_names() -> None:
    """States of all placements are trees of one structure: no program is compiled again for the sake of a name."""
    linear, other = (nnx.state(Net((1, 2, 4), placement, 0), nnx.Param) for placement in ("linear", "round_robin"))
    assert jax.tree.structure(linear) == jax.tree.structure(other)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(linear)]
    assert all(name.endswith(".value") for name in names)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, other)
    np.testing.assert_array_equal(doubled["moe"]["w_down"].get_value(), 2 * other["moe"]["w_down"].get_value())


@pytest.mark.full
def test_the_guide_is_true() -> None:
    page = (ROOT / "docs/how_to/orbax.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"<!-- tests/layers/test_states_in_orbax.py runs this -->\n```python\n(.*?)```", page, re.DOTALL
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"

"""A running model on other devices: equal parameters or logits, and nothing read that some device still has."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe import ExpertPlacement
from jaxmoe.layers import param_specs, params_by_path
from jaxmoe.models import Decoder
from jaxmoe.models.qwen3_moe import read_config
from tests.support.families import FAMILIES
from tests.support.goldens import GOLDENS, check_greedy, check_logits, check_same_parameters, read_expected

pytestmark = pytest.mark.covering(most=3)

QWEN = GOLDENS / "qwen3_moe" / "original"
EXPERTS, LAYERS, EXPERT_BYTES = 11, 2, 3 * 32 * 24 * 4


def on(shape, *, first: int = 0):
    count = int(np.prod(shape))
    return jaxmoe.make_mesh(*shape, devices=jax.devices()[first : first + count])


def check(model, *, bytes_read: int) -> None:
    """It has what the checkpoint gives its mesh, bit for bit, and no more; `test_goldens` has the logits of every mesh."""
    check_same_parameters(model, jaxmoe.load(QWEN, mesh=model.mesh, placement=model.placements))
    assert model.load_report.bytes_read == model.load_report.bytes_needed == bytes_read
    held: dict[int, int] = dict.fromkeys([device.id for device in model.mesh.devices.flat], 0)
    for param in params_by_path(model).values():
        for shard in param.get_value().addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    assert model.load_report.bytes_per_device == dict(sorted(held.items()))
    specs = {spec.path: spec for spec in param_specs(model)}
    for path, param in params_by_path(model).items():
        assert param.get_value().sharding == specs[path].sharding


@pytest.mark.full
def test_eight_to_four_to_eight() -> None:
    model = jaxmoe.load(QWEN, mesh=on((1, 1, 8)))
    for mesh, placement in [
        (on((1, 1, 4)), "linear"),
        (on((1, 1, 8)), "round_robin"),
        (on((1, 1, 4), first=4), ExpertPlacement.linear(EXPERTS, 4, num_slots=16)),
    ]:
        model = jaxmoe.move(model, mesh=mesh, placement=placement)
        check(model, bytes_read=0)


SHAPES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


PAIRS = [*itertools.pairwise(SHAPES), *itertools.pairwise(reversed(SHAPES))]
# The short run's pairs.
SHORT = [((1, 8, 1), (2, 2, 2)), ((1, 2, 4), (2, 2, 2))]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(*pair, marks=[] if pair in SHORT else pytest.mark.full) for pair in PAIRS],
    ids=str,
)
def test_between_meshes(before, after) -> None:
    """Heads and vocabulary padding differ by tp: rows are copied, dropped and padded."""
    model = jaxmoe.load(QWEN, mesh=on(before))
    moved = jaxmoe.move(model, mesh=on(after), placement="round_robin")
    check(moved, bytes_read=0)
    if (before, after) in SHORT:
        check_logits(moved, read_expected("qwen3_moe"))


@pytest.mark.full
def test_a_family_with_copied_key_heads_and_biases() -> None:
    model = jaxmoe.load(GOLDENS / "gpt_oss" / "original", mesh=on((1, 8, 1)))
    moved = jaxmoe.move(model, mesh=on((2, 2, 2)), placement="round_robin")
    check_logits(moved, read_expected("gpt_oss"))


@pytest.mark.full
def test_lost_experts_alone_are_read() -> None:
    placement = ExpertPlacement.linear(EXPERTS, 8)
    model = jaxmoe.load(QWEN, mesh=on((1, 1, 8)), placement=placement)
    lost = jax.devices()[1]
    moved = jaxmoe.move(model, mesh=on((1, 1, 4), first=2), lost_devices=[lost])
    check(moved, bytes_read=len(placement.device_experts(1)) * LAYERS * EXPERT_BYTES)
    check_greedy(moved, read_expected("qwen3_moe"))


@pytest.mark.full
def test_experts_with_a_replica_elsewhere_are_not_read() -> None:
    twice = ExpertPlacement(EXPERTS, 4, [*range(EXPERTS), *np.roll(np.arange(EXPERTS), 6), -1, -1])
    model = jaxmoe.load(QWEN, mesh=on((1, 1, 4)), placement=twice)
    check(jaxmoe.move(model, mesh=on((1, 1, 2), first=2), lost_devices=jax.devices()[:1]), bytes_read=0)


@pytest.mark.full
def test_experts_along_dp_are_replicas() -> None:
    model = jaxmoe.load(QWEN, mesh=on((2, 1, 4)))
    check(jaxmoe.move(model, mesh=on((1, 1, 4), first=4), lost_devices=jax.devices()[:4]), bytes_read=0)


@pytest.mark.full
@pytest.mark.parametrize("form", ["original", "fused"])
def test_a_lost_tp_rank(form) -> None:
    """It had a slice of everything that is split over tp; what is whole on the others is not read."""
    path = GOLDENS / "qwen3_moe" / form
    model = jaxmoe.load(path, mesh=on((1, 2, 2)))
    everything = model.load_report.bytes_read
    moved = jaxmoe.move(model, mesh=on((1, 1, 2)), lost_devices=jax.devices()[2:4])
    check_logits(moved, read_expected("qwen3_moe"))
    assert 0 < moved.load_report.bytes_read < everything


@pytest.mark.full
def test_the_text_part_of_a_multimodal_model_is_read_again_behind_its_prefix() -> None:
    model = jaxmoe.load(GOLDENS / "llama4" / "original", mesh=on((1, 2, 2)))
    moved = jaxmoe.move(model, mesh=on((1, 1, 2)), lost_devices=jax.devices()[2:4])
    check_logits(moved, read_expected("llama4"))


@pytest.mark.full
def test_a_moved_model_can_be_rebalanced_saved_and_moved_again(tmp_path) -> None:
    model = jaxmoe.load(QWEN, mesh=on((1, 2, 4)))
    model = jaxmoe.move(model, mesh=on((1, 2, 2)))
    model.rebalance(ExpertPlacement(EXPERTS, 2, [*reversed(range(EXPERTS)), -1]))
    check(model, bytes_read=0)
    jaxmoe.save(model, tmp_path / "saved")
    again = jaxmoe.load(tmp_path / "saved", mesh=on((1, 1, 1)))
    check_same_parameters(again, jaxmoe.load(QWEN, mesh=again.mesh))
    moved = jaxmoe.move(model, mesh=on((1, 1, 8)))
    check(moved, bytes_read=0)
    check_logits(moved, read_expected("qwen3_moe"))


def test_the_old_model_is_let_go_parameter_by_parameter() -> None:
    model = jaxmoe.load(QWEN, mesh=on((1, 1, 8)))
    jaxmoe.move(model, mesh=on((1, 1, 4)))
    assert all(isinstance(param.get_value(), jax.ShapeDtypeStruct) for param in params_by_path(model).values())


@pytest.mark.full
def test_a_recording_goes_on_through_a_move() -> None:
    model = jaxmoe.load(QWEN, mesh=on((1, 2, 4)))
    tokens = np.arange(12).reshape(2, 6)
    with model.record_routing() as routing:
        model(tokens)
        moved = jaxmoe.move(model, mesh=on((2, 2, 1)))
        moved(tokens)
    moved(tokens)
    assert moved.recorder is None
    first, second = routing.trace().counts
    assert np.array_equal(first, second)


@pytest.mark.full
def test_a_model_without_experts_moves_and_says_that_it_has_none() -> None:
    config = read_config({**FAMILIES["qwen3_moe"], "model_type": "qwen3_moe", "mlp_only_layers": [0, 1]})
    model = Decoder(config, mesh=on((1, 2, 2)), rngs=nnx.Rngs(0))
    tokens = np.arange(12).reshape(2, 6)
    logits = np.asarray(model(tokens))
    model = jaxmoe.move(model, mesh=on((2, 1, 2)))
    np.testing.assert_allclose(model(tokens), logits, atol=1e-5)
    with pytest.raises(ValueError, match="there is nothing to place"):
        model.rebalance("linear")
    with model.record_routing(), pytest.raises(ValueError, match="there is no routing to record"):
        model(tokens)


def test_refusals_leave_the_model_as_it_was() -> None:
    model = jaxmoe.load(QWEN, mesh=on((1, 1, 8)))
    with pytest.raises(ValueError, match=r"the new mesh has devices \[3\], which are among lost_devices"):
        jaxmoe.move(model, mesh=on((1, 1, 4)), lost_devices=jax.devices()[3:4])
    with pytest.raises(ValueError, match="tp=3 does not divide"):
        jaxmoe.move(model, mesh=on((1, 3, 1)))
    with pytest.raises(ValueError, match="the placement is for 11 experts on 8 devices"):
        jaxmoe.move(model, mesh=on((1, 1, 4)), placement=model.placements)
    check_logits(model, read_expected("qwen3_moe"))


@pytest.mark.full
def test_what_is_lost_and_on_no_disk_is_an_error() -> None:
    config = read_config({**FAMILIES["qwen3_moe"], "model_type": "qwen3_moe"})
    model = Decoder(config, mesh=on((1, 1, 8)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"cannot read them again: it came from no checkpoint; load it anew"):
        jaxmoe.move(model, mesh=on((1, 1, 4), first=4), lost_devices=jax.devices()[:1])
    tokens = np.arange(12).reshape(2, 6)
    before = np.asarray(model(tokens))
    np.testing.assert_allclose(jaxmoe.move(model, mesh=on((1, 1, 4)))(tokens), before, atol=1e-5)

"""Layers for multi-token prediction live: the published equations around transformers' decoder layer, with other weights."""

import numpy as np
import pytest

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="live parity needs torch and transformers: scripts/test --parity")
pytest.importorskip("transformers", reason="live parity needs torch and transformers: scripts/test --parity")

import jaxmoe  # noqa: E402
from scripts.make_mtp_goldens import reference  # noqa: E402
from tests.support.goldens import LOGIT_TOLERANCE  # noqa: E402
from tests.support.meshes import mesh_of  # noqa: E402
from tests.support.mtp import LAYOUTS, prediction_logits, write_checkpoint  # noqa: E402


@pytest.mark.parametrize("family", LAYOUTS)
def test_logits_of_every_depth(family, tmp_path) -> None:
    """One depth more than there are layers: the last one serves it too."""
    path, prompt = write_checkpoint(family, tmp_path / family, seed=3), np.random.default_rng(3).integers(3, 97, 19)
    depths = LAYOUTS[family].count + 1
    expected = reference(family, path, prompt.tolist(), depths)
    model = jaxmoe.load(path, mesh=mesh_of(1, 2, 2), mtp=True)
    for depth, logits in enumerate(prediction_logits(model, prompt, depths), 1):
        wanted = expected[f"logits_{depth}"]
        assert np.abs(logits - wanted).max() < LOGIT_TOLERANCE * np.abs(wanted).max()

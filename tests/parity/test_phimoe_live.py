"""Phi-3.5-MoE growing beyond its original context, against transformers' model called token by token."""

import numpy as np
import pytest
from flax import nnx

from tests.support.families import FAMILIES
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="live parity needs torch and transformers: scripts/test --parity")
pytest.importorskip("transformers", reason="live parity needs torch and transformers: scripts/test --parity")

import jaxmoe  # noqa: E402
from jaxmoe.models import Decoder  # noqa: E402
from scripts.make_goldens import make_model  # noqa: E402
from tests.support.goldens import LOGIT_TOLERANCE  # noqa: E402

CONTEXT = 10


# transformers 5.24 renames the argument; the old name is that of 5.23 as well.
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_token_by_token_with_a_cache(tmp_path):
    rope = {**FAMILIES["phimoe"]["rope_parameters"], "original_max_position_embeddings": CONTEXT}
    theirs = make_model("phimoe", seed=5, rope_parameters=rope)
    theirs.save_pretrained(tmp_path / "model")
    ours = jaxmoe.load(tmp_path / "model", mesh=mesh_of(1, 2, 2))
    tokens = np.random.default_rng(0).integers(3, 97, (1, 20), dtype=np.int32)
    prompt = tokens[:, : CONTEXT - 2]
    prefill, decode = nnx.jit(Decoder.prefill), nnx.jit(Decoder.decode)
    found, cache = prefill(
        ours, np.repeat(prompt, 2, 0), np.full(2, prompt.shape[1], np.int32), ours.init_cache(2, tokens.shape[1])
    )
    with torch.inference_mode():
        out = theirs(torch.tensor(prompt), use_cache=True)
        for position in range(prompt.shape[1], tokens.shape[1]):
            expected = out.logits[0, -1].numpy()
            assert np.abs(np.asarray(found)[0] - expected).max() < LOGIT_TOLERANCE * np.abs(expected).max()
            token = tokens[:, position]
            found, cache = decode(ours, np.repeat(token, 2), np.full(2, position, np.int32), cache)
            out = theirs(torch.tensor(token[:, None]), past_key_values=out.past_key_values, use_cache=True)

"""The shipped demo checkpoint, read by transformers."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="live parity needs torch and transformers: scripts/test --parity")
transformers = pytest.importorskip("transformers", reason="live parity needs transformers: scripts/test --parity")

import jaxmoe  # noqa: E402
from tests.support.meshes import mesh_of  # noqa: E402

DEMO = Path(__file__).parents[2] / "demo"
TEXT = Path(__file__).read_text(encoding="utf-8")


def test_logits_and_tokens_are_those_of_transformers():
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer(TEXT)["input_ids"][:200]
    reference = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits.numpy()
    model = jaxmoe.load(DEMO, mesh=mesh_of(2, 2, 2), dtype="float32")
    logits = np.asarray(model([ids]))
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    np.testing.assert_array_equal(logits.argmax(axis=-1), expected.argmax(axis=-1))

    greedy = reference.generate(torch.tensor([ids[:60]]), max_new_tokens=24, do_sample=False)[0, 60:].tolist()
    (out,) = jaxmoe.generate(model, [ids[:60]], max_new_tokens=24)
    assert out.token_ids == greedy
    assert out.text == tokenizer.decode(greedy)

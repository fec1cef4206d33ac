#!/usr/bin/env python3
"""Make tests/goldens/kimi_k3: a tiny random checkpoint as the publisher has them, and what a NumPy model computes from it.

transformers does not have Kimi K3; the model is tests/support/kimi_k3.py, written from the published description. The same
seed gives the same files:

    python scripts/make_kimi_k3_goldens.py
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.families import EOS, NEW_TOKENS, PROMPT_LENGTHS
from tests.support.kimi_k3 import CONFIG, SMALL, make_expected, make_tensors


def main() -> None:
    """Write the checkpoint and the results."""
    directory = ROOT / "tests" / "goldens" / "kimi_k3"
    (directory / "original").mkdir(parents=True, exist_ok=True)
    text = json.dumps(CONFIG, indent=2, sort_keys=True)
    (directory / "original" / "config.json").write_text(text + "\n", encoding="utf-8")
    tensors = {f"language_model.{name}": tensor for name, tensor in make_tensors(SMALL, seed=0).items()}
    rng = np.random.default_rng(1)
    beside = {
        f"{part}.weight": rng.standard_normal((2, 3)).astype(np.float32) for part in ("vision_tower", "mm_projector")
    }
    save_file({**tensors, **beside}, directory / "original" / "model.safetensors", metadata={"format": "pt"})
    prompts = [rng.integers(EOS + 1, SMALL["vocab_size"], length).tolist() for length in PROMPT_LENGTHS]
    np.savez_compressed(directory / "expected.npz", **make_expected(prompts, NEW_TOKENS, seed=0))


if __name__ == "__main__":
    main()

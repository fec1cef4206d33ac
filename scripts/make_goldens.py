#!/usr/bin/env python3
"""Make tests/goldens: tiny random checkpoints of every family, and what transformers computes from them.

Needs torch and transformers (the "parity" extra). The same seed gives the same files:

    python scripts/make_goldens.py [FAMILY ...]
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.families import EOS, FAMILIES, NEW_TOKENS, PROMPT_LENGTHS, WRAPPERS


def make_model(model_type: str, seed: int, **changes: Any) -> torch.nn.Module:
    """A random transformers model in float32 whose experts, norms and biases all matter."""
    sizes = {**FAMILIES, **WRAPPERS}.get(model_type, {})
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **changes})
    config.dtype = torch.float32
    multimodal = config.get_text_config() is not config
    auto_class = transformers.AutoModelForMultimodalLM if multimodal else transformers.AutoModelForCausalLM
    model = auto_class.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Some families hold these as buffers.
        buffers = [
            one for one in model.named_buffers() if one[0].endswith(("correction_bias", "layer_scalar", "tid2eid"))
        ]
        for name, parameter in sorted([*model.named_parameters(), *buffers]):
            if name.endswith("tid2eid"):
                # The experts of each token, which differ from each other.
                order = torch.rand(parameter.shape[0], model.config.num_local_experts, generator=generator).argsort(-1)
                parameter.copy_(order[:, : parameter.shape[1]])
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                # Slow enough that states remember a whole prompt.
                parameter.copy_(noise - 2.0)
            elif parameter.ndim == 1 or name.endswith("correction_bias"):
                parameter.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(noise * (2.0 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5))
    return model


def make_prompts(vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of different lengths, without the end-of-sequence token."""
    rng = np.random.default_rng(seed)
    return [rng.integers(EOS + 1, vocab_size, length).tolist() for length in PROMPT_LENGTHS]


@torch.inference_mode()
def reference(model: torch.nn.Module, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> dict[str, np.ndarray]:
    """Logits of each prompt's every position, and the tokens that follow it greedily, each prompt on its own."""
    if model.config.model_type == "llama4":
        # As of transformers 5.24 the wrapper's forward fails without an image; its text part is a whole model.
        model = model.language_model
    if model.config.model_type == "qwen3_omni_moe":
        model = model.thinker  # The rest speaks.
    expected = {}
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected[f"prompt_{i}"] = np.array(prompt, np.int32)
        expected[f"logits_{i}"] = model(ids).logits[0].numpy()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected[f"greedy_{i}"] = out[0, len(prompt) :].numpy().astype(np.int32)
    return expected


def save_forms(model: torch.nn.Module, directory: Path) -> None:
    """Write both forms: as released (one file) and as transformers 5 holds it (fused experts, sharded), if that differs."""
    model.save_pretrained(directory / "original")
    model.save_pretrained(directory / "fused", save_original_format=False, max_shard_size="60KB")
    if tensor_names(directory / "original") == tensor_names(directory / "fused"):
        shutil.rmtree(directory / "fused")
    for form in directory.iterdir():
        # The version of transformers is no part of what is tested.
        for path in (form / "config.json", form / "generation_config.json"):
            fields = json.loads(path.read_text())
            fields.pop("transformers_version", None)
            path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def tensor_names(directory: Path) -> set[str]:
    """Names of the tensors of a checkpoint."""
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return names


def main() -> None:
    """Remake the goldens of the named families, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=[*FAMILIES, *WRAPPERS], help="default: all")
    for model_type in parser.parse_args().families:
        directory = ROOT / "tests" / "goldens" / model_type
        shutil.rmtree(directory, ignore_errors=True)
        model = make_model(model_type, seed=0)
        save_forms(model, directory)
        expected = reference(model, make_prompts(model.config.get_text_config().vocab_size, seed=1))
        np.savez_compressed(directory / "expected.npz", **expected)
        print(
            f"{directory.relative_to(ROOT)}: {sum(f.stat().st_size for f in directory.rglob('*') if f.is_file())} bytes"
        )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Make tests/goldens/mtp: what layers for multi-token prediction compute, by the published equations.

transformers has no such layers. Each is put together here around its decoder layer: a model of that one layer is given the
joined embedding and hidden state as its input embeddings. Needs torch and transformers (the "parity" extra):

    python scripts/make_mtp_goldens.py [FAMILY ...]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.mtp import LAYOUTS, write_checkpoint

_PROMPT = 23

# Settings that make the one layer of a model the kind that predicts.
ONE_LAYER: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 0},
    "deepseek_v32": {"layer_types": ["indexed_attention"], "mlp_layer_types": ["sparse"]},
    "glm_moe_dsa": {"layer_types": ["indexed_attention"], "mlp_layer_types": ["sparse"], "indexer_types": ["full"]},
    "glm4_moe": {"first_k_dense_replace": 0},
    "glm4_moe_lite": {"mlp_layer_types": ["sparse"]},
    "qwen3_next": {"layer_types": ["full_attention"], "mlp_only_layers": []},
    "qwen3_5_moe_text": {"layer_types": ["full_attention"]},
    "mimo_v2_flash": {"layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]},
}
# What the next depth starts from: the layer's result, the same after its last norm, or what the first depth started from.
PASSES = {"qwen3_next": "normed", "qwen3_5_moe_text": "normed", "mimo_v2_flash": "main"}


def reference(family: str, checkpoint: Path, prompt: list[int], depths: int) -> dict[str, np.ndarray]:
    """Compute the logits of each depth at the positions where the tokens that it needs are known.

    Args:
        family: name in `LAYOUTS`.
        checkpoint: directory from `write_checkpoint`.
        prompt: tokens.
        depths: number of them; the last layer serves those that have none.
    """
    layout, tensors = LAYOUTS[family], load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    ids, n = torch.tensor([prompt]), len(prompt)
    result = {"prompt": np.array(prompt)}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        hidden = main = model.model(ids).last_hidden_state
        for depth in range(1, depths + 1):
            mtp = min(depth, layout.count) - 1
            at = {"layer": config["num_hidden_layers"] + mtp, "mtp": mtp}
            names = {part: name.format(**at) for part, name in layout.names.items()}
            one = _one_layer(family, config, tensors, layout.prefix.format(**at), names, Path(folder) / str(depth))
            embedding = model.model.embed_tokens(ids[:, depth:])
            parts = [
                _norm(model.model.norm, tensors[names["embed_norm"]])(embedding),
                _norm(model.model.norm, tensors[names["hidden_norm"]])(hidden[:, : n - depth]),
            ]
            joined = torch.cat(parts, dim=-1) @ torch.from_numpy(tensors[names["join"]]).T
            streams: list[torch.Tensor] = []
            one.model.norm.register_forward_pre_hook(lambda _, args, seen=streams: seen.append(args[0]))
            result[f"logits_{depth}"] = one(inputs_embeds=joined).logits[0].numpy()
            normed = one.model.norm(streams[0])
            hidden = {"stream": streams[0], "normed": normed, "main": main}[PASSES.get(family, "stream")]
    return result


def _one_layer(
    family: str,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    prefix: str,
    names: dict[str, str],
    directory: Path,
) -> torch.nn.Module:
    """A model of the family with this layer alone, its last norm, and the tables of the whole model."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, **ONE_LAYER[family]}))
    one = {
        "model.embed_tokens.weight": tensors["model.embed_tokens.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
        "model.norm.weight": tensors[names["out_norm"]],
    }
    for name, value in tensors.items():
        if name.startswith(prefix) and name not in names.values():
            part = name.removeprefix(prefix).replace("pre_mlp_layernorm", "post_attention_layernorm")
            one[f"model.layers.0.{part}"] = value
    save_file(one, directory / "model.safetensors", metadata={"format": "pt"})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"], f"{family}: not in the layer: {report['missing_keys']}"
    assert not report["unexpected_keys"], f"{family}: no part of the layer: {report['unexpected_keys']}"
    return model.eval()


def _norm(like: torch.nn.Module, weight: np.ndarray) -> torch.nn.Module:
    """A norm of the same kind with other weights."""
    eps = getattr(like, "variance_epsilon", None) or like.eps
    norm = type(like)(weight.size, eps=eps)
    norm.weight.data = torch.from_numpy(weight)
    return norm


def main() -> None:
    """Remake the goldens of the named families, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(LAYOUTS), help="default: all")
    directory = ROOT / "tests" / "goldens" / "mtp"
    directory.mkdir(exist_ok=True)
    for family in parser.parse_args().families:
        prompt = np.random.default_rng(7).integers(3, 97, _PROMPT).tolist()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_checkpoint(family, Path(folder) / family)
            expected = reference(family, checkpoint, prompt, LAYOUTS[family].count)
        np.savez_compressed(directory / f"{family}.npz", **expected)
        print(f"{family}: {', '.join(expected)}")


if __name__ == "__main__":
    main()

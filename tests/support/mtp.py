"""Tiny checkpoints with layers for multi-token prediction, which transformers leaves out: a golden one and more tensors.

Names are those of the released files. A part of such a layer has the sizes of the like part of another layer.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxmoe.mesh import batch_axes
from jaxmoe.models.padding import prompt_positions
from jaxmoe.models.speculation import layers_by_depth
from tests.support.goldens import GOLDENS

_BEHIND = {
    "embed_norm": "model.layers.{layer}.enorm.weight",
    "hidden_norm": "model.layers.{layer}.hnorm.weight",
    "join": "model.layers.{layer}.eh_proj.weight",
    "out_norm": "model.layers.{layer}.shared_head.norm.weight",
    "embedding": "model.layers.{layer}.embed_tokens.weight",
    "head": "model.layers.{layer}.shared_head.head.weight",
}
_QWEN = {
    "embed_norm": "mtp.pre_fc_norm_embedding.weight",
    "hidden_norm": "mtp.pre_fc_norm_hidden.weight",
    "join": "mtp.fc.weight",
    "out_norm": "mtp.norm.weight",
}
_MIMO = {
    "embed_norm": "model.mtp.layers.{mtp}.enorm.weight",
    "hidden_norm": "model.mtp.layers.{mtp}.hnorm.weight",
    "join": "model.mtp.layers.{mtp}.eh_proj.weight",
    "out_norm": "model.mtp.layers.{mtp}.final_layernorm.weight",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layers for multi-token prediction of a family.

    Attributes:
        count: number of them here.
        attention: layer of the golden checkpoint whose attention and norms theirs are like.
        feed_forward: layer whose feed-forward part theirs is like.
        names: names of the combining parts.
        prefix: beginning of the names of the layer's tensors.
        settings: settings of config.json that say so.
        norms: names of the two norms of the layer.
    """

    count: int
    attention: int
    feed_forward: int
    names: Mapping[str, str]
    prefix: str = "model.layers.{layer}."
    settings: Mapping[str, int] = dataclasses.field(default_factory=dict)
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")


LAYOUTS = {
    "deepseek_v3": Layout(2, 1, 1, _BEHIND, settings={"num_nextn_predict_layers": 2}),
    "deepseek_v32": Layout(1, 1, 1, _BEHIND, settings={"num_nextn_predict_layers": 1}),
    "glm_moe_dsa": Layout(1, 2, 2, _BEHIND, settings={"num_nextn_predict_layers": 1}),
    "glm4_moe": Layout(1, 1, 1, _BEHIND),
    "glm4_moe_lite": Layout(1, 1, 0, _BEHIND),
    "qwen3_next": Layout(1, 1, 0, _QWEN, "mtp.layers.{mtp}."),
    "qwen3_5_moe_text": Layout(1, 1, 1, _QWEN, "mtp.layers.{mtp}."),
    "mimo_v2_flash": Layout(3, 2, 0, _MIMO, "model.mtp.layers.{mtp}.", norms=("input_layernorm", "pre_mlp_layernorm")),
}


def write_checkpoint(family: str, directory: Path, *, scale: float | None = None, seed: int = 0) -> Path:
    """Write the golden checkpoint of a family with layers for multi-token prediction.

    Args:
        family: name in `LAYOUTS`.
        directory: directory to make.
        scale: factor of what attention and feed-forward parts add to the residual stream. The tables are then made so that
            the token behind t is t + 1 where this is 0, and the layers for multi-token prediction know it too: all drafts
            are right. In between, some are. None leaves all as it is, and next to no draft is right.
        seed: seed of the new tensors.
    """
    layout, rng = LAYOUTS[family], np.random.default_rng(seed)
    shutil.copytree(GOLDENS / family / "original", directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | dict(layout.settings)))
    tensors = load_file(directory / "model.safetensors")
    new: dict[str, np.ndarray] = {}
    own = config["num_hidden_layers"]
    for mtp in range(layout.count):
        at = {"layer": own + mtp, "mtp": mtp}
        prefix = layout.prefix.format(**at)
        for name in list(tensors):
            for layer, part in ((layout.attention, "self_attn."), (layout.feed_forward, "mlp.")):
                if name.startswith(f"model.layers.{layer}.{part}"):
                    like = tensors[name]
                    noise = rng.permutation(like.reshape(-1)).reshape(like.shape)
                    new[prefix + name.removeprefix(f"model.layers.{layer}.")] = noise
        for norm in layout.norms:
            new[f"{prefix}{norm}.weight"] = rng.permutation(tensors["model.norm.weight"])
        new |= _combining(layout, at, tensors, rng)
    tensors |= new
    if scale is not None:
        _make_predictable(layout, own, tensors, scale, rng)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, directory / "model.safetensors")
    return directory


def _combining(
    layout: Layout, at: Mapping[str, int], tensors: Mapping[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    names = {part: name.format(**at) for part, name in layout.names.items()}
    D = tensors["model.norm.weight"].size
    made = {
        names[part]: rng.permutation(tensors["model.norm.weight"]) for part in ("embed_norm", "hidden_norm", "out_norm")
    }
    made[names["join"]] = rng.normal(0, D**-0.5, (D, 2 * D)).astype(np.float32)
    if "head" in names:
        made[names["embedding"]] = tensors["model.embed_tokens.weight"]
        made[names["head"]] = tensors["lm_head.weight"]
    return made


def _make_predictable(
    layout: Layout, own: int, tensors: dict[str, np.ndarray], scale: float, rng: np.random.Generator
) -> None:
    for name, value in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
            tensors[name] = value * np.float32(scale)
    V, D = tensors["lm_head.weight"].shape
    table = rng.normal(size=(V, D)).astype(np.float32)
    table *= np.sqrt(D) / np.linalg.norm(table, axis=1, keepdims=True)
    tensors["model.embed_tokens.weight"] = table
    tensors["lm_head.weight"] = np.roll(table, 1, axis=0)
    for mtp in range(layout.count):
        at = {"layer": own + mtp, "mtp": mtp}
        names = {part: name.format(**at) for part, name in layout.names.items()}
        tensors[names["join"]] = np.concatenate([np.eye(D), np.zeros((D, D))], axis=1).astype(np.float32)
        if "head" in names:
            tensors[names["embedding"]], tensors[names["head"]] = table, tensors["lm_head.weight"]


def prediction_logits(model, prompt: np.ndarray, depths: int) -> list[np.ndarray]:
    """The logits of each depth at the positions of one prompt where the tokens that it needs are known."""
    rows, n = model.padded_batch(1), len(prompt)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, tokens_BS):
        model = nnx.merge(graphdef, state)
        positions_BS, mask_BS = prompt_positions(jnp.full(rows, n, jnp.int32), n)
        hidden_BSD, _, _ = model.hidden_and_stats(tokens_BS, positions_BS, mask_BS, None)
        logits = []
        for depth, layer in enumerate(layers_by_depth(model, depths), 1):
            ahead_BS = jnp.pad(tokens_BS[:, depth:], ((0, 0), (0, depth)))
            normed_BSD, hidden_BSD, _, _ = layer.predict(
                hidden_BSD, model.embedded(ahead_BS), positions_BS, mask_BS, None, batch_axes(model.mesh, rows)
            )
            logits.append(model.logits_of(normed_BSD)[0, : n - depth])
        return logits

    return [np.asarray(logits) for logits in run(state, jnp.tile(jnp.asarray(prompt, jnp.int32), (rows, 1)))]

"""A model on its mesh, in words."""

from itertools import groupby
from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxmoe.layers import MoE
from jaxmoe.models.padding import bucket_length

if TYPE_CHECKING:
    from jaxmoe.models.decoder import Decoder


def describe(model: "Decoder", batch_size: int, prompt_length: int) -> str:
    """See `Decoder.describe`."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in model.mesh.shape.items())
    platform = model.mesh.devices.flat[0].platform
    lines = [
        f"{model.config.model_type} in {jnp.dtype(model.dtype).name}, {len(model.config.layers)} layers, "
        f"{len(model.moe_layers)} of them with routed experts",
        f"mesh {sizes}: {model.mesh.size} {platform} device{'s' if model.mesh.size > 1 else ''}",
    ]
    lines += _runs([_experts(moe) for moe in model.moe_layers])
    # What is computed, padding included, is what a dispatch is chosen for.
    rows, length = model.padded_batch(batch_size), bucket_length(prompt_length, model.config.max_position_embeddings)
    phases = {"prefill": (model.dispatch.prefill, rows * length), "decode": (model.dispatch.decode, rows)}
    for phase, (name, tokens) in phases.items():
        if name == "auto":
            lines += _runs([f"{phase}: {moe.explain_dispatch(tokens, model.dtype)}" for moe in model.moe_layers])
        else:
            lines.append(f"{phase}: {name}, as it was asked for")
    return "\n".join(lines)


def _experts(moe: MoE) -> str:
    placement, config = moe.placement, moe.config
    replicas = placement.num_slots - placement.num_padding - placement.num_experts
    return (
        f"{config.num_experts} experts, {config.num_experts_per_tok} to a token, in {placement.num_slots} slots "
        f"({replicas} replicas, {placement.num_padding} padding), {placement.slots_per_device} on each of {placement.ep} "
        f"devices along {', '.join(moe.expert_axes)}"
    )


def _runs(texts: list[str]) -> list[str]:
    """One line for each run of MoE layers that have the same to say."""
    lines, first = [], 0
    for text, same in groupby(texts):
        count = len(list(same))
        layers = f"{first}" if count == 1 else f"{first} to {first + count - 1}"
        lines.append(text if count == len(texts) else f"MoE layer{'s' if count > 1 else ''} {layers}: {text}")
        first += count
    return lines

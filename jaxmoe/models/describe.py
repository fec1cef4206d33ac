"""A model on its mesh, in words."""

from itertools import groupby

from jaxmoe.layers import MoE
from jaxmoe.mesh import padded_batch
from jaxmoe.models.kernels import describe_kernels
from jaxmoe.models.network import DecoderNetwork
from jaxmoe.models.padding import bucket_length
from jaxmoe.models.parts import describe_packed


def describe(model: DecoderNetwork, *, batch_size: int, prompt_length: int) -> str:
    """The lines of `Decoder.describe`."""
    config, mesh, dtype, moe_layers = model.config, model.mesh, model.dtype, model.moe_layers
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    platform = mesh.devices.flat[0].platform
    predicting = "" if config.mtp is None else f", the last {config.mtp.num_layers} for multi-token prediction"
    lines = [
        f"{config.model_type} in {dtype.name}, {len(config.layers)} layers, "
        f"{len(moe_layers)} of them with routed experts{predicting}",
        f"mesh {sizes}: {mesh.size} {platform} device{'s' if mesh.size > 1 else ''}",
    ]
    if packed := describe_packed(model, dtype):
        lines.append(f"held packed: {packed}; other weights in {dtype.name}")
    lines += describe_kernels(model, mesh, dtype, model.kernels)
    lines += _runs([_experts(moe) for moe in moe_layers])
    # What is computed, padding included, is what a dispatch is chosen for.
    rows = padded_batch(mesh, batch_size)
    length = bucket_length(prompt_length, config.max_position_embeddings)
    phases = {"prefill": (model.dispatch.prefill, rows * length), "decode": (model.dispatch.decode, rows)}
    for phase, (name, tokens) in phases.items():
        if name == "auto":
            lines += _runs([f"{phase}: {moe.explain_dispatch(tokens, dtype)}" for moe in moe_layers])
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

"""The forms in which `jaxmoe.load` would hold the quantized weights of a checkpoint."""

from jaxmoe.checkpoint.formats import DecodedTensor
from jaxmoe.checkpoint.mapping import MappedCheckpoint, abstract_model, asked_activations, pack_model
from jaxmoe.config import DecoderConfig
from jaxmoe.mesh import AXES
from jaxmoe.models.parts import describe_packed
from jaxmoe.quant.activations import describe_asked


def describe_holding(config: DecoderConfig, mapped: MappedCheckpoint) -> tuple[str, ...]:
    """Say which parts of a model this version keeps packed, in which form, and why it decodes others; one sentence each.

    So it says what activations the checkpoint asks for.

    Args:
        config: config of the model.
        mapped: checkpoint mapped to the parameters of the model on one device.

    Returns:
        Nothing for a checkpoint without quantized weights.
    """
    if not any(isinstance(tensor, DecodedTensor) for tensor in mapped.checkpoint.tensors.values()):
        return ()
    model = abstract_model(config, sizes=dict.fromkeys(AXES, 1), dtype=config.dtype or "bfloat16")
    choice = pack_model(model, mapped)
    packed = describe_packed(model, model.dtype)
    asked = describe_asked(asked_activations(mapped))
    return (*([f"kept packed: {packed}"] if packed else []), *choice.notes(), *asked)

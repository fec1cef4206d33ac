"""`StepMemory`: an estimate of what a step needs beside weights and cache, from shapes and the way in which layers compute.

A program reuses its memory from layer to layer, so it needs what its widest point needs. The points of prefill and decode
are counted one by one; T tokens are on a device, b sequences of S tokens, and each attends to C keys; bytes are those of the
model's dtype where no other is named. At every point there are the residual stream, T · D for each stream, and the normed
input of a half of the layer, T · D. Besides:

- *attention*: what its matrices give; queries, and in a prefill of latent attention keys, as they are multiplied; the result
  twice, as a loop's carry and behind it; and the scores of all heads of this device, [b, H, s, C] in float32 and once more
  as probabilities, for s = 512 queries at a time. A mixer without keys has what its matrices give in float32 too. Behind it
  the result and its product with the last matrix, in float32, before the sum over tp and after it.
- *dense MLP*: gate, up and their product, and what the last matrix gives, as behind attention.
- *routed experts*: the dispatch's workspace (`Dispatch.workspace_bytes`); the matrices of one expert, which the portable
  kernel copies, in float32 where they are packed, or the rows between the two products, which a GPU's kernel stores,
  whichever is more; the router's logits, in and out of float32; and a shared expert, which is computed meanwhile.
- *head*: the logits of b tokens in float32, a tp rank's, gathered, and as they are given out.

A packed matrix outside the experts is decoded in parts, of which one is counted. The integers that say where rows go are
left out, and so is what an indexer needs besides its scores.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxmoe.checkpoint.mapping import is_expert_stack, layer_index
from jaxmoe.config import AttentionConfig, LayerConfig, MLAConfig
from jaxmoe.dispatch.local import pairs_per_trip
from jaxmoe.kernels.grouped_matmul.one_matrix import PART_BYTES
from jaxmoe.kernels.grouped_matmul.row_loops import rows_per_tile
from jaxmoe.layers import dispatch_shape
from jaxmoe.layers.attention import QUERY_BLOCK
from jaxmoe.mesh import TP, batch_axes, padded_batch
from jaxmoe.models import Decoder
from jaxmoe.planning.planned_model import PlannedModel
from jaxmoe.planning.roofline import chosen_dispatch

_FLOAT32 = 4


class Workspace(NamedTuple):
    """Bytes of a device that one step needs beside weights and cache, at its widest point.

    Attributes:
        dispatch: bytes of the largest dispatch workspace of a call.
        temporaries: bytes of everything else at the widest point, which takes the dispatch's for other arrays where it is no
            point of routed experts.
    """

    dispatch: int
    temporaries: int

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self.dispatch + self.temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """Layers that need alike.

    Attributes:
        config: config of the layers.
        outputs: {path of a matrix in the layer: outputs of it on a device}, experts left out.
        decoded: bytes of the largest part of a packed matrix that is decoded at once, 0 without one.
        expert: bytes of one expert's matrices as the portable kernel copies them.
        slots: slots of a device.
    """

    config: LayerConfig
    outputs: dict[str, int]
    decoded: int
    expert: int
    slots: int


class _Phase(NamedTuple):
    """One step: `tokens` T of a device and `everywhere`, b `sequences` of it, S tokens of each, and C `keys`."""

    tokens: int
    everywhere: int
    sequences: int
    length: int
    keys: int
    decode: bool


class StepMemory:
    """Estimate of what prefill and decode of a model need beside weights and cache, see the module's text.

    Args:
        model: model without values, its parameters packed where they are to be.
        dispatch: backend of `jaxmoe.dispatch`, or "auto" for what the layers would take.
    """

    def __init__(self, model: Decoder | PlannedModel, dispatch: str = "auto"):
        model = PlannedModel.of(model)
        self.model, self.dispatch = model, dispatch
        self.tp, self.itemsize, self.width = model.mesh.shape[TP], model.dtype.itemsize, model.config.hidden_size
        self._kinds: list[tuple[_Kind, Any]] = []
        for layer, kind in _kinds(model):
            if all(kind != other for other, _ in self._kinds):
                self._kinds.append((kind, layer))

    def __call__(self, *, batch_size: int, prompt_length: int, max_length: int) -> dict[str, Workspace]:
        """Estimate both steps, {"prefill": ..., "decode": ...}.

        Args:
            batch_size: number of sequences.
            prompt_length: number of tokens of each in the prefill.
            max_length: number of tokens of each that the cache is for.
        """
        mesh = self.model.mesh
        rows = padded_batch(mesh, batch_size)
        here = rows // math.prod([mesh.shape[axis] for axis in batch_axes(mesh, rows)])
        prefill = _Phase(here * prompt_length, rows * prompt_length, here, prompt_length, prompt_length, False)
        decode = _Phase(here, rows, here, 1, max_length, True)
        return {"prefill": self._widest(prefill), "decode": self._widest(decode)}

    def _widest(self, phase: _Phase) -> Workspace:
        points = list(self._points(phase))
        dispatch = max([workspace for workspace, _ in points])
        return Workspace(int(dispatch), int(max(map(sum, points)) - dispatch))

    def _points(self, phase: _Phase) -> Iterator[tuple[float, float]]:
        """Bytes of a dispatch and bytes besides, of each point."""
        T, D, config = phase.tokens, self.width, self.model.config
        streams = 1 if config.streams is None else config.streams.streams
        base = T * D * self.itemsize * (streams + 1)
        vocabulary = config.vocab_size * (2 + 1 / self.tp if self.tp > 1 else 2)
        yield 0, base + phase.sequences * vocabulary * _FLOAT32
        for kind, layer in self._kinds:
            if kind.config.attention is not None:
                inside, result = self._attention(kind, phase)
                yield 0, base + kind.decoded + inside
                yield 0, base + kind.decoded + result + self._product(phase)
            if dense := _widths(kind, "mlp."):
                yield 0, base + kind.decoded + T * self.itemsize * (sum(dense) + max(dense)) + self._product(phase)
            if hasattr(layer, "moe"):
                dispatch, besides = self._experts(kind, layer.moe, phase)
                yield dispatch, base + besides

    def _product(self, phase: _Phase) -> float:
        """Bytes of what the last matrix of a half gives, and of its sum over tp."""
        return phase.tokens * self.width * _FLOAT32 * (2 if self.tp > 1 else 1)

    def _attention(self, kind: _Kind, phase: _Phase) -> tuple[float, float]:
        """Bytes inside a token mixer, and of its result."""
        config, T, itemsize = kind.config.attention, phase.tokens, self.itemsize
        outputs = {path: width for path, width in kind.outputs.items() if path.startswith("attention.")}
        if phase.decode:
            outputs.pop("attention.w_kv_b", None)
        made = T * sum(width for path, width in outputs.items() if not path.endswith((".w_o", ".w_out")))
        if not isinstance(config, AttentionConfig | MLAConfig):
            return made * (itemsize + _FLOAT32), made * itemsize
        heads = config.num_heads / self.tp
        queries = min(phase.length, QUERY_BLOCK)
        scores = phase.sequences * heads * queries * phase.keys * (_FLOAT32 + itemsize)
        if isinstance(config, AttentionConfig):
            result = T * heads * config.value_width * itemsize
            return (made + T * heads * config.head_dim) * itemsize + 2 * result + scores, result
        result = T * heads * config.v_head_dim * itemsize
        if config.indexer is not None:
            choosing = phase.sequences * config.indexer.num_heads * queries * phase.keys * _FLOAT32
            scores += choosing + phase.tokens * phase.keys
        if phase.decode:
            return (made + 2 * T * heads * config.kv_rank) * itemsize + result + scores, result
        turned = 2 * T * heads * (config.nope_head_dim + config.rope_head_dim)
        return (made + turned) * itemsize + 3 * result + scores, result

    def _experts(self, kind: _Kind, moe: Any, phase: _Phase) -> tuple[float, float]:
        """Bytes of the dispatch, and of what there is besides."""
        shape = dispatch_shape(moe, phase.everywhere)
        layout, K = shape.layout, moe.config.num_experts_per_tok
        backend = chosen_dispatch(shape, self.dispatch)
        served = shape.tokens_served
        pairs = pairs_per_trip(served, K, served * K / layout.num_devices, layout.buffers)
        copied = kind.expert if rows_per_tile(pairs, kind.slots) > 1 else 0
        between = pairs * moe.config.moe_intermediate_size / layout.num_partial * self.itemsize
        besides = max(copied, between) + 2 * phase.tokens * moe.config.num_experts * _FLOAT32
        if shared := _widths(kind, "moe.shared."):
            besides += phase.tokens * self.itemsize * (sum(shared) + max(shared) + self.width)
        return backend.workspace(shape), besides


def _kinds(model: PlannedModel) -> Iterator[tuple[Any, _Kind]]:
    """Every layer that a token goes through, and what it needs."""
    packings, itemsize = model.packings, model.dtype.itemsize
    outputs: dict[int, dict[str, int]] = {}
    decoded: dict[int, int] = {}
    expert: dict[int, int] = {}
    for spec in model.plain_specs:
        index = layer_index(spec.path)
        if index is None or len(spec.shape) < 2:
            continue
        shape = spec.sharding.shard_shape(spec.shape)
        if is_expert_stack(spec.path):
            size = math.prod(shape[1:]) * (_FLOAT32 if spec.path in packings else itemsize)
            expert[index] = expert.get(index, 0) + size
            continue
        outputs.setdefault(index, {})[spec.path.split(".", 2)[2]] = shape[0]
        if spec.path in packings:
            decoded[index] = max(decoded.get(index, 0), min(math.prod(shape) * itemsize, PART_BYTES))
    for index, layer in enumerate(model.layers[: model.config.num_main_layers]):
        yield (
            layer,
            _Kind(
                config=model.config.layers[index],
                outputs=outputs.get(index, {}),
                decoded=decoded.get(index, 0),
                expert=expert.get(index, 0),
                slots=layer.moe.placement.slots_per_device if hasattr(layer, "moe") else 0,
            ),
        )


def _widths(kind: _Kind, prefix: str) -> list[int]:
    """Widths of an MLP's matrices that are multiplied with its inputs: gate and up, or up alone."""
    names = [f"{prefix}{name}" for name in ("w_gate", "w_up")]
    return [kind.outputs[name] for name in names if name in kind.outputs]

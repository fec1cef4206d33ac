"""`PlannedModel`: a model as a plan looks at it, with layers that are alike made once and all parameters listed."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxmoe.checkpoint.mapping import layer_index
from jaxmoe.config import DecoderConfig
from jaxmoe.layers import MoE, ParamSpec, packings_of, param_specs, part_specs, unpacked_specs
from jaxmoe.models import Decoder
from jaxmoe.models.decoder_layer import DecoderLayer
from jaxmoe.placement import ExpertPlacement
from jaxmoe.quant.packing import Packing


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """A model without values, and what of it is counted more than once.

    Attributes:
        config: config of the model.
        mesh: mesh of it, an abstract one.
        dtype: dtype of its plain weights.
        layers: its layers; those that are alike may be one object.
        specs: specs of the arrays of all layers, in the order of `param_specs`.
        packings: forms of parameters that are packed, by path.
    """

    config: DecoderConfig
    mesh: Mesh
    dtype: np.dtype
    layers: Sequence[DecoderLayer]
    specs: Sequence[ParamSpec]
    packings: Mapping[str, Packing]

    @classmethod
    def of(cls, model: "Decoder | PlannedModel") -> "PlannedModel":
        """Look at a model, packed or not, of which layers that are alike may be one object."""
        if isinstance(model, PlannedModel):
            return model
        layers = list(model.layers)
        plan = cls(
            config=model.config,
            mesh=model.mesh,
            dtype=model.dtype,
            layers=layers,
            specs=(),
            packings=packings_of(model),
        )
        specs = [
            dataclasses.replace(spec, path=path) for spec in param_specs(model) for path in plan.with_alike([spec.path])
        ]
        return dataclasses.replace(plan, specs=sorted(specs, key=_order))

    @property
    def moe_layers(self) -> list[MoE]:
        """The layers of routed experts, first to last."""
        return [layer.moe for layer in self.layers if hasattr(layer, "moe")]

    @property
    def placements(self) -> list[ExpertPlacement]:
        """The placement of every MoE layer."""
        return [moe.placement for moe in self.moe_layers]

    @property
    def plain_specs(self) -> list[ParamSpec]:
        """The specs of all parameters as if none were packed."""
        return unpacked_specs(self.specs, self.packings, self.dtype)

    def with_alike(self, paths: Iterable[str]) -> set[str]:
        """Paths in one of several layers that are alike, and those of the same parameters in the others."""
        places: dict[int, list[int]] = {}
        for place, layer in enumerate(self.layers):
            places.setdefault(id(layer), []).append(place)
        found = set()
        for path in paths:
            index = layer_index(path)
            if index is None:
                found.add(path)
                continue
            name = path.split(".", 2)[2]
            found |= {f"layers.{other}.{name}" for other in places[id(self.layers[index])]}
        return found

    def packed(self, packings: Mapping[str, Packing]) -> "PlannedModel":
        """The same with some parameters packed.

        Args:
            packings: form of each, by path.
        """
        specs: list[ParamSpec] = []
        for spec in self.specs:
            specs += part_specs(spec, packings[spec.path]).values() if spec.path in packings else [spec]
        return dataclasses.replace(self, specs=sorted(specs, key=_order), packings=packings)


def _order(spec: ParamSpec) -> tuple[Any, ...]:
    """The place of a parameter among those of its model: by name, and layers by number."""
    return tuple([int(name) if name.isdigit() else name for name in spec.path.split(".")])

"""The checkpoint that is planned for: its config, its quantization, and its tensors as far as they are known."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from jaxmoe.checkpoint.mapping import (
    FamilyCheckpoint,
    MappedCheckpoint,
    abstract_model,
    choose_packings,
    expected_checkpoint,
)
from jaxmoe.checks import path_like
from jaxmoe.config import DecoderConfig, directory_of, find_checkpoint
from jaxmoe.layers import ParamSpec, packable_params
from jaxmoe.models import Family, read_model_config
from jaxmoe.placement import ExpertPlacement
from jaxmoe.planning.planned_model import PlannedModel
from jaxmoe.quant import Quantization, read_quantization


def keeps_packed(quantized: str) -> bool:
    """Whether quantized weights stay packed where they can, by the setting of that name.

    Raises:
        ValueError: there is no such setting.
    """
    if quantized not in ("keep", "dequantize"):
        raise ValueError(f'quantized is "keep" or "dequantize"; got {quantized!r}')
    return quantized == "keep"


class PlannedCheckpoint(NamedTuple):
    """A checkpoint of which no weight is read, and perhaps none is there.

    Attributes:
        directory: folder with its config.json.
        family: family of the model.
        config: config of the model.
        quantization: settings of a quantization that its files declare; None where they declare none.
        mtp: whether the model has its layers for multi-token prediction.
        headers: its tensors as the headers of its files tell of them; None where files are missing.
    """

    directory: Path
    family: Family
    config: DecoderConfig
    quantization: Quantization | None
    mtp: bool = False
    headers: FamilyCheckpoint | None = None

    @classmethod
    def read(cls, path: str | Path, *, mtp: bool = False) -> "PlannedCheckpoint":
        """Read the config of a checkpoint that is given as for `jaxmoe.load`, and the file beside it if there is one.

        Raises:
            FileNotFoundError: there is no config.json.
            ValueError: the family is not known, or the checkpoint is quantized in a way that jaxmoe does not decode.
        """
        path_like("path", path)
        directory = directory_of(find_checkpoint(path))
        family, config = read_model_config(directory, mtp=mtp)
        quantization = read_quantization(directory)
        try:
            headers = FamilyCheckpoint.open(directory, mtp=mtp)
        except FileNotFoundError:  # no weights, or not all of them
            headers = None
        return cls(directory, family, config, quantization, mtp, headers)

    def model(
        self,
        *,
        sizes: Mapping[str, int],
        placement: str | ExpertPlacement | Sequence[str | ExpertPlacement],
        expert_axes: tuple[str, ...],
        dtype: str,
        keep: bool,
    ) -> PlannedModel:
        """Look at the model that would be loaded; its parameters are packed where they stay so, if `keep`.

        Args:
            sizes: sizes of the mesh axes.
            placement, expert_axes, dtype: arguments as for `jaxmoe.load`.
            keep: whether quantized weights stay packed.

        Raises:
            ValueError: they do not fit together.
        """
        model = abstract_model(
            self.config,
            sizes=sizes,
            placement=placement,
            expert_axes=expert_axes,
            dtype=jnp.dtype(dtype),
            one_of_alike=True,
        )
        plain = PlannedModel.of(model)
        if not keep:
            return plain
        mapped = self.onto({spec.path: spec for spec in plain.specs}, one_expert=True)
        return plain.packed(choose_packings(mapped, plain.with_alike(packable_params(model)), model.dtype).packings)

    def onto(self, specs: Mapping[str, ParamSpec], *, one_expert: bool = False) -> MappedCheckpoint:
        """Map its tensors to parameters: those that its headers tell of, or those that its config promises.

        Args:
            specs: parameters of the model, as plain arrays.
            one_expert: whether one expert may stand for all of its layer in what the config promises, see
                `expected_checkpoint`.
        """
        if self.headers is not None:
            return self.headers.onto(specs)
        return expected_checkpoint(
            specs, self.family, self.config, self.quantization, self.directory, one_expert=one_expert
        )

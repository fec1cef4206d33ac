"""The parameters of a module as its computation takes them: values by name or in a typed tuple, and their partition specs.

A parameter's sharding is said once, where `ParamFactory` makes it. `WeightSpecs` hands it to the `shard_map` that takes the
parameter. A matrix that is held packed is several parameters, and one `QuantizedStack` to the computation.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmoe.kernels.grouped_matmul import QuantizedStack, local_stack
from jaxmoe.layers.low_rank import FACTOR_ENDINGS, AdaptedMatrix, factor_partitions
from jaxmoe.quant.packing import Packing

Weights = TypeVar("Weights", bound=NamedTuple)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RoundingStack:
    """Packed matrices [..., N, K] whose inputs are rounded before the product; a pytree of its arrays.

    Attributes:
        stack: matrices.
        input_scales: float32 [...], the scale of each matrix's inputs; None where scales follow from the inputs.
        activations: form that inputs are rounded to, a name in `jaxmoe.kernels.grouped_matmul.ROW_FORMATS`.
        split_over: mesh axes that K is split over.
    """

    stack: QuantizedStack
    input_scales: Any
    activations: str = dataclasses.field(metadata={"static": True})
    split_over: tuple[str, ...] = dataclasses.field(metadata={"static": True})


Weight = jax.Array | QuantizedStack | RoundingStack

PART_ENDINGS = {
    "values": "",
    "scale": "_scale",
    "zero_point": "_zero_point",
    "matrix_scale": "_matrix_scale",
    "input_scale": "_input_scale",
}
"""Endings that the names of its arrays have, behind the name of a packed parameter, by their role."""


def local_matrices(weight: Weight, spec: Any, axis_sizes: Mapping[str, int]) -> tuple[jax.Array | QuantizedStack, str]:
    """Give the matrices of a weight that one device has, as shapes, and the form that their inputs are rounded to.

    Args:
        weight: weight of the whole mesh, or what stands for it.
        spec: its partition spec, a tree like it.
        axis_sizes: sizes of the mesh's axes.

    Returns:
        The matrices, and a name in `jaxmoe.kernels.grouped_matmul.ROW_FORMATS`, or "none".
    """
    local: Any = local_stack(weight, spec, axis_sizes)
    return (local.stack, local.activations) if isinstance(local, RoundingStack) else (local, "none")


@dataclasses.dataclass(frozen=True)
class WeightSpecs:
    """The partition specs of a module's own parameters, noted at the end of its ``__init__``.

    They are kept beside the parameters and not read from them in a call: an array inside a traced program does not say
    where it lies, and `nnx.update` brings along what the parameters of another module say.

    Attributes:
        by_name: pairs of name and spec, of every array; a tuple, which Flax can hash.
        packings: pairs of name and packed form, of the matrices that are held packed.
    """

    by_name: tuple[tuple[str, P], ...]
    packings: tuple[tuple[str, Packing], ...] = ()

    @classmethod
    def of(cls, module: nnx.Module, packings: Mapping[str, Packing] | None = None) -> "WeightSpecs":
        """Note the specs that the parameters were made with."""
        params = {name: param for name, param in vars(module).items() if isinstance(param, nnx.Param)}
        specs = tuple((name, param.get_metadata("spec")) for name, param in params.items())
        return cls(specs, tuple(sorted((packings or {}).items())))

    def weights(
        self, module: nnx.Module, adapter_ids_B: jax.Array | None = None, batch: tuple[str, ...] = ()
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Give the values of the module's parameters by name, and the specs of the same.

        Args:
            module: module that the specs were noted of.
            adapter_ids_B: int32, adapter of each row of the batch, -1 for none: matrices come as `AdaptedMatrix` where the
                module holds factors for them. None for the matrices alone.
            batch: mesh axes of the batch dim.
        """
        parts = {name + PART_ENDINGS[role] for name, form in self.packings for role in form.roles[1:]}
        names = [name for name, _ in self.by_name if name not in parts]
        values: dict[str, Any] = {name: self.value(module, name) for name in names}
        specs = {name: self.spec(module, name) for name in names}
        for name in names if adapter_ids_B is not None else ():
            if factors := factor_values(module, name):
                (a, b), (a_spec, b_spec) = factors, self.factor_specs(module, name)
                values[name] = AdaptedMatrix(values[name], a, b, adapter_ids_B)
                specs[name] = AdaptedMatrix(specs[name], a_spec, b_spec, P(batch))
        return values, specs

    def factor_specs(self, module: nnx.Module, name: str) -> tuple[P, P]:
        """Give the specs of the factors that adapters of one parameter have."""
        return factor_partitions(dict(self.by_name)[name], getattr(module, name).get_value().ndim)

    def value(self, module: nnx.Module, name: str) -> Weight:
        """Give the value of one parameter: an array, a `QuantizedStack` or a `RoundingStack`; abstract if it is."""
        packing = dict(self.packings).get(name)
        values = _array_of(getattr(module, name))
        if packing is None:
            return values
        arrays = {role: _array_of(getattr(module, name + PART_ENDINGS[role])) for role in packing.roles[1:]}
        return self._stack(name, packing, values.shape, {"values": values, **arrays})

    def spec(self, module: nnx.Module, name: str) -> Any:
        """Give the spec of one parameter, a tree like its value."""
        packing, specs = dict(self.packings).get(name), dict(self.by_name)
        if packing is None:
            return specs[name]
        arrays = {role: specs[name + PART_ENDINGS[role]] for role in packing.roles}
        return self._stack(name, packing, getattr(module, name).shape, arrays)

    def values_as(self, module: nnx.Module, kind: type[Weights]) -> Weights:
        """Give values as a tuple of `kind`, whose fields are parameters' names; None for those that the module lacks."""
        return kind._make([self.value(module, name) if hasattr(module, name) else None for name in kind._fields])

    def specs_as(self, module: nnx.Module, kind: type[Weights]) -> Weights:
        """Give the specs of `values_as`, a tree like it."""
        return kind._make([self.spec(module, name) if hasattr(module, name) else None for name in kind._fields])

    def _stack(self, name: str, packing: Packing, shape: tuple[int, ...], arrays: Mapping[str, Any]) -> Any:
        stack = _stack(packing, shape, arrays)
        if packing.activations is None:
            return stack
        spec = dict(self.by_name)[name]
        axes = spec[len(shape) - 1] if len(spec) == len(shape) else None
        return RoundingStack(
            stack=stack,
            input_scales=arrays.get("input_scale"),
            activations=packing.activations,
            split_over=(axes,) if isinstance(axes, str) else tuple(axes or ()),
        )


def _array_of(param: nnx.Param) -> Any:
    value = param.get_value()
    return value if isinstance(value, jax.ShapeDtypeStruct) else param[...]


def _stack(packing: Packing, shape: tuple[int, ...], arrays: Mapping[str, Any]) -> QuantizedStack:
    """Put the arrays of a packed parameter, or what stands for them, together; `shape` is that of its numbers."""
    return QuantizedStack(
        values=arrays["values"],
        scales=arrays["scale"],
        zero_points=arrays.get("zero_point"),
        matrix_scales=arrays.get("matrix_scale"),
        format=packing.format,
        block=packing.units("scale", (*shape[:-1], shape[-1] * packing.per_byte)),
    )


def factor_values(module: nnx.Module, name: str) -> tuple[jax.Array, ...]:
    """Give the factors A and B that a module holds for one of its parameters; none where it holds none."""
    names = [name + ending for ending in FACTOR_ENDINGS]
    return tuple([getattr(module, factor)[...] for factor in names]) if hasattr(module, names[0]) else ()


def hold(module: nnx.Module, weights: NamedTuple) -> None:
    """Make the fields of `weights` attributes of `module`, except those that are None."""
    for name, variable in weights._asdict().items():
        if variable is not None:
            setattr(module, name, variable)


def held(module: nnx.Module, kind: type[Weights]) -> Weights:
    """Give the values of the module's variables that the fields of `kind` name; None for those that it lacks."""
    variables = [getattr(module, name, None) for name in kind._fields]
    return kind._make([None if variable is None else variable[...] for variable in variables])

"""The parameters of a module as its computation takes them: values by name or in a typed tuple, and their partition specs.

A parameter's sharding is said once, where `ParamFactory` makes it. `WeightSpecs` hands it to the `shard_map` that takes the
parameter.
"""

import dataclasses
from typing import NamedTuple, TypeVar

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

Weights = TypeVar("Weights", bound=NamedTuple)


@dataclasses.dataclass(frozen=True)
class WeightSpecs:
    """The partition specs of a module's own parameters, noted at the end of its ``__init__``.

    They are kept beside the parameters and not read from them in a call: an array inside a traced program does not say
    where it lies, and `nnx.update` brings along what the parameters of another module say.

    Attributes:
        by_name: pairs of name and spec; a tuple, which Flax can hash.
    """

    by_name: tuple[tuple[str, P], ...]

    @classmethod
    def of(cls, module: nnx.Module) -> "WeightSpecs":
        """Note the specs that the parameters were made with."""
        params = {name: param for name, param in vars(module).items() if isinstance(param, nnx.Param)}
        return cls(tuple((name, param.get_metadata("spec")) for name, param in params.items()))

    def __getitem__(self, name: str) -> P:
        return dict(self.by_name)[name]

    def weights(self, module: nnx.Module) -> tuple[dict[str, jax.Array], dict[str, P]]:
        """Give the values of the module's parameters by name, and the specs of the same."""
        return {name: getattr(module, name)[...] for name, _ in self.by_name}, dict(self.by_name)

    def typed(self, kind: type[Weights]) -> Weights:
        """Give the specs as a tuple of `kind`, whose fields are parameters' names; None for those that the module lacks."""
        specs = dict(self.by_name)
        return kind._make([specs.get(name) for name in kind._fields])


def hold(module: nnx.Module, weights: NamedTuple) -> None:
    """Make the fields of `weights` attributes of `module`, except those that are None."""
    for name, variable in weights._asdict().items():
        if variable is not None:
            setattr(module, name, variable)


def held(module: nnx.Module, kind: type[Weights]) -> Weights:
    """Give the values of the module's variables that the fields of `kind` name; None for those that it lacks."""
    variables = [getattr(module, name, None) for name in kind._fields]
    return kind._make([None if variable is None else variable[...] for variable in variables])

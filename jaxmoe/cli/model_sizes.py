"""Sizes of a model that placing needs, from options or from a config.json."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.cli import options


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes that placing needs; None where neither an option nor a config says them.

    Attributes:
        hidden_size: width D of the experts' inputs.
        moe_intermediate_size: width F of an expert.
        num_experts: logical experts E of a layer.
        experts_per_token: experts K that a token goes to.
        num_layers: all layers.
        moe_layers: indices of the layers with routed experts.
        num_groups: groups of a group-limited router, 1 for none.
        gated: True where experts have a gate.
    """

    hidden_size: int | None = None
    moe_intermediate_size: int | None = None
    num_experts: int | None = None
    experts_per_token: int | None = None
    num_layers: int | None = None
    moe_layers: tuple[int, ...] | None = None
    num_groups: int = 1
    gated: bool = True


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say the sizes of a model."""
    group = parser.add_argument_group("model")
    group.add_argument("--config", metavar="DIR", help="a checkpoint directory; its config.json gives the sizes below")
    group.add_argument(
        "--num-experts", type=options.count, metavar="E", help="experts of a layer, where the trace is silent"
    )
    group.add_argument("--hidden-size", type=options.count, metavar="D", help="model width")
    group.add_argument("--moe-intermediate-size", type=options.count, metavar="F", help="width of an expert")
    group.add_argument("--num-groups", type=options.count, metavar="G", help="groups of a group-limited router (1)")
    group.add_argument("--weight-bytes", type=float, default=2, metavar="B", help="bytes per weight (2)")
    group.add_argument("--activation-bytes", type=float, default=2, metavar="B", help="bytes per number sent (2)")


def read(args: argparse.Namespace) -> ModelSizes:
    """Read the sizes that the options of `add_options` give, and those of ``--config`` where an option is left out.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it cannot be read, or is of a model without experts.
    """
    sizes = of_config(args.config) if args.config is not None else ModelSizes()
    given = {
        name: getattr(args, name)
        for name in ("hidden_size", "moe_intermediate_size", "num_experts", "num_groups")
        if getattr(args, name) is not None
    }
    return dataclasses.replace(sizes, **given)


def of_config(directory: str) -> ModelSizes:
    """Read the sizes of a config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or is of a model without experts.
    """
    from jaxmoe.config import MoEConfig, read_config_json
    from jaxmoe.models import FAMILIES, WRAPPERS, read_model_config

    config = read_config_json(directory)
    if config.get("model_type") not in {*FAMILIES, *WRAPPERS}:
        return _of_unknown_family(config)
    decoder = read_model_config(directory)[1]
    moes = {
        i: layer.feed_forward for i, layer in enumerate(decoder.layers) if isinstance(layer.feed_forward, MoEConfig)
    }
    if not moes:
        raise ValueError(f"{directory}/config.json is of a model without experts: there is nothing to place")
    moe = next(iter(moes.values()))
    return ModelSizes(
        hidden_size=moe.expert_input_size,
        moe_intermediate_size=moe.moe_intermediate_size,
        num_experts=moe.num_experts,
        experts_per_token=moe.num_experts_per_tok,
        num_layers=len(decoder.layers),
        moe_layers=tuple(moes),
        num_groups=moe.router.choice.expert_groups,
        gated=moe.gated,
    )


def _of_unknown_family(config: Mapping[str, Any]) -> ModelSizes:
    """Sizes that a config calls by the usual names."""
    from jaxmoe.checkpoint.formats import find_size
    from jaxmoe.config import pick

    text = pick(config, "text_config", default=config)
    layers, dense = find_size(config, "layers"), int(pick(text, "first_k_dense_replace", default=0))
    return ModelSizes(
        hidden_size=find_size(config, "model_width"),
        moe_intermediate_size=find_size(config, "expert_width"),
        num_experts=find_size(config, "experts"),
        experts_per_token=find_size(config, "experts_per_token"),
        num_layers=layers,
        moe_layers=None if layers is None else tuple(range(dense, layers)),
        num_groups=int(pick(text, "n_group", default=1)) or 1,
    )

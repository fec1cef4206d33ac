"""The training step: loss, gradient, update; one compiled program over the whole mesh."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxmoe.layers import params_by_path
from jaxmoe.mesh import batch_axes, named
from jaxmoe.models import Decoder

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the result depends on besides the model, the text and the seed.

    Attributes:
        steps: updates in all; the learning rate reaches its end at the last.
        rows: sequences in a batch.
        length: tokens predicted in each.
        learning_rate: at its peak, after the warm-up; it ends at a twentieth of that, along a cosine.
        warmup: steps.
        weight_decay: of matrices, not of norms (AdamW, Loshchilov and Hutter 2019).
        clip: largest norm of the whole gradient.
        balance: weight of the load-balancing loss.
        z: weight of the router's z-loss.

    Raises:
        ValueError: the steps end before the warm-up does.
    """

    steps: int
    rows: int = 16
    length: int = 384
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.01
    z: float = 0.001

    def __post_init__(self) -> None:
        if self.steps <= self.warmup:
            raise ValueError(f"the learning rate warms up for {self.warmup} steps; got steps={self.steps}: take more")


class TrainState(NamedTuple):
    """All that a step changes."""

    params: Params
    optimizer: optax.OptState
    step: jax.Array


class Metrics(NamedTuple):
    """What a step tells.

    Attributes:
        loss: float32, mean cross-entropy of a token in nats.
        balance: float32, the load-balancing loss, mean over layers; K where routing is even.
        z: float32, the router's z-loss, mean over layers.
        gradient_norm: float32, before clipping.
        expert_counts: int32 [L, E], choices of each expert.
    """

    loss: jax.Array
    balance: jax.Array
    z: jax.Array
    gradient_norm: jax.Array
    expert_counts: jax.Array


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, recipe.warmup, recipe.steps, end_value=recipe.learning_rate / 20
    )

    def is_matrix(params: Params) -> dict[str, bool]:
        return {path: param.ndim > 1 for path, param in params.items()}

    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=recipe.weight_decay, mask=is_matrix),
    )


class Trainer:
    """The compiled functions of one model and recipe.

    Args:
        model: gives the program, the mesh and the first weights.
        recipe: see `Recipe`.
    """

    def __init__(self, model: Decoder, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self.optimizer = make_optimizer(recipe)
        self._graphdef, self._weights, self._rest = nnx.split(model, nnx.Param, ...)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.evaluate = jax.jit(self._evaluate)

    def init(self) -> TrainState:
        """The state before the first step; its weights are the model's own, copied."""
        params = {path: jnp.copy(param.get_value()) for path, param in params_by_path(self.model).items()}
        # Not under jit, which would put zeros on one device. Counters too lie on the whole mesh: a restored state has
        # the shardings of this one, and must fit the compiled step.
        state = TrainState(params, self.optimizer.init(params), jnp.int32(0))
        mesh = self.model.mesh
        return jax.tree.map(lambda a: a if a.ndim else jax.device_put(a, named(mesh)), state)

    def shard(self, rows: Any) -> jax.Array:
        """Put a batch on the mesh, its first dim over dp and ep where that divides it."""
        axes = batch_axes(self.model.mesh, len(rows))
        return jax.device_put(jnp.asarray(rows), named(self.model.mesh, axes))

    def loss(self, params: Params, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Metrics]:
        """Cross-entropy plus the weighted router losses.

        Args:
            params: by path.
            tokens: int32 [B, S + 1].
            lengths: int32 [B], predictions of each row that count.

        Returns:
            float32 and the metrics, without a gradient norm.
        """
        logits_BSV, stats = self._model(params).logits_and_stats(tokens[:, :-1], lengths)
        nats_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, tokens[:, 1:])
        counted_BS = jnp.arange(nats_BS.shape[1]) < lengths[:, None]
        cross_entropy = jnp.sum(jnp.where(counted_BS, nats_BS, 0)) / jnp.sum(counted_BS)
        balance = sum(layer.load_balancing_loss for layer in stats) / len(stats)
        z = sum(layer.router_z_loss for layer in stats) / len(stats)
        counts_LE = jnp.stack([layer.expert_counts for layer in stats])
        total = cross_entropy + self.recipe.balance * balance + self.recipe.z * z
        return total, Metrics(cross_entropy, balance, z, jnp.float32(0), counts_LE)

    def _model(self, params: Params) -> Decoder:
        weights = [
            (path, param.replace(params[".".join(map(str, path))])) for path, param in nnx.to_flat_state(self._weights)
        ]
        return nnx.merge(self._graphdef, nnx.from_flat_state(weights), self._rest)

    def _step(self, state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        lengths = jnp.full(tokens.shape[0], tokens.shape[1] - 1)
        (_, metrics), gradients = jax.value_and_grad(self.loss, has_aux=True)(state.params, tokens, lengths)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics._replace(gradient_norm=optax.tree.norm(gradients))
        return TrainState(params, optimizer, state.step + 1), metrics

    def _evaluate(self, params: Params, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, metrics = self.loss(params, tokens, lengths)
        return metrics.loss * jnp.sum(lengths), metrics.expert_counts

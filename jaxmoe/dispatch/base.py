"""What every dispatch backend is given and gives back.

A backend runs inside ``shard_map`` on one device's tokens. It brings each token to the
devices that hold its experts, has the experts applied there, and returns the weighted sum
at the token's home. Letters: T tokens on this device, K experts per token, D model width, P physical slots over the mesh,
p on this device, R rows received by this device, n devices that share the experts.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from jax.typing import DTypeLike

from jaxmoe.dispatch.collectives import Collective
from jaxmoe.mesh import MODEL_AXES, MeshAxes


class Experts(NamedTuple):
    """The experts of one device.

    Attributes:
        apply: ``(params, rows [R, D] grouped by local slot, group sizes [p], dtype of the result) -> rows [R, D]``,
            zeros beyond the groups. It closes over no traced value, so that a gradient rule can be made from it.
        params: the arrays it needs, what a gradient is taken of.
    """

    apply: Callable[[Any, jax.Array, jax.Array, DTypeLike], jax.Array]
    params: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffers:
    """Sizes of the buffers of a dispatch. Rows that do not fit one take more rounds or trips; none is dropped.

    Attributes:
        row_headroom: rows of an exchange's round over those that even routing sends, for experts that are chosen more often.
        row_deviations: standard deviations of their number to be had besides, for chance.
        min_rows: rows a round for each destination, at least.
        pair_headroom: (row, choice) pairs of a trip through the experts over the even share of a device.
        min_pairs: pairs of a trip, at least: fewer are not worth a loop.
    """

    row_headroom: float = 1.25
    row_deviations: float = 4
    min_rows: int = 8
    pair_headroom: float = 1.5
    min_pairs: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchLayout:
    """How experts lie on the mesh and rows travel to them; all of it known at compile time.

    Attributes:
        mesh_shape: ((axis, size), ...) of the whole mesh.
        expert_axes: mesh axes that the slot dim is sharded over.
        partial_axes: mesh axes over which expert outputs are partial sums (tp where it splits F).
        num_slots: physical slots P.
        wire_dtype: what rows are rounded to on their way to experts, see `jaxmoe.dispatch.wire`; None for not at all.
            Backends that exchange rows heed it.
        buffers: their sizes.
        axes: the mesh axes that play dp, tp and ep.
    """

    mesh_shape: tuple[tuple[str, int], ...]
    expert_axes: tuple[str, ...]
    partial_axes: tuple[str, ...]
    num_slots: int
    wire_dtype: str | None = None
    buffers: Buffers = Buffers()
    axes: MeshAxes = MODEL_AXES

    def size(self, axes: tuple[str, ...]) -> int:
        """Number of devices along `axes`."""
        return math.prod(size for axis, size in self.mesh_shape if axis in axes)

    @property
    def num_devices(self) -> int:
        """n, the devices that share the experts."""
        return self.size(self.expert_axes)

    @property
    def num_partial(self) -> int:
        """Devices that each compute a part of one expert's output."""
        return self.size(self.partial_axes)

    @property
    def slots_per_device(self) -> int:
        """p."""
        return self.num_slots // self.num_devices

    @property
    def serving_axes(self) -> tuple[str, ...]:
        """Axes of the devices that together hold every expert once and whole."""
        return self.expert_axes + self.partial_axes

    def tokens_per_device(self, T: int, token_axes: tuple[str, ...]) -> int:
        """T tokens of a call, padded to split evenly over `token_axes`, on each device; a row where there is none."""
        return max(1, -(-T // self.size(token_axes)))


class DispatchStats(NamedTuple):
    """What an exchange did.

    Attributes:
        rounds: int32, exchanges made, the same on every device; 0 where the backend exchanges in one fixed step.
        rows_sent_n: int32 [n], rows of activations that this device sent to each device along `expert_axes`, its own
            among them (those stay where they are).
    """

    rounds: jax.Array
    rows_sent_n: jax.Array


class RunDispatch(Protocol):
    """Bring tokens to their experts and back; the body of a backend."""

    def __call__(
        self,
        x_TD: jax.Array,
        slots_TK: jax.Array,
        weights_TK: jax.Array,
        experts: Experts,
        layout: DispatchLayout,
        weights_on_input: bool = False,
    ) -> tuple[jax.Array, DispatchStats]:
        """Serve this device's tokens.

        Args:
            x_TD: this device's tokens.
            slots_TK: int32, the physical slot of each choice; -1 for no expert.
            weights_TK: float32, or float64 where the tokens are.
            experts: this device's.
            layout: how experts lie on the mesh.
            weights_on_input: whether a weight multiplies what goes into an expert, instead of what comes out.

        Returns:
            [T, D] in the weights' dtype, and what was exchanged.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatch:
    """One backend.

    Attributes:
        name: its key in `DISPATCHES`.
        token_axes: mesh axes the token dim is split over when `run` is called; over all other
            axes each device is given the same tokens and returns the same sums.
        run: see `RunDispatch`.
        collectives: ``(T, K, D, itemsize, layout)`` to what the devices exchange in one round for T tokens of all
            devices together; `jaxmoe.dispatch.collectives` makes bytes of it.
        memory_bytes: with the same arguments, bytes a device copies from place to place in its own memory with even
            routing; the experts' own work is the same with every backend and left out.
        cannot_run: why not, by platform.
        by_name: whether it is used only where it is named, and never what "auto" chooses.
    """

    name: str
    token_axes: Callable[[DispatchLayout], tuple[str, ...]]
    run: RunDispatch
    collectives: Callable[[int, int, int, int, DispatchLayout], tuple[Collective, ...]]
    memory_bytes: Callable[[int, int, int, int, DispatchLayout], float]
    cannot_run: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    by_name: bool = False

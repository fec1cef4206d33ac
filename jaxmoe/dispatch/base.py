"""The contract of a dispatch backend: its entry in `DISPATCHES`, arguments and results, and the sizes of a call.

A backend runs inside ``shard_map`` on one device's tokens. It brings each token to the devices that hold its experts, has
the experts applied there, and returns the weighted sum at the token's home. Letters are those of docs/concepts/letters.md.
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
        apply: ``(params, rows [T, D], index of a row at each place, group sizes [p], dtype of the result) -> rows [R, D]``.
            Places are grouped by local slot; results beyond the groups may be anything. Without an index, None, rows
            [R, D] stand at their places. It closes over no traced value, so that a gradient rule can be made from it.
        params: the arrays it needs, what a gradient is taken of.
    """

    apply: Callable[[Any, jax.Array, jax.Array | None, jax.Array, DTypeLike], jax.Array]
    params: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffers:
    """Sizes of the buffers of a dispatch. Rows that do not fit one take more rounds or trips; none is dropped.

    Attributes:
        row_headroom: rows of a round over those that even routing sends, as a factor, for experts chosen more often.
        row_deviations: standard deviations of that number that there is room for besides, for chance.
        min_rows: least number of rows of a round for each destination.
        pair_headroom: (row, choice) pairs of a trip through the experts over the even share of a device, as a factor.
        min_pairs: least number of pairs of a trip: fewer are not worth a loop.
    """

    row_headroom: float = 1.25
    row_deviations: float = 4
    min_rows: int = 8
    pair_headroom: float = 1.5
    min_pairs: int = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchLayout:
    """Layout of the experts on the mesh, and the form in which rows travel to them; all of it known at compile time.

    Attributes:
        mesh_shape: ((axis, size), ...) of the whole mesh.
        expert_axes: mesh axes that the slot dim is sharded over.
        partial_axes: mesh axes over which expert outputs are partial sums (tp where it splits F).
        num_slots: physical slots P.
        wire_dtype: dtype that rows are rounded to on their way to experts, see `jaxmoe.dispatch.wire`; None for no rounding.
            Backends that exchange rows heed it.
        buffers: sizes of the buffers.
        axes: mesh axes that play dp, tp and ep.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchShape:
    """Sizes of one call of a dispatch, known at compile time: traffic, memory and modeled time follow from them alone.

    Attributes:
        tokens: tokens T of all devices together.
        choices: experts K of a token.
        width: width D that the experts see.
        itemsize: bytes of a number of an activation.
        layout: layout of the experts on the mesh.
    """

    tokens: int
    choices: int
    width: int
    itemsize: int
    layout: DispatchLayout

    def tokens_per_device(self, token_axes: tuple[str, ...]) -> int:
        """Rows of tokens on each device, padding included, where tokens are split over `token_axes`."""
        return self.layout.tokens_per_device(self.tokens, token_axes)

    @property
    def tokens_served(self) -> int:
        """Tokens of the devices that together hold every expert once: a dp rank's, or all where dp shares the experts."""
        alone = tuple([axis for axis in self.layout.axes.dp if axis not in self.layout.expert_axes])
        return self.tokens_per_device(alone)

    def fill(self, token_axes: tuple[str, ...]) -> float:
        """The share of those rows that are tokens."""
        return self.tokens / self.layout.size(token_axes) / self.tokens_per_device(token_axes)


class DispatchStats(NamedTuple):
    """Report of one dispatch.

    Attributes:
        rounds: int32, exchanges made, the same on every device; 0 where the backend exchanges in one fixed step.
        rows_sent_n: int32 [n], rows of activations that this device sent to each device along `expert_axes`, its own
            among them (those stay where they are).
    """

    rounds: jax.Array
    rows_sent_n: jax.Array


class RunDispatch(Protocol):
    """Bring tokens to their experts and back; the body of a backend.

    It is called inside ``shard_map`` on every device of the mesh, with arguments of the same shapes. These rules hold:

    * No token is dropped: any routing gives Σ_k weights[t, k] · expert_{slots[t, k]}(x[t]), with a gradient in tokens,
      weights and the parameters of the experts.
    * Buffers do not grow: their sizes come from the shapes and `layout.buffers` alone, and rows that do not fit take another
      round. Collectives are the same on all devices, whatever their tokens.
    * A choice of -1 adds nothing to a sum, and neither do values of rows without an expert, NaN included.
    * It exchanges the collectives that `Dispatch.collectives` lists, and no more.

    Arguments are not checked again here; what a layer cannot do is refused before, see `Dispatch.cannot_run`.
    """

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
            x_TD: tokens of this device, floating.
            slots_TK: int32, the physical slot of each choice; -1 for no expert.
            weights_TK: weights of the choices, float32, or float64 where the tokens are.
            experts: experts of this device.
            layout: layout of the experts on the mesh.
            weights_on_input: flag that a weight multiplies what goes into an expert, instead of what comes out.

        Returns:
            Sums [T, D] in the weights' dtype, and the report of what was exchanged.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatch:
    """One backend: an entry of `DISPATCHES`.

    Attributes:
        name: key in `DISPATCHES`.
        token_axes: mesh axes that the token dim is split over when `run` is called; over all other axes each device is given
            the same tokens and returns the same sums.
        run: body of the backend, see `RunDispatch`.
        collectives: function from sizes to the collectives of one round; `jaxmoe.dispatch.collectives` makes bytes of them.
        memory_bytes: function from sizes to the bytes that a device copies from place to place in its own memory with even
            routing; the experts' own work is the same with every backend and left out.
        workspace_bytes: function from sizes to the most bytes of its buffers that a device holds at once, the experts' rows
            among them; None where `memory_bytes` are held at once.
        cannot_run: reason why it does not run, for each platform where it does not. Named there, it is refused with that.
        breaks: function from the layout, on devices that the platform has, and the number of processes to the reason why it
            would not come to an end there, and "" where it does. It is refused with that too.
        auto: flag that "auto" may choose it; without it, it runs only where it is named.
    """

    name: str
    token_axes: Callable[[DispatchLayout], tuple[str, ...]]
    run: RunDispatch
    collectives: Callable[[DispatchShape], tuple[Collective, ...]]
    memory_bytes: Callable[[DispatchShape], float]
    workspace_bytes: Callable[[DispatchShape], float] | None = None
    cannot_run: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    breaks: Callable[[DispatchLayout, int], str] = lambda layout, processes: ""
    auto: bool = True

    def workspace(self, shape: DispatchShape) -> float:
        """The most bytes of its buffers that a device holds at once."""
        return (self.workspace_bytes or self.memory_bytes)(shape)

    def reason_not_to(self, platform: str, layout: DispatchLayout | None = None, processes: int = 1) -> str:
        """The reason why it is refused; "" where it runs.

        Args:
            platform: platform of the devices.
            layout: layout of the experts; None to ask for the platform alone.
            processes: number of processes that have the devices.
        """
        if reason := self.cannot_run.get(platform):
            return f"on {platform}: {reason}"
        reason = "" if layout is None else self.breaks(layout, processes)
        return f"on this mesh: {reason}" if reason else ""

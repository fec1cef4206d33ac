"""`RoutingTrace`: the experts that a model's tokens chose, over time."""

import dataclasses
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.checks import integer

_FORMAT = "jaxmoe.routing_trace"
_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RoutingTrace:
    """Expert choices of a run, cut into windows (one engine step, or a few thousand tokens).

    Letters: W windows, L MoE layers, T tokens, and E and K of docs/concepts/letters.md.

    Attributes:
        counts: int64 [W, L, E], (token, choice) pairs that went to each logical expert.
        expert_ids: int32 [T, L, K], the logical experts of each token, -1 for no choice; None
            where only counts were recorded.
        window_sizes: int64 [W], tokens of each window, in the order of `expert_ids`; None without it.

    Raises:
        ValueError: a shape, dtype or id that does not fit, or counts that are not those of `expert_ids`.

    Example:
        >>> trace = RoutingTrace.from_expert_ids(np.array([[[0, 2]], [[2, 1]]]), num_experts=4)
        >>> trace.counts.tolist()
        [[[1, 1, 2, 0]]]
    """

    counts: np.ndarray
    expert_ids: np.ndarray | None = None
    window_sizes: np.ndarray | None = None

    def __post_init__(self) -> None:
        counts = _integers("counts", self.counts, np.int64, ndim=3)
        if 0 in counts.shape:
            raise ValueError(f"a trace has at least one window, layer and expert; got counts of shape {counts.shape}")
        if counts.min() < 0:
            raise ValueError(f"counts are of tokens, at least 0; got {counts.min()}")
        object.__setattr__(self, "counts", counts)
        if (self.expert_ids is None) != (self.window_sizes is None):
            raise ValueError("expert_ids and window_sizes come together: give both or neither")
        if self.expert_ids is not None:
            ids = _integers("expert_ids", self.expert_ids, np.int32, ndim=3)
            sizes = _integers("window_sizes", self.window_sizes, np.int64, ndim=1)
            object.__setattr__(self, "expert_ids", ids)
            object.__setattr__(self, "window_sizes", sizes)
            self._check_tokens(ids, sizes)

    def _check_tokens(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        W, L, E = self.counts.shape
        if ids.shape[1] != L or sizes.shape[0] != W:
            raise ValueError(
                f"counts of {W} windows and {L} layers need expert_ids of {L} layers and {W} window_sizes; "
                f"got {ids.shape[1]} layers and {sizes.shape[0]} sizes"
            )
        if sizes.min() < 0 or sizes.sum() != ids.shape[0]:
            raise ValueError(f"window_sizes add up to the {ids.shape[0]} tokens of expert_ids; got {sizes.sum()}")
        _check_ids(ids, E)
        if not np.array_equal(_count(ids, sizes, E), self.counts):
            raise ValueError("counts are not those of expert_ids; make the trace with RoutingTrace.from_expert_ids")

    @classmethod
    def from_expert_ids(
        cls, expert_ids: np.ndarray, num_experts: int, *, window: int | Sequence[int] | np.ndarray = 1024
    ) -> "RoutingTrace":
        """Count token-level choices.

        Args:
            expert_ids: integers [T, L, K], -1 for no choice.
            num_experts: E.
            window: tokens per window (the last may hold fewer), or the size of each window.
        """
        ids = _integers("expert_ids", expert_ids, np.int32, ndim=3)
        num_experts = integer("num_experts", num_experts, least=1)
        _check_ids(ids, num_experts)
        if np.ndim(window) == 0:
            window = integer("window", window, least=1)
            starts = np.arange(0, ids.shape[0], window)
            sizes = np.minimum(window, ids.shape[0] - starts)
        else:
            sizes = _integers("window", np.asarray(window), np.int64, ndim=1)
            if (sizes.size and sizes.min() < 0) or sizes.sum() != ids.shape[0]:
                raise ValueError(f"window sizes add up to the {ids.shape[0]} tokens of expert_ids; got {sizes.sum()}")
        return cls(counts=_count(ids, sizes, num_experts), expert_ids=ids, window_sizes=sizes)

    @classmethod
    def joined(cls, traces: Sequence["RoutingTrace"]) -> "RoutingTrace":
        """The windows of several recordings of one model, one after the other.

        Raises:
            ValueError: there is none, they differ in layers, experts or choices, or only some have token-level ids.

        Example:
            >>> trace = RoutingTrace.from_expert_ids(np.array([[[0, 2]], [[2, 1]]]), num_experts=4)
            >>> RoutingTrace.joined(trace.halves()).expert_ids.tolist() == trace.expert_ids.tolist()
            True
        """
        kinds = sorted(
            {
                (trace.num_layers, trace.num_experts, 0 if trace.expert_ids is None else trace.expert_ids.shape[2])
                for trace in traces
            }
        )
        if len(kinds) != 1:
            raise ValueError(
                "traces that are joined are of the same layers, experts and choices of every token (0 where there are "
                f"counts only); got {', '.join(map(str, kinds)) or 'no trace'}"
            )
        counts = np.concatenate([trace.counts for trace in traces])
        ids = [trace.expert_ids for trace in traces if trace.expert_ids is not None]
        sizes = [trace.window_sizes for trace in traces if trace.window_sizes is not None]
        if not ids:
            return cls(counts=counts)
        return cls(counts=counts, expert_ids=np.concatenate(ids), window_sizes=np.concatenate(sizes))

    @property
    def num_windows(self) -> int:
        """W."""
        return self.counts.shape[0]

    @property
    def num_layers(self) -> int:
        """MoE layers L."""
        return self.counts.shape[1]

    @property
    def num_experts(self) -> int:
        """Logical experts E."""
        return self.counts.shape[2]

    @property
    def total_counts(self) -> np.ndarray:
        """int64 [L, E], counts over the whole trace."""
        return self.counts.sum(axis=0)

    @property
    def window_of_token(self) -> np.ndarray:
        """int64 [T], the window each token of `expert_ids` belongs to."""
        if self.window_sizes is None:
            raise ValueError("this trace has counts only; record it with token-level expert_ids")
        return np.repeat(np.arange(self.num_windows), self.window_sizes)

    def halves(self) -> tuple["RoutingTrace", "RoutingTrace"]:
        """The first and the second half of the windows: one to make a placement on, one to judge it.

        A single window is halved by its tokens.

        Raises:
            ValueError: there is one window and only counts, or a single token.
        """
        if self.num_windows > 1:
            middle = (self.num_windows + 1) // 2
            return self.windows(0, middle), self.windows(middle, self.num_windows)
        if self.expert_ids is None or self.expert_ids.shape[0] < 2:
            raise ValueError(
                "a trace is halved by its windows, and this one has a single window of counts; record at least two "
                "windows, or token-level expert_ids"
            )
        tokens = self.expert_ids.shape[0]
        middle = (tokens + 1) // 2
        return (
            RoutingTrace.from_expert_ids(self.expert_ids[:middle], self.num_experts, window=[middle]),
            RoutingTrace.from_expert_ids(self.expert_ids[middle:], self.num_experts, window=[tokens - middle]),
        )

    def windows(self, start: int, stop: int) -> "RoutingTrace":
        """The windows from `start` up to and without `stop`, such as those of one of several recorded runs.

        Raises:
            ValueError: the trace has no such windows, or they are none.
        """
        if not 0 <= start < stop <= self.num_windows:
            raise ValueError(
                f"a part of {self.num_windows} windows is 0 <= start < stop <= {self.num_windows}; got {start}, {stop}"
            )
        if self.expert_ids is None or self.window_sizes is None:
            return RoutingTrace(counts=self.counts[start:stop])
        first, last = self.window_sizes[:start].sum(), self.window_sizes[:stop].sum()
        return RoutingTrace(
            counts=self.counts[start:stop],
            expert_ids=self.expert_ids[first:last],
            window_sizes=self.window_sizes[start:stop],
        )

    def by_sequence(
        self, prompt_lengths: Sequence[int], generated_lengths: Sequence[int], *, length: int | None = None
    ) -> "RoutingTrace":
        """The trace of one generation, which goes step by step, brought into rows: prompt and generated tokens of each.

        So that a model can be trained on what was sampled, with the routing of sampling: `Decoder.replay_routing` takes
        the result for a call on [B, length], prompts and generated tokens padded on the right.

        Args:
            prompt_lengths: tokens of each of the B prompts.
            generated_lengths: tokens generated for each, the one that ended the text included.
            length: tokens of a row, longer sequences are cut; None for the longest of them.

        Returns:
            A trace of B · length tokens in one window. Padding has no choice (-1), nor has a last token that
            max_new_tokens ended the text with, for the model never saw it.

        Raises:
            ValueError: the trace has counts only, or its windows are not the steps of such a generation.

        Example:
            >>> steps = np.array([[[0, 1]], [[2, 3]], [[4, 5]], [[0, 2]]])  # two prompts of one token, and a step for both
            >>> trace = RoutingTrace.from_expert_ids(steps, num_experts=6, window=[2, 2])
            >>> trace.by_sequence([1, 1], [2, 2]).expert_ids[:, 0].tolist()
            [[0, 1], [4, 5], [-1, -1], [2, 3], [0, 2], [-1, -1]]
        """
        if self.expert_ids is None or self.window_sizes is None:
            raise ValueError("this trace has counts only; record it with token-level expert_ids")
        prompts, generated = np.asarray(prompt_lengths, np.int64), np.asarray(generated_lengths, np.int64)
        steps = np.arange(1, self.num_windows)
        active_WB = generated >= steps[:, None]
        expected = [int(prompts.sum()), *active_WB.sum(axis=1).tolist()]
        if prompts.shape != generated.shape or expected != self.window_sizes.tolist():
            raise ValueError(
                f"a generation's trace has a window for the prompts and one for each later step, here of {expected} tokens; "
                f"got {self.window_sizes.tolist()}"
            )
        B = len(prompts)
        length = int((prompts + generated).max()) if length is None else length
        row_T = np.concatenate([np.repeat(np.arange(B), prompts), np.nonzero(active_WB)[1]])
        place_T = np.concatenate(
            [*(np.arange(count) for count in prompts), (prompts + steps[:, None] - 1)[active_WB]]
        ).astype(np.int64)
        rows = np.full((B, length, *self.expert_ids.shape[1:]), -1, np.int32)
        kept_T = place_T < length
        rows[row_T[kept_T], place_T[kept_T]] = self.expert_ids[kept_T]
        return RoutingTrace.from_expert_ids(
            rows.reshape(-1, *self.expert_ids.shape[1:]), self.num_experts, window=[B * length]
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as a compressed .npz, which `load` reads back."""
        arrays: dict[str, Any] = {"counts": self.counts}
        if self.expert_ids is not None and self.window_sizes is not None:
            arrays |= {"expert_ids": self.expert_ids, "window_sizes": self.window_sizes}
        # An open file keeps NumPy from adding a suffix to the name that was asked for.
        with open(path, "wb") as file:
            np.savez_compressed(file, format=np.array(_FORMAT), version=np.array(_VERSION), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RoutingTrace":
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            ValueError: the file is no trace, of an unknown version, or holds something that does not fit.
        """
        fields = read_npz(path)
        if str(fields.pop("format", "")) != _FORMAT:
            raise ValueError(f"{os.fspath(path)} is no routing trace: it has no entry format = {_FORMAT!r}")
        version = fields.pop("version", None)
        if version is None or version.ndim or version != _VERSION:
            raise ValueError(f"routing traces of version {_VERSION} are known here; got {version!r}; upgrade jaxmoe")
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown or "counts" not in fields:
            raise ValueError(
                f"a routing trace has counts, and may have expert_ids and window_sizes; {os.fspath(path)} has "
                f"{', '.join(sorted(fields)) or 'nothing'}"
            )
        return cls(**fields)


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every array of an .npz file, pickled objects refused.

    Raises:
        ValueError: the file is no .npz, is damaged, or holds pickled objects.
    """
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{os.fspath(path)} is no .npz file")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                return {name: np.asarray(archive[name]) for name in archive.files}
        except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{os.fspath(path)} is damaged or holds something other than arrays: {error}") from error


def is_trace_file(fields: Mapping[str, Any]) -> bool:
    """Tell whether the arrays of an .npz file are those that `RoutingTrace.save` writes."""
    return str(fields.get("format", "")) == _FORMAT


def _integers(name: str, values: Any, dtype: type, ndim: int) -> np.ndarray:
    """A read-only copy in `dtype`, refused unless it is an integer array of `ndim` dims that `dtype` can hold."""
    array = np.asarray(values)
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise ValueError(f"{name} is an integer array of {ndim} dims; got {array.dtype} of shape {array.shape}")
    limits = np.iinfo(dtype)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(f"{name} holds a number beyond {np.dtype(dtype)}: {array.max()}")
    array = array.astype(dtype)
    array.setflags(write=False)
    return array


def check_choices(ids_TK: np.ndarray, num_experts: int) -> None:
    """Refuse what is no choice of a token: an id of no expert, only some of K experts, or one expert twice.

    Args:
        ids_TK: integers, -1 in all K for a token without a choice.
        num_experts: E.

    Raises:
        ValueError: see above; names the first such token's choice.
    """
    sorted_TK = np.sort(ids_TK, axis=1)
    whole_T = (sorted_TK[:, 0] >= 0) & (sorted_TK[:, 1:] > sorted_TK[:, :-1]).all(axis=1)
    none_T = (sorted_TK == -1).all(axis=1)
    wrong_T = ~(whole_T | none_T) | (sorted_TK[:, -1] >= num_experts)
    if wrong_T.any():
        raise ValueError(
            f"the choice of a token is {ids_TK.shape[1]} different experts of 0..{num_experts - 1}, or -1 in all places for "
            f"none; got {ids_TK[wrong_T.argmax()].tolist()}"
        )


def _check_ids(ids: np.ndarray, num_experts: int) -> None:
    if ids.size and (ids.min() < -1 or ids.max() >= num_experts):
        wrong = ids.max() if ids.max() >= num_experts else ids.min()
        raise ValueError(f"expert ids are 0..{num_experts - 1}, or -1 for no choice; got {wrong}")


def _count(ids: np.ndarray, sizes: np.ndarray, num_experts: int) -> np.ndarray:
    """int64 [W, L, E] from ids [T, L, K]."""
    L, W, E = ids.shape[1], sizes.size, num_experts
    row_TL = np.repeat(np.arange(W), sizes)[:, None] * L + np.arange(L)
    # One bin more than there are experts takes the -1s.
    bins_TLK = row_TL[:, :, None] * (E + 1) + np.where(ids < 0, E, ids)
    return np.bincount(bins_TLK.reshape(-1), minlength=W * L * (E + 1)).reshape(W, L, E + 1)[:, :, :E]

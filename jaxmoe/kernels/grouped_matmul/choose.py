"""The choice of ``"auto"``: a function of the tables of measured tiles and the verdicts on backends alone."""

from typing import NamedTuple

from jaxmoe.kernels.grouped_matmul.tile_table import lookup
from jaxmoe.kernels.grouped_matmul.verdicts import ORDER, known_verdicts
from jaxmoe.kernels.grouped_matmul.work import Outcome, Work


class Choice(NamedTuple):
    """A backend, and why it is taken.

    Attributes:
        backend: name in `BACKENDS` or `GPU_BACKENDS`.
        why: reason in a few words.
    """

    backend: str
    why: str


def choose_backend(work: Work, device_kind: str | None, *, rows_per_group: float | None = None) -> Choice:
    """Choose the backend of some products on a kind of device.

    A backend has to be right in a trial here (`hold_trials`). Of those that are, the one that was measured to be fastest is
    taken; where none was measured, the first of `ORDER`; where none is right, "portable".

    Args:
        work: products.
        device_kind: kind of the device, as JAX names it; None if it is not known.
        rows_per_group: allocated rows by groups, for what was measured; None for no look at it.
    """
    verdicts = known_verdicts(device_kind)
    outcomes = {name: verdicts[name, work] for name in ORDER if (name, work) in verdicts}
    right = [name for name, outcome in outcomes.items() if outcome.verdict == "right"]
    if not right:
        return Choice("portable", _why_portable(outcomes))
    if device_kind is not None and rows_per_group is not None:
        seconds = {name: _measured(name, work, device_kind, rows_per_group) for name in right}
        known = {name: measured for name, measured in seconds.items() if measured is not None}
        if known:
            fastest = min(known, key=lambda name: known[name])
            measured = f"{known[fastest] * 1e6:.0f} us were measured, and it is right here"
            return Choice(fastest, "; ".join([measured, *_why_portable_gradient(fastest, work, device_kind)]))
    # A refusal says what would change it.
    passed = [
        f"{name} {outcome.verdict}{f': {outcome.detail}' if outcome.verdict == 'refused' else ''}"
        for name, outcome in outcomes.items()
        if name not in right
    ]
    why = ["right in a trial on this GPU", *passed, *_why_portable_gradient(right[0], work, device_kind)]
    return Choice(right[0], "; ".join(why))


def has_own_gradient(backend: str, work: Work, device_kind: str | None) -> bool:
    """Tell whether a backend may take kernels of its own for a gradient: not where a trial here did not find them right.

    Args:
        backend: name in `BACKENDS` or `GPU_BACKENDS`. One that was asked for by name was not tried, and takes them.
        work: products whose gradient it is.
        device_kind: kind of the device, as JAX names it; None if it is not known.
    """
    outcome = known_verdicts(device_kind).get((backend, work.of_gradient))
    return outcome is None or outcome.verdict == "right"


def _why_portable_gradient(backend: str, work: Work, device_kind: str | None) -> list[str]:
    if has_own_gradient(backend, work, device_kind):
        return []
    outcome = known_verdicts(device_kind)[backend, work.of_gradient]
    return [f"its gradient is the portable one, for its own is {outcome.verdict}: {outcome.detail}"]


def _why_portable(outcomes: dict[str, Outcome]) -> str:
    if not outcomes:
        return "it runs everywhere, and no other was tried here"
    return "; ".join(f"{name} {outcome.verdict}: {outcome.detail}" for name, outcome in outcomes.items())


def _measured(name: str, work: Work, device_kind: str, rows_per_group: float) -> float | None:
    """Seconds of all products together, as the tables have them; None if they lack one."""
    total = 0.0
    for number, kind in enumerate(work.matrices):
        *halves, N, K = kind.shape
        last = number == len(work.matrices) - 1
        entry = lookup(
            device_kind,
            kernel=name if last else f"{name}.gate_up",
            dtype=kind.form,
            out_dtype="float32" if last and work.activation else work.rows,
            K=K,
            N=N * (halves[0] if halves else 1),
            rows_per_group=rows_per_group,
        )
        if entry is None:
            return None
        total += entry["seconds"]
    return total

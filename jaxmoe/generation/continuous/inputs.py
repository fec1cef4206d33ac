"""The arrays that tell a program of the work to do, made on the host."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxmoe.generation.continuous.job import Job
from jaxmoe.generation.continuous.pages import NO_PAGE
from jaxmoe.generation.continuous.programs import ADAPTER, SLOT
from jaxmoe.generation.continuous.scheduler import Decode, Prefill
from jaxmoe.generation.continuous.sizes import Sizes


class PrefillInputs(NamedTuple):
    """Inputs of a prefill; arguments of the program of `SlotPrograms.prefill_chunk`.

    Attributes:
        tokens: int32 [B, S], tokens of each row, filled up with zeros.
        rows: int32 [B, 4], `POSITION`, `COUNT`, `SLOT` and `ADAPTER` of each row.
        pages: int32 [B, n], pages that the tokens go to.
        table: int32 [B, m], all pages of a row up to its last token; None where nothing is looked back at.
    """

    tokens: np.ndarray
    rows: np.ndarray
    pages: np.ndarray
    table: np.ndarray | None


class DecodeInputs(NamedTuple):
    """Inputs of a decode step, beside the tokens, which are on the devices; see `PrefillInputs`."""

    rows: np.ndarray
    table: np.ndarray


def prefill_inputs(work: Prefill, sizes: Sizes, adapter_of: Callable[[Job], int]) -> PrefillInputs:
    """Make the inputs of a prefill.

    Args:
        work: chunks of jobs, some from each group.
        sizes: sizes of the engine.
        adapter_of: function that gives the number of a job's adapter, -1 for none.
    """
    B, n = sizes.groups * work.rows, work.size // sizes.page
    tokens, pages = np.zeros((B, work.size), np.int32), np.full((B, n), NO_PAGE, np.int32)
    table = np.full((B, work.history // sizes.page + n), NO_PAGE, np.int32)
    rows = np.zeros((B, 4), np.int32)
    rows[:, SLOT], rows[:, ADAPTER] = sizes.slots, -1
    filled = [0] * sizes.groups
    for job, start, count in work.chunks:
        group, slot = job.place
        row = group * work.rows + filled[group]
        filled[group] += 1
        tokens[row, :count] = job.token_ids[start : start + count]
        rows[row] = start, count, slot, adapter_of(job)
        first, last = start // sizes.page, sizes.pages_of(start + count)
        pages[row, : last - first] = job.pages[first:last]
        table[row, :last] = job.pages[:last] if work.history else NO_PAGE
    return PrefillInputs(tokens, rows, pages, table if work.history else None)


def decode_inputs(work: Decode, sizes: Sizes, adapter_of: Callable[[Job], int]) -> DecodeInputs:
    """Make the inputs of a decode step, a row for each slot; arguments as for `prefill_inputs`."""
    B = sizes.groups * sizes.slots
    rows, table = np.zeros((B, 4), np.int32), np.full((B, work.length // sizes.page), NO_PAGE, np.int32)
    rows[:, ADAPTER] = -1
    for job in work.jobs:
        row = sizes.row_of(job.place)
        rows[row] = job.computed - 1, 1, job.place[1], adapter_of(job)
        table[row, : len(job.pages)] = job.pages[: table.shape[1]]
    return DecodeInputs(rows, table)

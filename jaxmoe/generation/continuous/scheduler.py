"""The order of things: which request runs where and when, shared beginnings, preemption. It is plain Python, without arrays.

Slots and pages come in groups, one for each part of the mesh that has rows of its own. Requests are served in the order in
which they came: the oldest that waits is admitted first, and pages that run out are taken from the youngest. So the oldest
of a group always goes on, and since a request that does not fit alone is refused, every request ends.
"""

import bisect
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from jaxmoe.generation.continuous.job import Job
from jaxmoe.generation.continuous.pages import PageKey, PagePool, page_keys
from jaxmoe.generation.continuous.sizes import Sizes
from jaxmoe.generation.requests import Request

# Prefills that may follow each other while fewer than half of the slots generate: full slots are what is fast, and those
# that generate wait no longer than this.
PREFILLS_IN_A_ROW = 4


class Chunk(NamedTuple):
    """Tokens of one job in a prefill: `length` of them from position `start` on."""

    job: Job
    start: int
    length: int

    @property
    def ends(self) -> bool:
        """Whether the job's next token comes out of it."""
        return self.start + self.length == self.job.target


class Prefill(NamedTuple):
    """A prefill to launch: up to `rows` chunks of each group, padded to `size`, that look back at `history` positions."""

    chunks: list[Chunk]
    rows: int
    size: int
    history: int


class Decode(NamedTuple):
    """A decode step to launch: one token of each job, which looks at `length` positions."""

    jobs: list[Job]
    length: int


class Scheduler:
    """Decides what is computed next.

    Args:
        sizes: sizes of the programs and of the cache.
        on_admit: function that is told of every job that gets a slot, before it is computed.
    """

    def __init__(self, sizes: Sizes, on_admit: Callable[[Job], None] = lambda job: None):
        self.sizes = sizes
        self.pools = [PagePool(sizes.pages) for _ in range(sizes.groups)]
        self.waiting: list[Job] = []
        self.running: dict[int, Job] = {}
        self.preemptions = self.cached_tokens = 0
        self._free_slots = [list(range(sizes.slots - 1, -1, -1)) for _ in range(sizes.groups)]
        self._on_admit = on_admit
        self._prefills_in_a_row = 0

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            ValueError: says which limit it is beyond.
        """
        sizes, prompt = self.sizes, len(request.token_ids)
        if prompt + request.max_new_tokens > sizes.max_length:
            raise ValueError(
                f"prompt and output together have at most {sizes.max_length} tokens, the engine's max_length; got a prompt "
                f"of {prompt} tokens and max_new_tokens={request.max_new_tokens}; ask for fewer, or make the engine with a "
                "larger max_length"
            )
        needed = sizes.pages_of(prompt + request.max_new_tokens - 1)
        if needed > sizes.pages:
            raise ValueError(
                f"a request fits into the {sizes.pages} pages of {sizes.page} tokens of a group of slots; got a prompt "
                f"of {prompt} tokens and max_new_tokens={request.max_new_tokens}, which need {needed}; ask for fewer "
                "tokens, or make the engine with more num_pages"
            )

    def submit(self, job: Job) -> None:
        """Let a job wait for a slot; `check` has passed."""
        bisect.insort(self.waiting, job, key=lambda one: one.id)

    def end(self, job: Job) -> None:
        """Take back all that an ended or canceled job has."""
        if job.slot is None:
            self.waiting.remove(job)
        else:
            self._vacate(job)

    def take_token(self, job: Job, token_id: int) -> None:
        """Note a token that the host has seen; the pages that it makes whole can be found from now on."""
        job.token_ids.append(token_id)
        self._name_pages(job, min(job.computed, len(job.token_ids) - 1))

    def next_work(self) -> Prefill | Decode | None:
        """Decide what to launch next, and count it as launched; None where there is nothing to do."""
        self._admit()
        by_age = [self.running[number] for number in sorted(self.running)]
        prefilling = [job for job in by_age if job.prefills]
        decoding = [job for job in by_age if not job.prefills and job.launched < job.request.max_new_tokens]
        allowed = PREFILLS_IN_A_ROW if 2 * len(decoding) < self.sizes.groups * self.sizes.slots else 1
        if prefilling and (not decoding or self._prefills_in_a_row < allowed):
            self._prefills_in_a_row += 1
            return self._prefill(prefilling)
        self._prefills_in_a_row = 0
        for job in decoding:
            self._make_room(job)
        decoding = [job for job in decoding if job.slot is not None]
        return self._decode(decoding) if decoding else None

    def forget_prefixes(self) -> None:
        """Let no page of this moment be shared later, as when the weights that made it have changed."""
        for pool in self.pools:
            pool.forget_all()
        for job in self.running.values():
            job.shares = False

    def _admit(self) -> None:
        """Give slots to those that wait, the oldest first, until one finds no place."""
        while self.waiting:
            job = self.waiting[0]
            place = self._place(job)
            if place is None:
                return
            self.waiting.pop(0)
            group, shared = place
            pool = self.pools[group]
            pool.hold(shared)
            new = [pool.take() for _ in range(self._pages_at_first(job) - len(shared))]
            job.enter(group, self._free_slots[group].pop(), [*shared, *(page for page in new if page is not None)])
            assert len(job.pages) == self._pages_at_first(job)
            job.computed = len(shared) * self.sizes.page
            job.named = len(shared)
            self.cached_tokens += job.computed
            self.running[job.id] = job
            self._on_admit(job)

    def _pages_at_first(self, job: Job) -> int:
        """Pages for all tokens that are known, and for the next one if it will be computed."""
        return self.sizes.pages_of(min(len(job.token_ids) + 1, job.positions))

    def _place(self, job: Job) -> tuple[int, list[int]] | None:
        """Choose a group for a job, and find the pages there that hold its beginning; None where it has to wait.

        The group that holds most of it is the best one, then the one with the most free slots.
        """
        # At least the last token is computed: the next one comes out of it.
        keys = self._keys(job, (len(job.token_ids) - 1) // self.sizes.page) if self.sizes.shares else []
        best: tuple[tuple[int, int], int, list[int], bool] | None = None
        for group, pool in enumerate(self.pools):
            if not self._free_slots[group]:
                continue
            shared: list[int] = []
            for key in keys:
                page = pool.find(key)
                if page is None:
                    break
                shared.append(page)
            # Somebody else is about to compute the next page of this very beginning.
            coming = len(shared) < len(keys) and keys[len(shared)] in self._coming(group)
            room = pool.available - sum(map(pool.is_kept, shared))
            if not coming and room < self._pages_at_first(job) - len(shared):
                continue
            rank = (len(shared) + coming, len(self._free_slots[group]))
            if best is None or rank > best[0]:
                best = (rank, group, shared, coming)
        return None if best is None or best[3] else best[1:3]

    def _coming(self, group: int) -> set[PageKey]:
        """Keys of the pages that prefills of this group have yet to fill."""
        page = self.sizes.page
        return {
            key
            for job in self.running.values()
            if job.group == group and job.prefills and job.shares
            for key in self._keys(job, job.target // page)[job.computed // page :]
        }

    def _keys(self, job: Job, count: int) -> list[PageKey]:
        """Keys of the first pages of a job."""
        have = len(job.keys)
        if have < count:
            adapter = job.request.adapter
            before = job.keys[-1] if have else b"" if adapter is None else adapter.encode()
            more = page_keys(job.token_ids[have * self.sizes.page :], self.sizes.page, before)
            job.keys += islice(more, count - have)
        return job.keys[:count]

    def _name_pages(self, job: Job, positions: int) -> None:
        """Let the pages that are whole with so many positions be found."""
        count = positions // self.sizes.page
        if not self.sizes.shares or not job.shares or count <= job.named:
            return
        pool = self.pools[job.place[0]]
        for page, key in list(zip(job.pages, self._keys(job, count), strict=False))[job.named :]:
            pool.name(page, key)
        job.named = count

    def _prefill(self, prefilling: list[Job]) -> Prefill:
        """Take the oldest job's next tokens, and those of others that go with them in the same program."""
        sizes, first = self.sizes, prefilling[0]
        begins = first.computed == 0
        size = sizes.chunk_for(first.target - first.computed, begins)
        most = sizes.rows if begins and size <= sizes.chunk else 1
        chunks: list[Chunk] = []
        taken = [0] * sizes.groups
        for job in prefilling:
            group, left = job.place[0], job.target - job.computed
            goes_along = (job.computed == 0) == begins and sizes.chunk_for(left, begins) <= size
            if goes_along and taken[group] < most:
                taken[group] += 1
                chunks.append(Chunk(job, job.computed, min(left, size)))
        history = 0 if begins else sizes.length_for(max(chunk.start for chunk in chunks))
        for chunk in chunks:
            chunk.job.computed += chunk.length
            chunk.job.launched += chunk.ends
            self._name_pages(chunk.job, chunk.job.computed)
        return Prefill(chunks, most if max(taken) > 1 else 1, size, history)

    def _decode(self, jobs: list[Job]) -> Decode:
        for job in jobs:
            job.computed += 1
            job.launched += 1
        return Decode(jobs, self.sizes.length_for(max(job.computed for job in jobs)))

    def _make_room(self, job: Job) -> None:
        """Hold a page for the job's next token; where there is none, the youngest of its group gives back its own."""
        while job.slot is not None and len(job.pages) * self.sizes.page <= job.computed:
            group = job.place[0]
            page = self.pools[group].take()
            if page is None:
                self._preempt(max((one for one in self.running.values() if one.group == group), key=lambda one: one.id))
            else:
                job.pages.append(page)

    def _preempt(self, job: Job) -> None:
        """Take back a job's slot and pages; it waits, and computes its tokens again."""
        self.preemptions += 1
        self._vacate(job)
        self.submit(job)

    def _vacate(self, job: Job) -> None:
        group, slot = job.place
        self.pools[group].let_go(job.pages)
        self._free_slots[group].append(slot)
        del self.running[job.id]
        job.leave()

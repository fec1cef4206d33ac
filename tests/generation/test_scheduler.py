"""Pages, slots and the order of things in continuous batching: nothing leaks, and nothing is shared wrongly."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxmoe.generation.continuous.job import Job
from jaxmoe.generation.continuous.pages import PagePool, page_keys
from jaxmoe.generation.continuous.scheduler import Decode, Prefill, Scheduler
from jaxmoe.generation.continuous.sizes import Sizes, make_sizes
from jaxmoe.generation.requests import Request


def sizes(**changes) -> Sizes:
    given = {"groups": 2, "slots": 3, "page": 4, "pages": 9, "chunk": 8, "rows": 2, "max_length": 36}
    return make_sizes(**{**given, "goes_on": True, "shares": True, **changes})


def job(number: int, tokens: list[int], new: int = 4, adapter: str | None = None) -> Job:
    return Job(number, Request(token_ids=tokens, max_new_tokens=new, adapter=adapter))


def finish(scheduler: Scheduler, jobs: list[Job]) -> int:
    """Run jobs to their ends as the engine does, and count the programs."""
    steps = 0
    while any(one.generated < one.request.max_new_tokens for one in jobs):
        work = scheduler.next_work()
        assert work is not None
        steps += 1
        ending = [chunk.job for chunk in work.chunks if chunk.ends] if isinstance(work, Prefill) else work.jobs
        for one in ending:
            scheduler.take_token(one, 50 + one.generated)
            if one.generated == one.request.max_new_tokens:
                scheduler.end(one)
    return steps


def test_a_key_says_all_that_is_before_it() -> None:
    keys = list(page_keys(range(12), 4))
    assert list(page_keys(range(11), 4)) == keys[:2]
    assert list(page_keys([0, 1, 2, 9, *range(4, 12)], 4))[1] != keys[1]
    assert next(page_keys(range(12), 4, b"adapter")) != keys[0]
    assert list(page_keys(range(4, 12), 4, keys[0])) == keys[1:]


def test_kept_pages_give_way_from_the_end_of_the_oldest() -> None:
    pool = PagePool(4)
    first, second = [pool.take(), pool.take()], [pool.take(), pool.take()]
    for name, page in zip("abcd", [*first, *second], strict=True):
        pool.name(page, name.encode())
    assert pool.take() is None
    pool.let_go(first)
    pool.let_go(second)
    assert (pool.in_use, pool.kept, pool.available) == (0, 4, 4)
    assert [pool.take() for _ in range(4)] == [*reversed(first), *reversed(second)]
    assert all(pool.find(name.encode()) is None for name in "abcd")


def test_equal_beginnings_are_computed_once_and_wait_for_it() -> None:
    scheduler = Scheduler(sizes(groups=1, pages=18))
    jobs = [job(n, [*range(10), n]) for n in range(3)]
    for one in jobs:
        scheduler.submit(one)
    first = scheduler.next_work()
    assert isinstance(first, Prefill)
    # The others wait while their beginning is computed.
    assert [chunk.job for chunk in first.chunks] == jobs[:1]
    finish(scheduler, jobs)
    assert scheduler.cached_tokens == 2 * 8
    assert jobs[0].pages == []


def test_an_adapter_shares_with_its_own_alone() -> None:
    scheduler = Scheduler(sizes(groups=1))
    for number, adapter in enumerate([None, "a", "a"]):
        one = job(number, [*range(9)], adapter=adapter)
        scheduler.submit(one)
        finish(scheduler, [one])
    assert scheduler.cached_tokens == 8


def test_a_prompt_goes_where_its_beginning_is() -> None:
    scheduler = Scheduler(sizes())
    jobs = [job(0, [9] * 7), job(1, [8] * 7), job(2, [8] * 7)]
    places = []
    for one in jobs:
        scheduler.submit(one)
        scheduler.next_work()
        places.append(one.group)
    assert places == [0, 1, 1]


def test_whole_prompts_where_a_layer_cannot_go_on() -> None:
    scheduler = Scheduler(sizes(groups=1, goes_on=False, shares=False))
    assert scheduler.sizes.chunks == (8, 16, 32, 36)
    long = job(0, [*range(30)])
    scheduler.submit(long)
    work = scheduler.next_work()
    assert isinstance(work, Prefill)
    assert (work.size, work.rows, work.history) == (32, 1, 0)
    assert work.chunks[0].ends


def test_a_long_prompt_leaves_the_others_going() -> None:
    scheduler = Scheduler(sizes(groups=1, slots=2, pages=18))
    short, long = job(0, [1, 2], new=9), job(1, [*range(30)])
    scheduler.submit(short)
    scheduler.next_work()
    scheduler.submit(long)
    kinds = [type(scheduler.next_work()) for _ in range(8)]
    assert kinds == [Decode, Prefill] * 4


def test_the_youngest_gives_way_and_is_computed_again() -> None:
    scheduler = Scheduler(sizes(groups=1, pages=6, shares=False))
    jobs = [job(n, [n] * 8, new=12) for n in range(2)]
    for one in jobs:
        scheduler.submit(one)
    finish(scheduler, jobs)
    assert scheduler.preemptions > 0
    assert jobs[0].life == 1  # it has left once, at its end
    assert jobs[1].life > 1


@pytest.mark.parametrize(
    ("tokens", "new", "message"),
    [(30, 7, "at most 36 tokens, the engine's max_length"), (30, 6, "fits into the 8 pages of 4 tokens")],
)
def test_what_could_never_run_is_refused(tokens, new, message) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduler(sizes(pages=8)).check(Request(token_ids=[1] * tokens, max_new_tokens=new))


def test_every_prefill_finds_its_program() -> None:
    for one in (sizes(), sizes(chunk=30), sizes(goes_on=False), sizes(max_length=5), sizes(page=1, chunk=3)):
        programs = one.prefills
        assert len({*programs}) == len(programs)
        for left in range(1, one.max_length + 1):
            size = one.chunk_for(left, True)
            assert (1, size, 0) in programs
            assert size >= min(left, one.chunks[-1])
            if one.goes_on:
                assert (1, one.chunk_for(left, False), one.length_for(left)) in programs


class Comings(RuleBasedStateMachine):
    """Requests come, go on, are canceled and end in any order; what was launched may arrive later."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(sizes(pages=10))
        self.jobs: dict[int, Job] = {}
        self.under_way: list[tuple[Job, int]] = []
        self.count = 0
        # What each page of each group holds, as far as programs were launched.
        self.content: dict[tuple[int, int], tuple[int, ...]] = {}

    @rule(start=st.integers(0, 2), length=st.integers(1, 24), new=st.integers(1, 12))
    def submit(self, start: int, length: int, new: int) -> None:
        one = job(self.count, [start] * min(length, 9) + [start + 7] * max(0, length - 9), new)
        self.count += 1
        self.jobs[one.id] = one
        self.scheduler.submit(one)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))])

    @rule(token=st.integers(60, 61), ends=st.booleans())
    def step(self, token: int, ends: bool) -> None:
        last, self.under_way = self.under_way, []
        work = self.scheduler.next_work()
        if work is not None:
            self.launch(work)
        for one, life in last:
            if one.life == life:
                self.scheduler.take_token(one, token)
                if ends or one.generated == one.request.max_new_tokens:
                    self.end(one)

    def launch(self, work: Prefill | Decode) -> None:
        taken: Counter[int] = Counter()
        if isinstance(work, Decode):
            for one in work.jobs:
                group, _ = one.place
                assert one.computed <= work.length
                assert one.computed == len(one.request.token_ids) + one.launched - 1
                page = one.pages[(one.computed - 1) // 4]
                self.content[group, page] = (*self.content.get((group, page), ()), -one.id - 1)
            self.under_way = [(one, one.life) for one in work.jobs]
            return
        assert (work.rows, work.size, work.history) in self.scheduler.sizes.prefills
        written: set[tuple[int, int]] = set()
        for one, start, count in work.chunks:
            group, _ = one.place
            taken[group] += 1
            assert start % 4 == 0
            assert 0 < count <= work.size
            assert start <= work.history
            for first in range(start, start + count, 4):
                page = one.pages[first // 4]
                assert (group, page) not in written
                written.add((group, page))
                self.content[group, page] = tuple(one.token_ids[first : min(first + 4, start + count)])
        for one, start, _ in work.chunks:
            # What was shared is what the job would have computed, and no program of this moment computes it.
            for index in range(start // 4):
                place = one.place[0], one.pages[index]
                assert place not in written
                held = self.content[place]
                known = one.token_ids[4 * index : 4 * index + 4]
                assert all(token in (mine, -99) or token < 0 for token, mine in zip(held, known, strict=True))
        assert max(taken.values()) <= work.rows
        self.under_way = [(chunk.job, chunk.job.life) for chunk in work.chunks if chunk.ends]

    def end(self, one: Job) -> None:
        del self.jobs[one.id]
        self.scheduler.end(one)

    @invariant()
    def every_page_and_slot_is_accounted_for(self) -> None:
        scheduler = self.scheduler
        assert {one.id for one in scheduler.waiting} | {*scheduler.running} == {*self.jobs}
        for group, pool in enumerate(scheduler.pools):
            here = [one for one in scheduler.running.values() if one.group == group]
            assert len({one.slot for one in here}) == len(here) <= scheduler.sizes.slots
            held = Counter(page for one in here for page in one.pages)
            assert held == Counter(pool._holders)
            free = [*pool._free, *pool._kept]
            assert sorted([*held, *free]) == list(range(1, pool.num_pages + 1))
            assert {*pool._kept} <= {*pool._key_of}
            for one in here:
                assert len(one.pages) == len({*one.pages})

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.jobs:
                break
            self.step(60, False)
        assert not self.jobs


TestComings = Comings.TestCase
TestComings.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)

"""`Job`: a request on its way through the engine."""

import dataclasses

from jaxmoe.generation.continuous.pages import PageKey
from jaxmoe.generation.requests import Request


@dataclasses.dataclass(eq=False)
class Job:
    """One request on its way.

    Attributes:
        id: number of the request, in the order in which requests came.
        request: the request.
        token_ids: tokens of the prompt, and those generated, as far as the host has seen them.
        group, slot: place where it runs; None while it waits.
        pages: pages that it holds, first to last.
        computed: positions that are in the pages, or will be when the programs under way have run.
        target: number of tokens that are prefilled before it generates (on).
        launched: tokens generated, those on their way included.
        life: number of times that it was preempted: tokens of an earlier life that arrive later are dropped.
        keys: keys of its first pages, as far as they were asked for.
        named: number of its pages that can be found by others, or need not.
        shares: whether what it computes may be found by others.
    """

    id: int
    request: Request
    token_ids: list[int] = dataclasses.field(default_factory=list)
    group: int | None = None
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    target: int = 0
    launched: int = 0
    life: int = 0
    keys: list[PageKey] = dataclasses.field(default_factory=list)
    named: int = 0
    shares: bool = True

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.token_ids]

    @property
    def generated(self) -> int:
        """Tokens generated, as far as the host has seen them."""
        return len(self.token_ids) - len(self.request.token_ids)

    @property
    def positions(self) -> int:
        """Positions that are computed when it runs to its end: all but that of its last token."""
        return len(self.request.token_ids) + self.request.max_new_tokens - 1

    @property
    def prefills(self) -> bool:
        """Whether some of its tokens have to be prefilled yet."""
        return self.computed < self.target

    @property
    def place(self) -> tuple[int, int]:
        """Group and slot of a job that runs."""
        assert self.group is not None
        assert self.slot is not None
        return self.group, self.slot

    def enter(self, group: int, slot: int, pages: list[int]) -> None:
        """Run in a slot, from the start."""
        self.group, self.slot, self.pages = group, slot, pages
        self.computed, self.target, self.launched = 0, len(self.token_ids), self.generated

    def leave(self) -> None:
        """Give back the slot; what is on its way for it is dropped."""
        self.group = self.slot = None
        self.pages, self.computed, self.target, self.launched, self.named = [], 0, 0, 0, 0
        self.life += 1
        self.shares = True

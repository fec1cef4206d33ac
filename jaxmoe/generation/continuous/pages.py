"""Pages of the KV cache: who holds them, which are free, and which hold the beginning of a prompt that may come again."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# Rows that compute nothing write here; no one holds it and what is in it is never seen.
NO_PAGE = 0

PageKey = bytes


def page_keys(token_ids: Sequence[int], page_size: int, first: PageKey = b"") -> Iterator[PageKey]:
    """Give the key of each full page of a sequence: it says what is in the page and in all before.

    Args:
        token_ids: tokens of the sequence.
        page_size: tokens of a page.
        first: bytes for all else that the cache of these tokens depends on, such as an adapter.
    """
    key = first
    for start in range(0, len(token_ids) - page_size + 1, page_size):
        tokens = np.asarray(token_ids[start : start + page_size], np.int32)
        key = hashlib.blake2b(key + tokens.tobytes(), digest_size=32).digest()
        yield key


class PagePool:
    """The pages of one group of slots, counted from 1.

    A page is held by one sequence or several, kept (nobody holds it, and its key finds it), or free. Kept pages give way
    when the free ones run out, the one that was let go first before the others.

    Args:
        num_pages: number of pages, at least 1.

    Example:
        >>> pool = PagePool(2)
        >>> page = pool.take()
        >>> pool.name(page, b"key"), pool.let_go([page])
        (None, None)
        >>> pool.find(b"key") == page, pool.available
        (True, 2)
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._holders: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, PageKey] = {}
        self._page_of: dict[PageKey, int] = {}

    @property
    def available(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._kept)

    @property
    def in_use(self) -> int:
        """Pages that somebody holds."""
        return len(self._holders)

    @property
    def kept(self) -> int:
        """Pages that nobody holds and whose key finds them."""
        return len(self._kept)

    def take(self) -> int | None:
        """Hold a page for new tokens; None where every page is held."""
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._holders[page] = 1
        return page

    def find(self, key: PageKey) -> int | None:
        """The page that has this key; None for none."""
        return self._page_of.get(key)

    def is_kept(self, page: int) -> bool:
        """Whether nobody holds a page that was found."""
        return page in self._kept

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that were found, beside those who hold them already."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1

    def name(self, page: int, key: PageKey) -> None:
        """Let a held page be found by its key from now on, unless another page is found by it."""
        assert page in self._holders
        if key not in self._page_of and page not in self._key_of:
            self._key_of[page], self._page_of[key] = key, page

    def let_go(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages, given from its first to its last.

        Of those that are kept the last ones give way first: a page is of no use without those before it.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._key_of:
                self._kept[page] = None
            else:
                self._free.append(page)

    def forget_all(self) -> None:
        """Let no page be found any more, as when the weights that made them have changed."""
        self._key_of.clear()
        self._page_of.clear()
        self._free += self._kept
        self._kept.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]

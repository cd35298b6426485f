"""The page pool's bookkeeping: which pages of the KV cache are free, who holds the others, and what full ones contain."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence


class PagePool:
    """Hands out page numbers 1 … num_pages - 1. Page 0 is the bin that padding writes to and is never handed out.

    A held page has references, one a holder. A page nobody holds is free. A page whose content is registered under a
    digest can be found again, also once it is free: then the least recently used one is forgotten and handed out when
    no other page is left.
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}; at least 2 are needed: page 0 is reserved for padding")
        self.num_pages = num_pages
        self._free = deque(range(1, num_pages))
        self._free_registered: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._references = [0] * num_pages
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free) + len(self._free_registered)

    @property
    def num_registered(self) -> int:
        """Pages that can be found by their content, held or free."""
        return len(self._page_of)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, those that nobody could ask for again first.

        Raises:
            ValueError: there are not that many (ask `num_free` first).
        """
        if count > self.num_free:
            raise ValueError(f"{count} pages asked for, {self.num_free} of {self.num_pages - 1} are free")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._free_registered.popitem(last=False)
                del self._page_of[self._digest_of.pop(page)]
            self._references[page] = 1
            pages.append(page)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Drop one reference to each of a sequence's pages, given in order; the last ones are forgotten first.

        Raises:
            ValueError: a page that is not held.
        """
        for page in reversed(pages):
            self._check_held(page, "freed")
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._digest_of:
                    self._free_registered[page] = None
                else:
                    self._free.append(page)

    # ---- prefix caching

    def find(self, digest: bytes) -> int | None:
        """The page registered under a digest."""
        return self._page_of.get(digest)

    def is_held(self, page: int) -> bool:
        return self._references[page] > 0

    def share(self, pages: Iterable[int]) -> None:
        """Take a reference to each of some found pages, held or free.

        Raises:
            ValueError: a page that is not registered: only full pages, which nobody writes to, may be shared.
        """
        for page in pages:
            if page not in self._digest_of:
                raise ValueError(f"page {page} is not registered and cannot be shared")
            self._free_registered.pop(page, None)
            self._references[page] += 1

    def register(self, page: int, digest: bytes) -> None:
        """Say what a held, full page contains. A digest that another page has already stays with that one.

        Raises:
            ValueError: the page is not held.
        """
        self._check_held(page, "registered")
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def unregister(self, pages: Iterable[int]) -> None:
        """Forget what these pages contain: nobody will find them again."""
        for page in pages:
            if page in self._digest_of:
                del self._page_of[self._digest_of.pop(page)]
                if page in self._free_registered:
                    del self._free_registered[page]
                    self._free.append(page)

    def reset_prefix_cache(self) -> None:
        """Forget what all pages contain."""
        self.unregister(list(self._digest_of))

    def _check_held(self, page: int, what: str) -> None:
        if not 0 < page < self.num_pages or self._references[page] == 0:
            raise ValueError(f"page {page} is not held and cannot be {what}")


def page_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """32 bytes that stand for a full page's content: its tokens and, through the page before it, all earlier ones.

    Keys and values depend on nothing else. The first page's parent is b"". BLAKE2b, so that nobody can craft two prompts
    that share a digest and read the wrong one's cache.
    """
    return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=32).digest()

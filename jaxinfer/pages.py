"""The page pool's bookkeeping: which pages of the KV cache are free, and who holds the others."""

from __future__ import annotations

from collections import deque


class PagePool:
    """Hands out page numbers 1 … num_pages - 1. Page 0 is the bin that padding writes to and is never handed out.

    Invariant: every page is either free or has a positive reference count.
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}; at least 2 are needed: page 0 is reserved for padding")
        self.num_pages = num_pages
        self._free = deque(range(1, num_pages))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages.

        Raises:
            ValueError: there are not that many (ask `num_free` first).
        """
        if count > len(self._free):
            raise ValueError(f"{count} pages asked for, {len(self._free)} of {self.num_pages - 1} are free")
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def free(self, pages: list[int]) -> None:
        """Drop one reference to each page; those without another go back to the pool.

        Raises:
            ValueError: a page that is not held.
        """
        for page in pages:
            if not 0 < page < self.num_pages or self._references[page] == 0:
                raise ValueError(f"page {page} is not held and cannot be freed")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

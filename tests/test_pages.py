"""The page pool: pages are conserved whatever is done, and misuse is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.pages import PagePool


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_every_page_is_free_or_held_once(operations: list[tuple[bool, int]]) -> None:
    pool = PagePool(24)
    held: list[list[int]] = []
    for take, n in operations:
        if take and n <= pool.num_free:
            held.append(pool.allocate(n))
        elif held and not take:
            pool.free(held.pop(n % len(held)))
        out = [page for pages in held for page in pages]
        assert len(set(out)) == len(out)
        assert 0 not in out
        assert len(out) + pool.num_free == 23


def test_misuse_is_refused() -> None:
    pool = PagePool(4)
    with pytest.raises(ValueError, match="num_pages=1"):
        PagePool(1)
    with pytest.raises(ValueError, match="4 pages asked for, 3 of 3 are free"):
        pool.allocate(4)
    pages = pool.allocate(2)
    pool.free(pages)
    for page in (pages[0], 0, 4):
        with pytest.raises(ValueError, match=f"page {page} is not held"):
            pool.free([page])

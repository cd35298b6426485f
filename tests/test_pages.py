"""The page pool: pages are conserved whatever is done, contents are found while they last, and misuse is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.pages import PagePool, page_digest


@given(st.lists(st.tuples(st.sampled_from("take free share register forget reset".split()), st.integers(0, 9)), max_size=60))
def test_every_page_is_free_or_held(operations: list[tuple[str, int]]) -> None:
    pool = PagePool(24)
    held: list[list[int]] = []
    content: dict[bytes, int] = {}  # what was registered last for it
    for what, n in operations:
        if what == "take" and n <= pool.num_free:
            pages = pool.allocate(n)
            assert not {page for some in held for page in some} & set(pages)
            held.append(pages)
        elif what == "share" and (page := pool.find(bytes([n]))) is not None:
            assert page == content[bytes([n])]
            pool.share([page])
            held.append([page])
        elif what == "register" and held and held[0]:
            known = pool.find(bytes([n]))
            pool.register(held[0][-1], bytes([n]))
            now = pool.find(bytes([n]))
            assert now in (None, held[0][-1]) if known is None else now == known
            if now is not None:
                content[bytes([n])] = now
        elif what == "free" and held:
            pool.free(held.pop(n % len(held)))
        elif what == "forget" and held:
            pool.unregister(held[0])
            assert not set(held[0]) & {pool.find(bytes([i])) for i in range(10)}
        elif what == "reset" and n == 0:
            pool.reset_prefix_cache()
            assert pool.num_registered == 0
        out = {page for pages in held for page in pages}
        assert 0 not in out
        assert len(out) + pool.num_free == 23
        assert pool.num_registered == sum(pool.find(bytes([i])) is not None for i in range(10))


def test_free_pages_without_content_go_first_then_the_least_recently_used_tails_first() -> None:
    pool = PagePool(8)
    a, b, plain = pool.allocate(2), pool.allocate(2), pool.allocate(3)
    for page in a + b:
        pool.register(page, bytes([page]))
    for pages in (a, b, plain):
        pool.free(pages)
    pool.share(a)  # used again: now b's are the oldest
    pool.free(a)
    assert set(pool.allocate(3)) == set(plain)
    assert [pool.allocate(1)[0] for _ in range(4)] == [b[1], b[0], a[1], a[0]]
    assert pool.num_registered == 0


def test_misuse_is_refused() -> None:
    pool = PagePool(4)
    with pytest.raises(ValueError, match="num_pages=1"):
        PagePool(1)
    with pytest.raises(ValueError, match="4 pages asked for, 3 of 3 are free"):
        pool.allocate(4)
    pages = pool.allocate(2)
    with pytest.raises(ValueError, match=f"page {pages[0]} is not registered"):
        pool.share(pages)
    pool.free(pages)
    for page in (pages[0], 0, 4):
        with pytest.raises(ValueError, match=f"page {page} is not held and cannot be freed"):
            pool.free([page])
        with pytest.raises(ValueError, match=f"page {page} is not held and cannot be registered"):
            pool.register(page, b"")


def test_a_digest_stands_for_a_page_and_all_before_it() -> None:
    first = page_digest(b"", [1, 2])
    digests = [first, page_digest(b"", [2, 1]), page_digest(first, [1, 2]), page_digest(b"", [513, 0])]
    assert len(set(digests)) == len(digests)
    assert page_digest(b"", (1, 2)) == first

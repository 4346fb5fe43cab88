"""The page pool as pure data: hand-made cases, then random walks with all invariants checked at each step."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.engine.page_pool import PagePool


def keys_of(pool: PagePool, tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    pool.extend_keys(keys, array("q", tokens), len(tokens) // pool.page_size)
    return keys


def fill(pool: PagePool, tokens: list[int]) -> list[int]:
    """Allocate, publish and return the pages of full pages of tokens."""
    pages = []
    for key in keys_of(pool, tokens):
        pages.append(pool.allocate())
        pool.publish(pages[-1], key)
    return pages


def test_a_released_prefix_is_found_again_and_shared_by_reference() -> None:
    pool = PagePool(num_pages=8, page_size=2)
    pages = fill(pool, [1, 2, 3, 4, 5, 6])
    pool.release(pages)
    assert pool.num_free == 8
    found = pool.match(keys_of(pool, [1, 2, 3, 4, 9, 9]))
    assert found == pages[:2]
    assert pool.num_free_without(found) == 6
    pool.retain(found)
    pool.retain(found)
    pool.check([found, found])
    pool.release(found)
    pool.check([found])


def test_a_page_is_the_same_only_with_the_same_tokens_before_it() -> None:
    pool = PagePool(num_pages=8, page_size=2)
    fill(pool, [1, 2, 3, 4])
    assert pool.match(keys_of(pool, [7, 7, 3, 4])) == []
    assert len(pool.match(keys_of(pool, [1, 2, 7, 7]))) == 1


def test_empty_pages_go_first_then_those_freed_longest_ago_and_a_prefix_from_its_end() -> None:
    pool = PagePool(num_pages=6, page_size=1)
    old, new = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.release(old)
    pool.release(new)
    order = [pool.allocate() for _ in range(6)]
    assert set(order[:2]) == {4, 5}
    assert order[2:] == [old[1], old[0], new[1], new[0]]
    assert pool.match(keys_of(pool, [1])) == []
    pool.check([order])


def test_a_page_used_again_becomes_the_last_to_be_evicted() -> None:
    pool = PagePool(num_pages=2, page_size=1)
    first, second = fill(pool, [1]), fill(pool, [2])
    pool.release(first)
    pool.release(second)
    pool.retain(first)
    pool.release(first)
    assert pool.allocate() == second[0]
    assert pool.match(keys_of(pool, [1])) == first


def test_the_same_content_twice_is_published_once() -> None:
    pool = PagePool(num_pages=4, page_size=1)
    first, second = fill(pool, [5]), fill(pool, [5])
    assert pool.match(keys_of(pool, [5])) == first
    pool.release(second)
    assert pool.allocate() == second[0], "the page nobody can find has nothing to keep"
    pool.check([first, second])


def test_without_block_reuse_nothing_is_found() -> None:
    pool = PagePool(num_pages=4, page_size=1, enable_block_reuse=False)
    pool.release(fill(pool, [5]))
    assert pool.match(keys_of(pool, [5])) == []


def test_keys_do_not_depend_on_the_process() -> None:
    pool = PagePool(num_pages=1, page_size=2)
    assert keys_of(pool, [1, 2, 3, 4])[1].hex() == "b7d206afafc69562e9a824c16c0a95f1"


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 4), (4, 0), (-1, 1)])
def test_a_cache_that_holds_nothing_is_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        PagePool(num_pages, page_size)


def test_check_sees_a_lost_and_a_doubled_page() -> None:
    pool = PagePool(num_pages=4, page_size=1)
    pages = [pool.allocate(), pool.allocate()]
    pool.check([pages])
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([pages[:1]])
    with pytest.raises(AssertionError, match="twice"):
        pool.check([[pages[0], pages[0]]])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 3), st.booleans())
def test_random_walks_keep_every_invariant(
    data: st.DataObject, num_pages: int, page_size: int, reuse: bool
) -> None:
    pool = PagePool(num_pages, page_size, reuse)
    content: dict[int, tuple[int, ...]] = {}  # what each page was last filled with: all tokens up to its end
    held: list[list[int]] = []
    for _ in range(25):
        if held and data.draw(st.booleans()):
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4 * page_size))
            keys = keys_of(pool, tokens)
            pages = pool.match(keys)
            for index, page in enumerate(pages):
                assert content[page] == tuple(tokens[: (index + 1) * page_size]), "found something else"
            missing = len(keys) - len(pages)
            if missing > pool.num_free_without(pages):
                continue
            pool.retain(pages)
            for index in range(len(pages), len(keys)):
                pages.append(pool.allocate())
                content[pages[-1]] = tuple(tokens[: (index + 1) * page_size])
                pool.publish(pages[-1], keys[index])
            held.append(pages)
        pool.check(held)
    for pages in held:
        pool.release(pages)
    pool.check([])
    assert pool.num_free == num_pages

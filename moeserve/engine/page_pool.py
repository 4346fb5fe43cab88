"""Which pages of the KV cache are held, by how many sequences, and what the free ones still contain.

Pure bookkeeping over page numbers: knows no tensor, no sequence and no policy. Deterministic, so that every
rank of a replica that sees the same calls holds the same pages.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


class PagePool:
    """num_pages pages of page_size tokens each, counted by reference.

    A full page may be published under the key of its tokens and all tokens before it (`extend_keys`), and
    found again by the next sequence with the same prefix. A page that nobody holds is free, yet keeps its
    content until it is handed out again: pages without a key go first, then those freed longest ago.
    """

    def __init__(self, num_pages: int, page_size: int, enable_block_reuse: bool = True) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(
                f"a KV cache of {num_pages} pages of {page_size} tokens holds nothing: give both at least 1"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_block_reuse = enable_block_reuse
        self._references = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._page_of_key: dict[bytes, int] = {}
        self._key_of_page: list[bytes | None] = [None] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, those with reusable content included."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def extend_keys(self, keys: list[bytes], tokens: array[int], num_pages: int) -> None:
        """Append the keys of the full pages len(keys)..num_pages - 1 of a sequence of these tokens
        (int64)."""
        size = self.page_size
        for page in range(len(keys), num_pages):
            parent = keys[-1] if keys else b""
            content = tokens[page * size : (page + 1) * size]
            assert len(content) == size, "only a full page has a key"
            keys.append(blake2b(parent + content.tobytes(), digest_size=16).digest())

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages that hold the longest known prefix of these keys. Takes no reference."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of_key.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_free_without(self, pages: Iterable[int]) -> int:
        """Pages that would be left to allocate if these (from `match`) were retained."""
        return len(self._free) - sum(page in self._free for page in pages)

    def retain(self, pages: Iterable[int]) -> None:
        """Take one more reference to each of these pages, which `match` has just returned."""
        for page in pages:
            if self._references[page] == 0:
                del self._free[page]
            self._references[page] += 1

    def allocate(self) -> int:
        """A page to write to, held once; there must be a free one. What it contained is forgotten."""
        page, _ = self._free.popitem(last=False)
        key = self._key_of_page[page]
        if key is not None:
            del self._page_of_key[key]
            self._key_of_page[page] = None
        self._references[page] = 1
        return page

    def publish(self, page: int, key: bytes) -> None:
        """The held page is full and written: let others find it. The first page of a content is the one
        found."""
        assert self._references[page] > 0, "only a held page has known content"
        if self.enable_block_reuse and self._key_of_page[page] is None and key not in self._page_of_key:
            self._page_of_key[key] = page
            self._key_of_page[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference to each page of a sequence, given in order.

        Its last pages become the older ones: a prefix is evicted from its end, and stays findable from its
        start.
        """
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free[page] = None
                if self._key_of_page[page] is None:
                    self._free.move_to_end(page, last=False)

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Verify every invariant against the page lists of all sequences (AssertionError); for tests."""
        counts = [0] * self.num_pages
        for pages in holders:
            held = list(pages)
            assert len(set(held)) == len(held), f"a sequence holds a page twice: {held}"
            for page in held:
                counts[page] += 1
        assert counts == self._references, "reference counts differ from the holders"
        for page, count in enumerate(counts):
            assert (page in self._free) == (count == 0), (
                f"page {page} is held {count} times and free or neither"
            )
        for page, key in enumerate(self._key_of_page):
            assert key is None or self._page_of_key[key] == page, (
                f"page {page} has a key that leads elsewhere"
            )
        assert len(self._page_of_key) == sum(key is not None for key in self._key_of_page)
        keyed = [self._key_of_page[page] is not None for page in self._free]
        assert keyed == sorted(keyed), "a reusable page would be evicted before an empty one"

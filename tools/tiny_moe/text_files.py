"""Readers of the two archive formats that hold free books in Debian: R's lazy-load data and SWORD modules.

They give plain text; they know no domain and no tokenizer.
"""

import bz2
import html
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

# A string of R's serialisation: flags (any encoding bits), type 9, then its length as a big-endian int32.
_R_STRING = re.compile(rb"\x00[\x00-\xff][\x00-\xff]\x09(?=([\x00-\xff]{4}))")
_LONGEST_R_LINE = 4000


def read_r_books(path: Path, min_lines: int = 1000) -> list[list[str]]:
    """Lines of every long character vector in R's lazy-load database `path` (`Rdata.rdb`)."""
    vectors = (_r_strings(record) for record in _r_records(path.read_bytes()))
    return [lines for lines in vectors if len(lines) > min_lines]


def _r_records(data: bytes) -> Iterator[bytes]:
    """Decompressed records: each is its length (big-endian) and a zlib, "2" + bzip2 or "Z" + xz stream."""
    position = 0
    while position < len(data) - 8:
        length = struct.unpack_from(">I", data, position)[0]
        for skip, decompressor in (
            (4, zlib.decompressobj()),
            (5, bz2.BZ2Decompressor()),
            (5, lzma.LZMADecompressor()),
        ):
            try:
                record = decompressor.decompress(data[position + skip :])
            except (zlib.error, OSError, lzma.LZMAError, EOFError):
                continue
            if len(record) == length:
                yield record
                position = len(data) - len(decompressor.unused_data)
                break
        else:
            position += 1


def _r_strings(record: bytes) -> list[str]:
    strings: list[str] = []
    position = 0
    while match := _R_STRING.search(record, position):
        length = struct.unpack(">i", match[1])[0]
        start = match.end() + 4
        if not 0 <= length < _LONGEST_R_LINE or start + length > len(record):
            position = match.start() + 1
            continue
        raw = record[start : start + length]
        try:
            strings.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            strings.append(raw.decode("latin-1"))
        position = start + length
    return strings


def read_sword_books(module_dir: Path) -> list[str]:
    """Plain text of each book of a SWORD zText module: `{ot,nt}.bzs` index blocks of `{ot,nt}.bzz`."""
    books: list[str] = []
    for testament in ("ot", "nt"):
        index = (module_dir / f"{testament}.bzs").read_bytes()
        data = (module_dir / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index[: len(index) // 12 * 12]):
            if size:
                markup = zlib.decompress(data[offset : offset + size]).decode("utf-8", "replace")
                books.append(_strip_osis(markup))
    return books


def _strip_osis(markup: str) -> str:
    """OSIS markup as text: notes go, titles and line elements become line breaks."""
    text = re.sub(r"<note\b.*?</note>", "", markup, flags=re.S)
    text = re.sub(r"<title\b.*?</title>", "\n\n", text, flags=re.S)
    text = re.sub(r"<(lb|p|l|lg|milestone|div|chapter)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = text.replace("\x00", "").replace("¶", "\n")
    text = re.sub(r" ?\n ?", "\n", re.sub(r" +", " ", text))
    return re.sub(r"\n{2,}", "\n\n", text).strip()

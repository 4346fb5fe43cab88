"""Six domains of freely licensed text, found where Debian packages put them, cut into documents.

Licences stand in moeserve/tiny_model/NOTICE. Knows nothing of tokens or training.
"""

import re
import sysconfig
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny_moe.text_files import read_r_books, read_sword_books

_SKIPPED_STDLIB = {
    "test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "lib2to3", "__pycache__",
    "pydoc_data", "turtledemo", "ensurepip",
}  # fmt: skip


@dataclass(frozen=True)
class Documents:
    """One domain: documents to train on, and contiguous stretches held out."""

    train: list[str]
    held_out: list[str]


def read_corpus(data: Path, domains: Iterable[str]) -> dict[str, Documents]:
    """Documents of each of `domains` (names of `DOMAINS`).

    `data` is the root below which the packages are installed or unpacked (`/`, or a folder filled with
    `dpkg-deb -x`). Raises FileNotFoundError naming the package when one is missing.
    """
    return {name: _hold_out(list(DOMAINS[name](data))) for name in domains}


def _hold_out(documents: list[str]) -> Documents:
    """Every 25th run of five documents is held out, so that held-out text is contiguous."""
    documents = [tidy(d).strip("\n") for d in documents if len(d.strip()) > 80]
    held_out = [d for i, d in enumerate(documents) if i // 5 % 25 == 7]
    train = [d for i, d in enumerate(documents) if i // 5 % 25 != 7]
    return Documents(train, held_out or train[-1:])


# ---- domains: each yields documents of about 700 to 3,000 characters, in the order of the source


def prose(data: Path) -> Iterator[str]:
    austen = _need(data, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", "r-cran-janeaustenr")
    books = [_paragraphs(lines) for lines in read_r_books(austen)]
    for name, text in _snappy_classics(data):
        if name == "alice29.txt":
            books.append(_paragraphs(text.split("\n")))
        else:  # verse: line breaks are part of the text
            books.append([_strip_lines(stanza) for stanza in re.split(r"\n\s*\n", text)])
    for book in books:
        yield from _pack([p for p in book if p.strip()], 900, 2500)


def scripture(data: Path) -> Iterator[str]:
    module = "usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for book in read_sword_books(_need(data, module, "sword-text-web")):
        yield from _pack(_sentences(re.split(r"\n+", book), 2500), 900, 2500, "\n")


def spanish(data: Path) -> Iterator[str]:
    module = "usr/share/sword/modules/texts/ztext/spaRV1909eb"
    for book in read_sword_books(_need(data, module, "sword-text-sparv")):
        yield from _pack(_sentences(re.split(r"\n+", book), 2500), 900, 2500, " ")


def python(data: Path) -> Iterator[str]:
    """The running interpreter's standard library, cut before top-level definitions; `data` is not used."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if any(part in _SKIPPED_STDLIB or part.startswith("config-") for part in parts):
            continue
        blocks = re.split(r"\n(?=(?:def|class|@|async def) ?)", file.read_text("utf-8", "replace"))
        yield from _pack([b.rstrip("\n") + "\n" for b in blocks if b.strip()], 700, 3000, "\n")


def docs(data: Path) -> Iterator[str]:
    pages = _need(data, "usr/share/doc/python3.11/html/_sources", "python3.11-doc")
    for file in sorted(pages.rglob("*.rst.txt")):
        first = file.relative_to(pages).parts[0]
        if first in ("c-api", "license.rst.txt") or file.name.startswith("changelog"):
            continue
        blocks = re.split(r"\n\s*\n", tidy(file.read_text("utf-8", "replace")))
        yield from _pack([b for b in blocks if b.strip()], 700, 2500)


def c_headers(data: Path) -> Iterator[str]:
    for pattern, package in (
        ("usr/include/sqlite3*.h", "libsqlite3-dev"),
        ("usr/include/**/openssl/*.h", "libssl-dev"),
        ("usr/include/**/curl/*.h", "libcurl4-openssl-dev"),
        ("usr/include/zlib.h", "zlib1g-dev"),
        ("usr/include/**/zconf.h", "zlib1g-dev"),
        ("usr/include/python3.11/**/*.h", "libpython3.11-dev"),
    ):
        files = [f for f in sorted(data.glob(pattern)) if not f.is_symlink()]
        if not files:
            raise _missing(data / pattern, package)
        for file in files:
            text = file.read_text("latin-1")
            if package in ("libssl-dev", "libcurl4-openssl-dev"):  # the same licence comment in every file
                text = re.sub(r"\A\s*/\*.*?\*/", "", text, flags=re.S)
            blocks = re.split(r"\n\s*\n", tidy(text))
            yield from _pack([b.strip("\n") for b in blocks if b.strip()], 700, 2500)


DOMAINS: dict[str, Callable[[Path], Iterator[str]]] = {
    "prose": prose,
    "python": python,
    "docs": docs,
    "c": c_headers,
    "scripture": scripture,
    "spanish": spanish,
}


# ---- finding and cutting


def _need(data: Path, relative: str, package: str) -> Path:
    if not (data / relative).exists():
        raise _missing(data / relative, package)
    return data / relative


def _missing(path: Path, package: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path} is missing: `apt-get install {package}`, or unpack it with `apt-get download {package} && "
        f"dpkg-deb -x {package}_*.deb DIR` and give --data DIR"
    )


def _snappy_classics(data: Path) -> Iterator[tuple[str, str]]:
    """Alice in Wonderland, As You Like It and Paradise Lost from the tests of snappy's source package."""
    archive = next(iter(sorted(data.glob("snappy_*.orig.tar.gz"))), None)
    if archive is None:
        raise FileNotFoundError(
            f"{data}/snappy_*.orig.tar.gz is missing: `apt-get source --download-only snappy` in that folder"
        )
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name).name
            content = tar.extractfile(member)
            if content and name in ("alice29.txt", "asyoulik.txt", "plrabn12.txt"):
                yield name, content.read().decode("latin-1").replace("\r", "")


def tidy(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\t", "    ").replace("\f", "\n")
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r" +\n", "\n", text))


def _strip_lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.split("\n")).strip()


def _paragraphs(lines: Iterable[str]) -> list[str]:
    """Hard-wrapped lines joined; an empty line ends a paragraph."""
    return [" ".join(p.split("\n")) for p in re.split(r"\n{2,}", _strip_lines("\n".join(lines))) if p]


def _sentences(paragraphs: Iterable[str], longest: int) -> list[str]:
    """Paragraphs, those above `longest` characters cut at the ends of sentences."""
    cut: list[str] = []
    for p in paragraphs:
        cut += re.split(r"(?<=[.:;!?]) (?=[A-ZÁÉÍÓÚÑ¿¡])", p) if len(p) > longest else [p]
    return cut


def _pack(pieces: Iterable[str], shortest: int, longest: int, joint: str = "\n\n") -> Iterator[str]:
    """Consecutive pieces joined into documents of `shortest` to about `longest` characters."""
    document = ""
    for piece in pieces:
        if document and len(document) + len(piece) > longest:
            yield document
            document = ""
        document = document + joint + piece if document else piece
        if len(document) >= shortest:
            yield document
            document = ""
    if document:
        yield document

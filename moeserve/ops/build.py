"""Compiles the C kernels on the machine where they run, once, and keeps the library in the user's cache.

The name of a kept library is a hash of sources, compiler, flags and the processor's features, so an upgrade
of any of them, or a home directory shared with another kind of machine, makes a new one. Knows nothing of the
ops inside.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

SOURCE_DIR = Path(__file__).parent
# -ffp-contract=off: equal expressions must give equal bits wherever they are inlined; the kernels ask for
# fused multiply-adds where they want them.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 120.0


class BuildError(Exception):
    """There is no library; the message says why in one line."""


def cache_directories() -> tuple[Path, ...]:
    """Where a library may be kept, best first: the user's cache, else a private temporary directory."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "moeserve", Path(tempfile.gettempdir()) / f"moeserve-{os.getuid()}"


def build(source: str = "kernels.c", directories: Sequence[Path] | None = None) -> Path:
    """The shared library of `source`, compiled now if no directory of `directories` holds it yet.

    Raises BuildError when there is no compiler, the compiler fails, or nothing can be written.
    """
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(f"no C compiler ({', '.join(COMPILERS)}) in PATH")
    name = f"kernels-{_fingerprint(compiler, source)}.so"
    refusals = []
    for directory in cache_directories() if directories is None else directories:
        try:
            _make_private(directory)
            library = directory / name
            if not library.exists():
                with _lock(directory / f"{name}.lock"):
                    if not library.exists():  # another process may have made it while this one waited
                        _compile(compiler, SOURCE_DIR / source, library)
            return library
        except OSError as error:
            refusals.append(f"{directory}: {error.strerror or error}")
    raise BuildError("nowhere to keep the library: " + "; ".join(refusals))


def _fingerprint(compiler: str, source: str) -> str:
    digest = hashlib.sha256()
    for path in (SOURCE_DIR / source, *sorted(SOURCE_DIR.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, timeout=_COMPILE_SECONDS, check=False
    )
    digest.update(compiler.encode() + version.stdout + " ".join(FLAGS).encode())
    digest.update(f"{platform.system()} {platform.machine()} {_processor_features()}".encode())
    return digest.hexdigest()[:16]


def _processor_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _make_private(directory: Path) -> None:
    """A directory that nobody else can put a library into; OSError if there is none to be had."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(1, "others can write there")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(13, "not writable")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time: rank processes that start together compile once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        made = Path(directory) / library.name
        command = [compiler, *FLAGS, str(source), "-o", str(made), "-lm"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler} did not finish in {_COMPILE_SECONDS:.0f} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise BuildError(f"{compiler}: " + next((line for line in lines if "error" in line), lines[-1]))
        made.replace(library)

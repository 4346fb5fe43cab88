"""The built distribution: one top-level name, real files for the linked folders, and it works on its own."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy
import pytest

REPOSITORY = Path(__file__).parents[2]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from that sdist; no network."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("needs the package `build` (extra dev)")
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools >= 77 (extra dev)")
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"  # setuptools writes build/ and *.egg-info beside pyproject.toml
    shutil.copytree(REPOSITORY, source, symlinks=True, ignore=NOT_SOURCE)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source])
    return folder


def run(command: list[str | Path], cwd: Path = REPOSITORY) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (file,) = built.glob("*.whl")
    return file


def test_wheel_claims_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moeserve"}


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    """Nothing else would notice a folder without `__init__.py`, or a kind of file missing in package data."""
    packed = set(zipfile.ZipFile(wheel).namelist())
    on_disk = {
        str(Path(folder, name).relative_to(REPOSITORY))
        for folder, _, names in os.walk(REPOSITORY / "moeserve", followlinks=True)
        for name in names
        if "__pycache__" not in folder and not name.endswith(".so")
    }
    assert on_disk - packed == set()
    assert "moeserve/eplb/__init__.py" in packed and "moeserve/tiny_model/model.safetensors" in packed


def test_sdist_holds_real_files(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as tar:
        members = tar.getmembers()
    assert not [m.name for m in members if m.issym() or m.islnk()]
    names = {m.name.partition("/")[2] for m in members}
    assert {"LICENSE", "README.md", "pyproject.toml", "moeserve/comm/layout.py"} <= names


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an empty environment with the wheel alone; a path file lends it numpy and scipy."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel])
    (site_packages,) = folder.glob("lib/python*/site-packages")
    borrowed = Path(numpy.__file__).parents[1]
    (site_packages / "borrowed.pth").write_text(f"{borrowed}\n")
    return folder / "bin"


def test_installed_command_runs_from_anywhere(installed: Path) -> None:
    assert "usage: eplb-offline" in run([installed / "eplb-offline", "--help"], cwd=Path("/"))


def test_installed_package_is_the_wheels(installed: Path) -> None:
    program = "import moeserve.eplb, moeserve.comm; print(moeserve.eplb.__file__)"
    assert str(installed.parent) in run([installed / "python", "-c", program], cwd=Path("/"))


def test_offline_command_imports_no_torch(installed: Path) -> None:
    """Told by the interpreter's own list of imports, of the command as installed."""
    imports = run(
        [installed / "python", "-X", "importtime", installed / "eplb-offline", "--help"], cwd=Path("/")
    )
    modules = {line.rpartition("|")[2].strip() for line in imports.splitlines() if "import time:" in line}
    assert "moeserve.eplb.cli" in modules
    assert not modules & {"torch", "fastapi", "transformers", "zmq"}

"""Who may import whom, read from the source: three leaves and a trunk, engine and server apart."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "moeserve"
LEAVES = ("comm", "eplb", "stats")
MODEL_PARTS = ("layers", "models", "moe", "ops")


def imported_modules(file: Path, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of all that `file` imports, those inside functions and `if TYPE_CHECKING` included."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                anchor = package[: len(package) - node.level + 1]
                base = ".".join([*anchor, base]).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def edges() -> list[tuple[str, str]]:
    """(importing module, imported name) over the whole package, linked folders included."""
    found: list[tuple[str, str]] = []
    for part in [PACKAGE, *(d for d in PACKAGE.iterdir() if d.is_dir())]:
        files = part.glob("*.py") if part == PACKAGE else part.resolve().rglob("*.py")
        root = part if part == PACKAGE else part.resolve()
        prefix = [] if part == PACKAGE else [part.name]
        for file in files:
            parts = ["moeserve", *prefix, *file.relative_to(root).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            found += [(module, name) for name in imported_modules(file, module, is_package)]
    return found


EDGES = edges()


def inside(name: str, part: str) -> bool:
    return name == f"moeserve.{part}" or name.startswith(f"moeserve.{part}.")


def forbidden(importer: str, imported: str) -> bool:
    """The rule. `importer` is a module of ours, `imported` any name."""
    top = imported.split(".")[0]
    if top in (*LEAVES, "tools"):
        return True  # the bare folder is a second module of the same file
    if top != "moeserve":
        return False
    leaf = next((leaf for leaf in LEAVES if inside(importer, leaf)), None)
    if leaf:
        return not (inside(imported, leaf) or imported == "moeserve.__version__" or imported == "moeserve")
    if inside(importer, "server"):
        return inside(imported, "engine")
    if inside(importer, "engine"):
        return inside(imported, "server")
    if any(inside(importer, part) for part in MODEL_PARTS):
        return inside(imported, "server") or inside(imported, "engine")
    return False


def test_the_rule_tells_right_from_wrong() -> None:
    assert forbidden("moeserve.eplb.service", "moeserve.comm.group")
    assert forbidden("moeserve.comm.group", "moeserve.config")
    assert forbidden("moeserve.server.app", "moeserve.engine.rank")
    assert forbidden("moeserve.models.decoder", "moeserve.engine.scheduler")
    assert forbidden("moeserve.launch", "eplb.types")
    assert not forbidden("moeserve.eplb.service", "moeserve.eplb.types")
    assert forbidden("moeserve.models.decoder", "moeserve.engine.batch.make_batch")
    assert not forbidden("moeserve.server.app", "moeserve.messages")
    assert not forbidden("moeserve.launch", "moeserve.comm.mesh")


def test_every_part_was_read() -> None:
    importers = {importer for importer, _ in EDGES}
    for part in (*LEAVES, *MODEL_PARTS, "server", "engine"):
        assert any(inside(importer, part) for importer in importers), part


def test_imports_obey_the_layers() -> None:
    wrong = sorted({f"{importer} imports {name}" for importer, name in EDGES if forbidden(importer, name)})
    assert not wrong, "\n".join(wrong)


IMPORT_ALL_OF_EPLB = """
import importlib, pkgutil, moeserve.eplb
for module in pkgutil.walk_packages(moeserve.eplb.__path__, "moeserve.eplb."):
    importlib.import_module(module.name)
"""


@pytest.mark.parametrize(
    "program", ["import moeserve", "import moeserve.messages", "import moeserve.eplb", IMPORT_ALL_OF_EPLB]
)
def test_imports_nothing_heavy(program: str) -> None:
    check = "import sys; print(sorted({'torch', 'transformers', 'fastapi', 'zmq'} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", f"{program}\n{check}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=PACKAGE.parent,
    )
    assert run.stdout == "[]\n", run.stderr

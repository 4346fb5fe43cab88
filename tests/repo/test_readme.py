"""What README and CONTRIBUTING name is there: files, make targets, settings."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from moeserve.config import EngineConfig

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text("utf-8")
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")


@pytest.mark.parametrize("document", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_named_files_exist(document: str) -> None:
    paths = set(re.findall(r"`((?:[\w.]+/)+[\w.]*|\w+\.(?:py|md))`", document))
    assert len(paths) >= 5
    missing = {p for p in paths if not any((REPOSITORY / base / p).exists() for base in ("", "moeserve"))}
    assert not missing


def test_tree_is_the_tree() -> None:
    tree = README.partition("## Tree")[2].partition("```\n")[2].partition("```")[0]
    folder = ""
    for line in tree.splitlines():
        names = line.strip().partition("   ")[0].split()
        inside = folder if line.startswith(" ") else ""
        for name in (n for n in names if n.endswith(("/", ".py"))):
            assert (REPOSITORY / inside / name).exists(), f"{inside}{name}"
        if not line.startswith(" "):
            folder = names[0]


def test_named_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", README + CONTRIBUTING, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_named_settings_exist() -> None:
    table = README.partition("## Layouts")[2].partition("The two MoE sizes")[0]
    named = set(re.findall(r"`(\w+): ", table))
    assert len(named) >= 5
    assert named <= {f.name for f in fields(EngineConfig)}

"""The shell of slurm_scripts/."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "slurm_scripts").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_clean_under_shellcheck(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("not installed: shellcheck")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout

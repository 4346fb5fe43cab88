"""The trainer of the embedded model, end to end on the standard library's text, against transformers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "tools" / "train_tiny_moe.py"


def run_trainer(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def transformers_logits(model_dir: Path, ids: Tensor) -> Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def training_logits(model_dir: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from tiny_moe.export import load_checkpoint

    with torch.no_grad():
        logits: Tensor = load_checkpoint(model_dir)(ids)
    return logits


@pytest.mark.slow
def test_trains_resumes_and_exports_what_transformers_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_trainer("--smoke", "--out", tmp_path, "--tokens", "8192")
    assert first.returncode == 0, first.stderr
    again = run_trainer("--smoke", "--out", tmp_path)
    assert again.returncode == 2 and "--resume" in again.stderr
    resumed = run_trainer("--smoke", "--out", tmp_path, "--tokens", "16384", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "16,384 tokens" in resumed.stdout

    row = next(line for line in resumed.stdout.splitlines() if line.startswith("| python"))
    vocab_size = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["vocab_size"]
    assert float(row.split("|")[3]) < math.log(vocab_size) - 0.2, "it learned nothing"

    ids = torch.randint(0, vocab_size, (2, 96), generator=torch.Generator().manual_seed(0))
    ours = training_logits(tmp_path / "checkpoint", ids, monkeypatch)
    theirs = transformers_logits(tmp_path / "checkpoint", ids)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_shipped_checkpoint_has_equal_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = REPOSITORY / "moeserve" / "tiny_model"
    ids = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(1))
    ours = training_logits(model_dir, ids, monkeypatch)
    theirs = transformers_logits(model_dir, ids)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_missing_text_names_the_package(tmp_path: Path) -> None:
    run = run_trainer("--out", tmp_path / "run", "--data", tmp_path)
    assert run.returncode == 2
    assert "apt-get install r-cran-janeaustenr" in run.stderr and "--data" in run.stderr

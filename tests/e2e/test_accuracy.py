"""The accuracy gate: lm-eval over HTTP scores a local task as transformers does in process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeserve.config import EMBEDDED_MODEL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multi_rank,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
]

# Beginnings in the model's six domains; the right continuation is the first, the others belong elsewhere.
QUESTIONS = [
    ("It is a truth universally", [" acknowledged", " self.assertEqual", " de Dios"]),
    ("In the beginning God created the", [" heavens", " function", " casa"]),
    ("def __init__(self", [", name):", " and the king", " con los"]),
    ("Y dijo Dios", [": Sea", " return None", " the house"]),
    ("#include <openssl/", ["err.h>", "very happy", "los hijos"]),
    ("The following example shows how to use the", [" function", " Jerusalem", " señora"]),
    ("And he said unto him,", [" Go", " import os", " typedef"]),
    ("import", [" os", " thou", " hijos"]),
    ("She was a woman of mean understanding, little", [" information", " struct", " pueblo"]),
    ("Returns a new", [" string", " sermon", " cielo"]),
    ("Porque Jehová", [" es", " print", " shall"]),
    ("#define SQLITE_", ["OK", " however", " tierra"]),
]


def test_lm_eval_scores_as_transformers_does(start_server: Callable[..., Any], tmp_path: Path) -> None:
    server = start_server("--tp-size", "2", "--ep-size", "2")
    scores = scored_by_lm_eval(server.url, tmp_path)
    expected = scored_by_transformers()
    for question, ours, theirs in zip(QUESTIONS, scores, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3), question
    right = sum(row.index(max(row)) == 0 for row in expected)
    assert right >= len(QUESTIONS) * 2 // 3, "the embedded model knows its domains"


def scored_by_lm_eval(url: str, directory: Path) -> list[list[float]]:
    """Log-likelihood of each continuation, from lm-eval's own record of its samples."""
    rows = [{"context": context, "choices": choices} for context, choices in QUESTIONS]
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "domains.yaml").write_text(
        "task: domains\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {directory}/questions.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: 0\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    arguments = (
        f"model=tiny_model,base_url={url}/v1/completions,tokenizer={EMBEDDED_MODEL},"
        "num_concurrent=2,tokenizer_backend=huggingface"
    )
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments),
        *("--include_path", str(directory), "--tasks", "domains", "--output_path", str(directory / "out")),
        "--log_samples",
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = (directory / "out").rglob("samples_domains_*.jsonl")
    samples = sorted(map(json.loads, record.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]


def scored_by_transformers() -> list[list[float]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    rows = []
    for context, choices in QUESTIONS:
        row = []
        for choice in choices:
            start = len(tokenizer(context).input_ids)
            ids = torch.tensor([tokenizer(context + choice).input_ids])
            with torch.inference_mode():
                logprobs = model(ids).logits[0].log_softmax(-1)
            row.append(float(sum(logprobs[i - 1, ids[0, i]] for i in range(start, ids.shape[1]))))
        rows.append(row)
    return rows

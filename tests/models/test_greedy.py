"""Greedy text of the embedded model is transformers' own: in float32 always, in bfloat16 up to its rounding.

Where bfloat16 text differs, the two candidates must be nearer to each other than transformers' own bfloat16 logits
are to its float32 ones: there the choice is the rounding's, and either is right.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import moeserve
from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.eplb.types import Placement, Topology
from moeserve.forward_batch import ForwardBatch
from moeserve.models.checkpoint import load
from moeserve.models.decoder import Decoder
from moeserve.models.registry import read_spec
from moeserve.moe.expert_map import ExpertMap

MODEL = Path(moeserve.__file__).parent / "tiny_model"
PROMPTS = (
    "It is a truth universally acknowledged, that",
    "def read_file(path):\n    ",
    "In the beginning God",
    "Y dijo Dios:",
    "#include <stdio.h>\n",
    "The module provides",
)
NEW_TOKENS = 16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_text(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    exact = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ours = make(dtype)
    same = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        with torch.no_grad():
            text = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)[0]
        logits = all_logits(ours, text)[len(ids) - 1 : -1]
        logits[:, theirs.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
        wanted = text[len(ids) :]
        different = (logits.argmax(1) != wanted).nonzero().flatten()
        same += len(different) == 0
        if len(different):  # up to here both wrote the same text
            first = int(different[0])
            row = logits[first]
            gap = float(row.max() - row[wanted[first]])
            with torch.no_grad():
                before = text[None, : len(ids) + first]
                rounding = (theirs(before).logits[0, -1] - exact(before).logits[0, -1]).abs().max()
            assert dtype is torch.bfloat16 and gap <= 2 * float(rounding), (
                f"{prompt!r}: {gap} > 2 * {rounding}"
            )
    assert same >= len(PROMPTS) // 2


def make(dtype: torch.dtype) -> Decoder:
    spec = read_spec(MODEL)
    assert spec.moe is not None
    num_experts = spec.moe.num_experts
    placement = Placement.identity(len(spec.moe_layers), num_experts, num_experts)
    expert_map = ExpertMap(placement, Topology.of(1, num_experts), 0, "cpu")
    model = Decoder(spec, Mesh(ParallelLayout(), 0), dtype=dtype, expert_map=expert_map)
    load(model, MODEL)
    return model


def all_logits(model: Decoder, tokens: Tensor) -> Tensor:
    """float32 [T, vocab] of one sequence in one prefill."""
    count = len(tokens)
    places = torch.arange(count)
    batch = ForwardBatch(
        token_ids=tokens,
        positions=places,
        kv_slots=places,
        query_start=torch.tensor([0, count], dtype=torch.int32),
        context_len=torch.tensor([count], dtype=torch.int32),
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        num_decode=0,
        max_query_len=count,
        max_context_len=count,
        logit_rows=places,
        rows_per_rank=(count,),
    )
    return model.forward(batch, model.new_kv_cache(1, count)).logits

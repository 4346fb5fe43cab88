"""The same engine on a CUDA device."""

import pytest
import torch

from moeserve.llm import LLM
from moeserve.messages import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = ["It is a truth", "def main(self", "In the beginning God"]
GREEDY = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)


def test_a_gpu_writes_what_a_cpu_writes() -> None:
    with LLM(device="cpu", dtype="float32") as llm:
        expected = [answer.text for answer in llm.generate(PROMPTS, GREEDY)]
    with LLM(device="cuda", dtype="float32") as llm:
        assert [answer.text for answer in llm.generate(PROMPTS, GREEDY)] == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("all_to_all", ["exchange", "gather"])
def test_two_gpus_write_the_same(all_to_all: str) -> None:
    with LLM(device="cpu", dtype="float32") as llm:
        expected = [answer.text for answer in llm.generate(PROMPTS, GREEDY)]
    two = {"tensor_parallel_size": 2, "enable_attention_dp": True, "device": "cuda", "dtype": "float32"}
    with LLM(**two, moe_config={"all_to_all": all_to_all}) as llm:
        assert [answer.text for answer in llm.generate(PROMPTS, GREEDY)] == expected

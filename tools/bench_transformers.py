"""One measurement of transformers' generate for tools/bench_serving.py; prints JSON by batch size.

python tools/bench_transformers.py MODEL DTYPE THREADS INPUT_LEN OUTPUT_LEN BATCH...
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    path, dtype, *numbers = sys.argv[1:]
    threads, input_len, output_len, *batches = map(int, numbers)
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    figures = {}
    for batch in batches:
        prompts = torch.randint(10, 4096, (batch, input_len), generator=torch.Generator().manual_seed(0))
        generate(model, prompts, 4)  # warm-up
        start = time.perf_counter()
        tokens = generate(model, prompts, output_len)
        figures[batch] = {"tokens_per_second": tokens / (time.perf_counter() - start)}
    print(json.dumps(figures))


def generate(model: torch.nn.Module, prompts: torch.Tensor, count: int) -> int:
    """Greedy, exactly `count` tokens each; tokens made."""
    out = model.generate(  # type: ignore[operator]
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )
    return int(out.shape[0] * (out.shape[1] - prompts.shape[1]))


if __name__ == "__main__":
    main()

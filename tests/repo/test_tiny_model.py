"""The shipped model: small, licensed, and with expert load that is skewed and moves with the domain."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

MODEL_DIR = Path(__file__).parents[2] / "moeserve" / "tiny_model"

# Written for this test: a passage of each domain's kind.
SPANISH = """Y habló el rey a los ancianos de la ciudad, y les dijo: Oíd mi palabra, y guardad en vuestro
corazón lo que os digo hoy. Porque he aquí que vendrán días en que la tierra dará su fruto, y
los hijos de vuestros hijos habitarán en ella seguros. Entonces respondieron todos los
ancianos, y dijeron: Haremos todo lo que has mandado, y no nos apartaremos de tus mandamientos
ni a diestra ni a siniestra. Y el pueblo se levantó muy de mañana, y subió al monte, y ofreció
sacrificio. Y fué grande la alegría en aquel día, y cantaban delante del templo con arpas."""
PYTHON = '''class Counter(dict):
    """Count hashable items."""

    def __init__(self, iterable=None, **kwds):
        super().__init__()
        self.update(iterable, **kwds)

    def most_common(self, n=None):
        if n is None:
            return sorted(self.items(), key=itemgetter(1), reverse=True)
        return heapq.nlargest(n, self.items(), key=itemgetter(1))

    def update(self, iterable=None, **kwds):
        for elem in iterable:
            self[elem] = self.get(elem, 0) + 1
        if kwds:
            raise TypeError("update() got an unexpected keyword argument %r" % (kwds,))
'''


@pytest.fixture(scope="module")
def expert_load() -> dict[str, Tensor]:
    """By domain: share of the routed tokens each expert took, times E, [L, E]."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    chosen: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__ == "DeepseekV3MoE":
            module.experts.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1]))
    loads: dict[str, Tensor] = {}
    for domain, text in {"spanish": SPANISH, "python": PYTHON}.items():
        chosen.clear()
        with torch.no_grad():
            model(tokenizer(text, return_tensors="pt").input_ids)
        counts = torch.stack([torch.bincount(experts.flatten(), minlength=32) for experts in chosen])
        loads[domain] = counts / counts.float().mean(1, keepdim=True)
    return loads


def test_each_domain_is_skewed(expert_load: dict[str, Tensor]) -> None:
    for domain, load in expert_load.items():
        assert load.shape == (4, 32)
        assert load.amax(1).mean() > 2, f"{domain}: hottest expert over mean"


def test_load_moves_with_the_domain(expert_load: dict[str, Tensor]) -> None:
    spanish, python = expert_load["spanish"], expert_load["python"]
    correlation = torch.corrcoef(torch.stack([spanish.flatten(), python.flatten()]))[0, 1]
    assert correlation < 0.3
    assert (spanish.argmax(1) != python.argmax(1)).all(), "the hottest expert stayed"


def test_shipped_files_are_small_and_licensed() -> None:
    assert sum(f.stat().st_size for f in MODEL_DIR.iterdir()) <= 10e6
    assert "public domain" in (MODEL_DIR / "NOTICE").read_text()

"""The loader: formats it reads, parts it reads, and the errors it gives for what it cannot read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeserve.comm.layout import ParallelLayout
from moeserve.comm.mesh import Mesh
from moeserve.eplb.types import Placement, Topology
from moeserve.models.checkpoint import load
from moeserve.models.decoder import Decoder
from moeserve.models.registry import read_spec
from moeserve.moe.expert_map import ExpertMap
from moeserve.moe.layer import MoeLayer

Tiny = Callable[[str], Any]  # family -> conftest.Oracle
Edit = Callable[[dict[str, Tensor]], None]


def make(path: Path, num_slots: int = 8) -> Decoder:
    spec = read_spec(path)
    experts: dict[str, Any] = {}
    if spec.moe is not None:
        placement = Placement.identity(len(spec.moe_layers), spec.moe.num_experts, num_slots)
        experts["expert_map"] = ExpertMap(placement, Topology.of(1, num_slots), 0, "cpu")
    return Decoder(spec, Mesh(ParallelLayout(), 0), dtype=torch.float32, **experts)


def loaded(path: Path, num_slots: int = 8) -> dict[str, Tensor]:
    """Every weight that the model of `path` has once loaded, by checkpoint name and cut."""
    model = make(path, num_slots)
    load(model, path)
    weights = {}
    for piece in model.pieces(frozenset()):
        for number, target in enumerate(piece.targets):
            weights[f"{piece.name}{piece.cut}{number}"] = target
    return weights


def edited(source: Path, target: Path, edit: Edit) -> Path:
    """A copy of the checkpoint with its tensors changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def same(path: Path, other: Path, tolerance: float = 0.0) -> None:
    wanted, got = loaded(path), loaded(other)
    assert wanted.keys() == got.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(
            got[name], weight, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def stack_experts(tensors: dict[str, Tensor]) -> None:
    for layer in {name.split(".")[2] for name in tensors if ".experts." in name}:
        block = f"model.layers.{layer}.mlp.experts"
        parts = [
            [tensors.pop(f"{block}.{e}.{kind}_proj.weight") for kind in ("gate", "up", "down")]
            for e in range(8)
        ]
        tensors[f"{block}.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in parts])
        tensors[f"{block}.down_proj"] = torch.stack([down for _, _, down in parts])


def test_stacked_experts(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("qwen3_moe").path
    same(source, edited(source, tmp_path / "stacked", stack_experts))


def test_shards(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("deepseek_v3").path
    shutil.copytree(source, tmp_path / "shards")
    write_shards(tmp_path / "shards")
    same(source, tmp_path / "shards")


def write_shards(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[shard::3]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_every_slot_of_an_expert_gets_its_weights(tiny: Tiny) -> None:
    path = tiny("mixtral").path
    model = make(path, num_slots=11)
    load(model, path)
    for layer in model.layers:
        assert isinstance(layer.feed_forward, MoeLayer)
        experts = layer.feed_forward.experts
        for slot in range(11):
            assert torch.equal(experts.gate_up[slot], experts.gate_up[slot % 4])
            assert torch.equal(experts.down[slot], experts.down[slot % 4])
    stored = load_file(path / "model.safetensors")["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    block = model.layers[1].feed_forward
    assert isinstance(block, MoeLayer)
    assert torch.equal(block.experts.gate_up[7, stored.shape[0] :], stored)


def test_block_float8_is_widened(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("deepseek_v3").path
    quantized = edited(source, tmp_path / "float8", quantize)
    plain = edited(quantized, tmp_path / "plain", widen)
    set_config(quantized, quantization_config={"quant_method": "fp8", "weight_block_size": [5, 7]})
    same(plain, quantized, 1e-6)


def quantize(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name]
        rows, columns = -(-weight.shape[0] // 5), -(-weight.shape[1] // 7)
        scales = torch.rand(rows, columns) + 0.5
        tensors[name] = (weight / spread(scales, weight)).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scales


def widen(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        weight = tensors[name.removesuffix("_scale_inv")].float()
        tensors[name.removesuffix("_scale_inv")] = weight * spread(tensors.pop(name), weight)


def spread(scales: Tensor, weight: Tensor) -> Tensor:
    return scales.repeat_interleave(5, 0)[: weight.shape[0]].repeat_interleave(7, 1)[:, : weight.shape[1]]


def set_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def test_known_leftovers_are_left(tiny: Tiny, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(2, 2)  # a prediction layer beyond the model
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)

    source = tiny("deepseek_v3").path
    same(source, edited(source, tmp_path / "more", add))


def test_progress_ends_at_all_bytes(tiny: Tiny) -> None:
    path = tiny("llama").path
    calls: list[tuple[int, int]] = []
    load(make(path), path, lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    assert done == sorted(done) and calls[-1][0] == calls[-1][1] == sum(
        t.nbytes for t in loaded(path).values()
    )


def drop(name: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return edit


def put(name: str, *shape: int) -> Edit:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


WRONG: dict[str, tuple[Edit, str]] = {
    "missing": (drop("model.norm.weight"), "tensor model.norm.weight is missing"),
    "missing expert": (
        drop("model.layers.2.mlp.experts.5.up_proj.weight"),
        "tensor model.layers.2.mlp.experts.5.up_proj.weight is missing",
    ),
    "extra": (
        put("model.layers.1.mlp.experts.8.up_proj.weight", 2),
        "experts.8.up_proj.weight is unknown to Deep",
    ),
    "shape": (
        put("model.layers.0.self_attn.o_proj.weight", 32, 31),
        r"o_proj.weight has shape \[32, 31\], expected \[32, 32\]",
    ),
    "float8 unannounced": (
        lambda tensors: tensors.update(
            {"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}
        ),
        "model.norm.weight is float8 without model.norm.weight_scale_inv",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensors_are_named(name: str, tiny: Tiny, tmp_path: Path) -> None:
    edit, message = WRONG[name]
    path = edited(tiny("deepseek_v3").path, tmp_path / "wrong", edit)
    with pytest.raises(ValueError, match=message):
        load(make(path), path)


def cut_off(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_shard(path: Path) -> None:
    write_shards(path)
    (path / "model-00002-of-00003.safetensors").unlink()


def corrupt_shard(path: Path) -> None:
    write_shards(path)
    (path / "model-00003-of-00003.safetensors").write_bytes(b"\0" * 50)


def index_of_nothing(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text("[]")


def index_of_too_much(path: Path) -> None:
    write_shards(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    moved = dict.fromkeys(index["weight_map"], "model-00001-of-00003.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (
        lambda path: (path / "model.safetensors").unlink(),
        "no model.safetensors and no model.safetensors.index",
    ),
    "cut off": (cut_off, r"model.safetensors: not a whole safetensors file"),
    "garbage": (
        lambda path: (path / "model.safetensors").write_bytes(b"x" * 99) and None,
        "not a whole safetensors",
    ),
    "empty": (lambda path: (path / "model.safetensors").write_bytes(b"") and None, "not a whole safetensors"),
    "shard gone": (
        remove_shard,
        "model-00002-of-00003.safetensors: missing, but model.safetensors.index.json",
    ),
    "shard corrupt": (corrupt_shard, "model-00003-of-00003.safetensors: not a whole safetensors"),
    "index": (index_of_nothing, "model.safetensors.index.json: not a safetensors index"),
    "index wrong": (index_of_too_much, "model-00001-of-00003.safetensors: .* cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name: str, tiny: Tiny, tmp_path: Path) -> None:
    damage, message = BROKEN[name]
    path = tmp_path / "broken"
    shutil.copytree(tiny("llama").path, path)
    damage(path)
    with pytest.raises(ValueError, match=message):
        load(make(path), path)

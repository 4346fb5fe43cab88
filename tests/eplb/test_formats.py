"""Files of every engine, built to their published descriptions: read, written, read back; hostile ones refused in a
line."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeserve.eplb import Placement, Topology, solve
from moeserve.eplb.formats.detect import read_load
from moeserve.eplb.formats.placement import PlacementFile, write_placement
from moeserve.eplb.formats.placements import FORMATS, Known, format_as, read_any_placement
from moeserve.eplb.formats.stats import format_stats, write_stats
from moeserve.eplb.load import ExpertLoad, Window

LOAD = np.random.default_rng(0).integers(0, 100, (3, 2, 8))


def _load(**change: Any) -> ExpertLoad:
    windows = (
        Window("prefill", 0, 5, 100, "2026-01-01T00:00:00Z"),
        Window("decode", 5, 5, 64),
        Window("mixed", 10, 5, 80),
    )
    about: dict[str, Any] = {
        "layers": (3, 4), "windows": windows, "model": "m", "top_k": 2, "expert_groups": 4, "ep_size": 4,
        "ranks_per_node": 2, "placement": Placement.identity(2, 8, 12),
    }  # fmt: skip
    return ExpertLoad(LOAD, **(about | change))


def _same(a: ExpertLoad, b: ExpertLoad) -> bool:
    fields = (
        "layers",
        "windows",
        "model",
        "top_k",
        "expert_groups",
        "ep_size",
        "ranks_per_node",
        "placement",
    )
    return bool((a.load == b.load).all()) and all(getattr(a, f) == getattr(b, f) for f in fields)


@pytest.mark.parametrize("name", ["s.json", "s.json.gz", "s.npz"])
@pytest.mark.parametrize(
    "change", [{}, {"placement": None, "ep_size": 0, "ranks_per_node": 0, "top_k": 0}], ids=["all", "little"]
)
def test_own_statistics_round_trip(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    write_stats(tmp_path / name, _load(**change))
    assert _same(read_load(tmp_path / name), _load(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, 'format is "other", expected "moeserve.expert_load"'),
        ({"version": 2}, "version is 2, this reader knows 1"),
        ({"num_experts": 0}, "num_experts is 0"),
        (
            {"num_experts": 9, "expert_groups": 1, "placement": None},
            r"windows\[0\].load\[0\] has 8 entries, expected num_experts = 9",
        ),
        ({"num_experts": 10**12, "placement": None}, r"has 8 entries, expected num_experts = 1000000000000"),
        ({"layers": [4, 3]}, "ascending"),
        (
            {"layers": [3], "placement": None},
            r"windows\[0\].load has 2 rows, expected one for each of the 1 layers",
        ),
        ({"expert_groups": 3}, "expert_groups = 3 does not divide num_experts = 8"),
        ({"windows": []}, "windows is empty"),
        ({"windows": None}, "windows is missing"),
        (
            {"windows": [{"load": [[1] * 8, [1] * 7]}]},
            r"windows\[0\].load\[1\] has 7 entries, expected num_experts = 8",
        ),
        ({"windows": [{"load": [[1] * 8, [-1] * 8]}]}, r"windows\[0\].load\[1\]\[0\] = -1 is negative"),
        (
            {"windows": [{"load": [[1] * 8, ["1"] * 8]}]},
            r"windows\[0\].load\[1\]\[0\] is \"1\", expected a count",
        ),
        ({"windows": [{"load": [[1] * 8, [[1]] * 8]}]}, "no number|expected a count"),
        ({"windows": [{"load": [[1] * 8, [1.5] * 8]}]}, r"windows\[0\].load\[1\]\[0\] is not a whole number"),
        ({"windows": [{"load": [[1] * 8, [10**30] * 8]}]}, r"windows\[0\].load\[1\]\[0\]|no number"),
        ({"windows": [{"load": [[1] * 8] * 2, "phase": "both"}]}, r'windows\[0\].phase is "both"'),
        ({"windows": [{"load": [[1] * 8] * 2, "steps": -1}]}, r"windows\[0\].steps is -1"),
        ({"windows": [7]}, r"windows\[0\] is 7, expected an object"),
        ({"placement": {"format": "moeserve.placement"}}, "placement: version is null"),
        ({"ep_size": 0}, "ep_size is 0"),
        ({"model": 5}, "model is 5"),
    ],
    ids=str,
)
def test_each_broken_field_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(json.loads(format_stats(_load())) | change))
    _refused(path, message)


def _refused(path: Path, message: str = "", **arguments: Any) -> None:
    with pytest.raises(ValueError, match=message or ".") as caught:
        read_load(path, **arguments)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < 500 + len(str(path))


def _npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


class _Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, ("__import__('pathlib').Path('/tmp/eplb-was-here').touch()",)


def _object_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([_Evil()], dtype=object), allow_pickle=True)
    return file.getvalue()


HOSTILE = {
    "empty": (b"", "empty"),
    "blank": (b" \n", "empty"),
    "truncated json": (b'{"format": "moeserve.expert_load", "windows": [', "broken JSON: .* line 1 column"),
    "nan": (
        b'{"version": 1, "windows": [{"load": [[1, 2]]}, {"load": [[1, 2], [-Infinity, NaN]]}]}',
        r"windows\[1\].load\[1\]\[0\] is -Infinity, expected a finite number",
    ),
    "vllm with nan": (
        b'{"record_type": "eplb_load_meta", "version": 1, "num_ranks": 2}\n'
        b'{"record_type": "eplb_load_stats", "x": [NaN]}',
        r"line 2: x\[0\] is NaN",
    ),
    "nan twice": (b'{"a": [NaN], "a": 1}', "a key that is given twice is NaN"),
    "binary": (bytes(range(256)) * 4, "."),
    "list": (b"[1, 2]", "expected an object"),
    "deep": (b"[" * 200_000, "nested too deep|broken JSON"),
    "other json": (b'{"a": 1}', "format is null"),
    "broken gzip": (gzip.compress(b"{}" * 100)[:20], "broken gzip"),
    "broken zip": (_zip({"load.npy": b"x" * 100})[:60], "broken zip"),
    "npz without a header": (_zip({"load.npy": b"\x93NUM"}), "load: broken .npy"),
    "npz claims much": (
        _zip({"load.npy": _npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000, 58, 256), }")}),
        "load: the array claims shape",
    ),
    "npz claims less than nothing": (
        _zip({"load.npy": _npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 2), }")}),
        "load: ",
    ),
    "npz header runs code": (_zip({"load.npy": _npy("__import__('os').getcwd()")}), "load: broken .npy"),
    "npz of objects": (_zip({"load.npy": _object_array()}), "load: the array holds pickled objects"),
    "npy of objects": (_object_array(), "pickled objects"),
    "npy of floats": (
        _npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", b"\0" * 8),
        "whole numbers",
    ),
    "bare pickle": (pickle.dumps({"logical_count": 1}, 2), "a bare pickle"),
    "torch with code": (_zip({"a/data.pkl": pickle.dumps(_Evil(), 2)}), "refused: the pickle calls .*eval"),
    "torch broken": (_zip({"a/data.pkl": b"\x80\x02X"}), "broken pickle|refused"),
    "torch of nothing": (_zip({"a/data.pkl": pickle.dumps({"x": 1}, 2)}), "no logical_count"),
    "vllm without statistics": (
        b'{"record_type": "eplb_load_meta", "version": 1, "num_ranks": 2}\n',
        "nothing was recorded",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_a_line(tmp_path: Path, name: str) -> None:
    data, message = HOSTILE[name]
    path = tmp_path / "x"
    path.write_bytes(data)
    _refused(path, message)
    assert not Path("/tmp/eplb-was-here").exists()


def test_gzip_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeserve.eplb.formats.files.MAX_BYTES", 1 << 20)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"\0" * (1 << 22)))
    _refused(path, "unpacks to more than")


@pytest.mark.parametrize("cut", [1, 10, 100, -3, -10, -100])
@pytest.mark.parametrize("name", ["s.json", "s.json.gz", "s.npz"])
def test_truncated_files(tmp_path: Path, name: str, cut: int) -> None:
    write_stats(tmp_path / name, _load())
    data = (tmp_path / name).read_bytes()[:cut]
    (tmp_path / name).write_bytes(data)
    _refused(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", "No such file")


# ------------------------------------------------------------------ TensorRT-LLM


def _safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    header, body = {}, b""
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "I64",
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + tensor.nbytes],
        }
        body += tensor.astype("<i8").tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _trtllm(folder: Path, counts: np.ndarray) -> None:
    """counts [ranks, iterations, layers, experts]; layers 3, 4, ...; iterations from 100."""
    folder.mkdir()
    (folder / "meta_info.json").write_text(
        json.dumps({"num_experts": counts.shape[3], "num_experts_per_token": 2})
    )
    for rank, by_iteration in enumerate(counts):
        tensors = {
            f"{100 + i}_{3 + j}": row for i, layers in enumerate(by_iteration) for j, row in enumerate(layers)
        }
        (folder / f"rank{rank}.safetensors").write_bytes(_safetensors(tensors))


def test_trtllm_folder(tmp_path: Path) -> None:
    counts = np.random.default_rng(1).integers(0, 50, (3, 4, 2, 8))
    _trtllm(tmp_path / "stats", counts)
    found = read_load(tmp_path / "stats")
    assert (found.load == counts.sum(axis=0)).all()
    assert (found.layers, found.ep_size, found.top_k) == ((3, 4), 3, 2)
    assert [w.start_step for w in found.windows] == [100, 101, 102, 103]


def test_trtllm_folder_broken(tmp_path: Path) -> None:
    counts = np.ones((2, 2, 2, 8), int)
    breaks: list[tuple[Callable[[Path], Any], str]] = [
        (lambda d: (d / "meta_info.json").unlink(), "no meta_info.json"),
        (lambda d: (d / "rank0.safetensors").unlink(), "rank files are missing"),
        (lambda d: (d / "rank1.safetensors").write_bytes(b"\xff" * 20), "the header claims"),
        (
            lambda d: (d / "rank1.safetensors").write_bytes(_safetensors({"100_3": np.ones(7, int)})),
            "expected num_experts = 8",
        ),
        (
            lambda d: (d / "rank1.safetensors").write_bytes(_safetensors({"x": np.ones(8, int)})),
            "not named ITERATION_LAYER",
        ),
        (
            lambda d: (d / "rank1.safetensors").write_bytes(_safetensors({"999_3": np.ones(8, int)})),
            "rank0.safetensors has not",
        ),
        (
            lambda d: (d / "rank1.safetensors").write_bytes(_safetensors({"100_3": -np.ones(8, int)})),
            "negative",
        ),
        (lambda d: (d / "meta_info.json").write_text("{}"), "num_experts is null"),
    ]
    for number, (spoil, message) in enumerate(breaks):
        folder = tmp_path / str(number)
        _trtllm(folder, counts)
        spoil(folder)
        _refused(folder, message)
    holes = np.ones((1, 3, 1, 8), int)
    _trtllm(tmp_path / "holes", holes)
    tensors = {"100_3": holes[0, 0, 0], "102_3": holes[0, 0, 0]}
    (tmp_path / "holes" / "rank0.safetensors").write_bytes(_safetensors(tensors))
    _refused(tmp_path / "holes", "gaps")


# ------------------------------------------------------------------ SGLang


def test_sglang_stat_dump(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    counts = torch.zeros((10, 5, 8), dtype=torch.int32)
    counts[2:4, 1:4] = torch.randint(0, 50, (2, 3, 8), dtype=torch.int32) + 1
    torch.save(
        {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, tmp_path / "d.pt"
    )
    found = read_load(tmp_path / "d.pt")
    assert found.layers == (1, 2, 3)
    assert (found.load == counts[2:4, 1:4].numpy()).all()
    # a transposed view has strides of its own
    torch.save({"logical_count": counts.permute(2, 1, 0).contiguous().permute(2, 1, 0)}, tmp_path / "t.pt")
    assert (read_load(tmp_path / "t.pt").load == found.load).all()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "d.pt").read_bytes()[:-400])
    _refused(tmp_path / "cut.pt")


def test_sglang_per_pass_dump(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    slots = torch.tensor([[0, 1, 2, 3, 0, 1]] * 2)
    records = [
        {
            "forward_pass_id": n,
            "rank": rank,
            "gatherer_key": "primary",
            "global_physical_count": torch.tensor([[1, 2, 3, 4, 5, 6]] * 2),
        }
        for n in (7, 8)
        for rank in (0, 1)
    ]
    torch.save({"records": records, "last_physical_to_logical_map": slots}, tmp_path / "p.pt")
    found = read_load(tmp_path / "p.pt")
    assert found.load.tolist() == [[[12, 16, 6, 8]] * 2] * 2
    assert [w.start_step for w in found.windows] == [7, 8]


def test_logical_count_json(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"logical_count": [[0, 0], [3, 4], [5, 6]]}))
    found = read_load(path)
    assert (found.layers, found.load.tolist()) == ((1, 2), [[[3, 4], [5, 6]]])
    for value, message in (
        ([[1, 2], [3]], "unequal"),
        ([["x"]], "no number"),
        ([[0, 0]], "all counts are zero"),
        (3, "no table"),
    ):
        path.write_text(json.dumps({"logical_count": value}))
        _refused(path, message)


# ------------------------------------------------------------------ vLLM


def test_vllm_lines(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    meta = {"record_type": "eplb_load_meta", "version": 1, "model": "m", "num_ranks": 2, "num_groups": 1,
            "num_nodes": 1, "num_layers": 2, "num_redundant_experts": 0}  # fmt: skip
    one = {"record_type": "eplb_load_stats", "version": 1, "step": 10, "expert_load": [[10, 1, 5, 2], [2, 8, 1, 3]],
           "p2l_map": [[0, 1, 2, 3]] * 2}  # fmt: skip
    two = one | {"step": 20, "expert_load": [[1] * 4, [2] * 4]}
    path.write_text(
        "\n".join(json.dumps(x) for x in (meta, {"record_type": "session_metadata"}, one, two)) + "\n"
    )
    found = read_load(path)
    assert found.load.sum(axis=0).tolist() == [[11, 2, 6, 3], [4, 10, 3, 5]]
    assert (found.ep_size, found.model, [w.steps for w in found.windows]) == (2, "m", [10, 10])
    # the first revision: num_ranks in each line, replicas folded
    path.write_text(json.dumps(one | {"num_ranks": 1, "expert_load": [[3, 7]], "p2l_map": [[0, 0]]}))
    assert read_load(path).load.tolist() == [[[10]]]
    for broken, message in (
        ([meta, meta, one], "must come once"),
        ([meta], "nothing was recorded"),
        ([meta, one | {"record_type": "eplb_other"}], "line 2: record_type"),
        ([meta, one | {"p2l_map": [[0, 1, 2]] * 2}], "line 2: expert_load has shape"),
        ([meta, one | {"p2l_map": [[0, 1, 2, 9]] * 2}], "names expert 9"),
        ([meta, one | {"expert_load": [[1, 2, 3, 4], [1]]}], "unequal"),
        ([meta, one | {"version": 3}], "version 3"),
        ([one, one | {"p2l_map": [[0, 1, 2, 0]] * 2}], "earlier lines had"),
    ):
        path.write_text("\n".join(json.dumps(x) for x in broken))
        _refused(path, message)


# ------------------------------------------------------------------ routed experts


def test_routed_experts(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 16, (100, 3, 2)).astype(np.uint8)
    ids[:, 0] = 0  # a dense layer
    np.save(tmp_path / "r.npy", ids)
    found = read_load(tmp_path / "r.npy")
    assert (found.layers, found.top_k, found.num_windows) == ((1, 2), 2, 32)
    assert found.load.sum(axis=0)[0].tolist() == np.bincount(ids[:, 1].ravel(), minlength=16).tolist()
    raw = base64.b64decode(base64.b64encode(ids.astype("<i4").tobytes()))
    (tmp_path / "r.bin").write_bytes(raw)
    assert (read_load(tmp_path / "r.bin", (3, 2)).load == found.load).all()
    _refused(tmp_path / "r.bin", "are not int32 of shape", raw_shape=(7, 2))
    np.save(tmp_path / "flat.npy", ids[0])
    _refused(tmp_path / "flat.npy", r"whole numbers \[tokens, layers, top_k\]")


# ------------------------------------------------------------------ placements


def _file() -> PlacementFile:
    load = np.random.default_rng(3).integers(1, 100, (4, 3, 8))
    return PlacementFile(solve(load, Topology.of(4, 12), routing="even"), 4, (1, 2, 4), "m")


@pytest.mark.parametrize("name", FORMATS)
def test_every_placement_can_be_read_back(tmp_path: Path, name: str) -> None:
    file = _file()
    path = tmp_path / "p"
    path.write_text(format_as(file, name, num_hidden_layers=6, layer_updates_per_iter=1))
    known = Known(4, 8, (1, 2, 4))
    found = read_any_placement(path, known)
    assert (found.placement.slot_to_expert == file.placement.slot_to_expert).all()
    assert (found.ep_size, found.placement.num_experts, found.layers) == (4, 8, (1, 2, 4))


def test_what_the_engines_expect() -> None:
    yaml = pytest.importorskip("yaml")
    file = _file()
    rows = file.placement.slot_to_expert.tolist()
    document = yaml.safe_load(format_as(file, "trtllm", layer_updates_per_iter=2))
    assert document == {
        "num_slots": 12,
        "layer_updates_per_iter": 2,
        "initial_global_assignments": dict(zip((1, 2, 4), rows, strict=True)),
    }
    sglang = json.loads(format_as(file, "sglang", num_hidden_layers=6))
    assert list(sglang) == ["physical_to_logical_map"]
    assert len(sglang["physical_to_logical_map"]) == 6
    assert [sglang["physical_to_logical_map"][i] for i in (1, 2, 4)] == rows
    with pytest.raises(ValueError, match="needs --num-hidden-layers"):
        format_as(file, "sglang")
    with pytest.raises(ValueError, match="is too few"):
        format_as(file, "sglang", num_hidden_layers=4)
    vllm = json.loads(format_as(file, "vllm"))
    assert (vllm["record_type"], vllm["num_redundant_experts"], vllm["num_slots"]) == (
        "eplb_initial_mapping",
        4,
        12,
    )
    assert vllm["initial_global_assignments"] == {str(i): row for i, row in enumerate(rows)}
    ascend = json.loads(format_as(file, "ascend"))
    assert ascend["moe_layer_count"] == 3
    assert ascend["layer_list"][2]["device_list"][1]["device_expert"] == rows[2][3:6]
    doubles = PlacementFile(Placement(np.array([[0, 0, 1, 1]]), 2), 2, (0,))
    with pytest.raises(ValueError, match="holds an expert twice"):
        format_as(doubles, "ascend")


def test_unknown_ranks_must_be_given(tmp_path: Path) -> None:
    path = tmp_path / "p"
    for name in ("sglang", "vllm"):
        path.write_text(format_as(_file(), name, num_hidden_layers=6))
        with pytest.raises(ValueError, match="give --ep-size"):
            read_any_placement(path)
    path.write_text(format_as(_file(), "trtllm"))
    assert read_any_placement(path).ep_size == 4  # from our comment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("{", "broken JSON"),
        ("{}", "no placement of a known engine"),
        ("a: [1", "neither JSON nor YAML"),
        ("a: 1", "as TensorRT-LLM's YAML it has a"),
        (
            "num_slots: 2\ninitial_global_assignments: {3: [0]}",
            r"initial_global_assignments\[3\] has 1 entries",
        ),
        ("num_slots: 2\ninitial_global_assignments: {3: [0, x]}", 'is "x", expected a whole number'),
        ("num_slots: 2\ninitial_global_assignments: {3: [1, 1]}", "expert 0 has no slot"),
        ("num_slots: 2\ninitial_global_assignments: {x: [1, 1]}", "key 'x'"),
        ('{"physical_to_logical_map": [[0, 1]], "more": 1}', "alone"),
        ('{"physical_to_logical_map": 3}', "no list"),
        ('{"record_type": "eplb_initial_mapping", "version": 2}', "version 2"),
        ('{"layer_list": [], "moe_layer_count": 1}', "has 0 entries"),
        (
            '{"layer_list": [{"layer_id": 0, "device_count": 2, "device_list": []}], "moe_layer_count": 1}',
            "device_list has not",
        ),
    ],
)
def test_broken_placements(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_any_placement(path, Known(1))
    assert "\n" not in str(caught.value)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot write"):
        write_placement(tmp_path / "no" / "p.json", _file())
    write_placement(tmp_path / "p.json", _file())
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]

"""The C kernels against the plain forms, and their promise: the same bits in any batch, on any threads."""

from __future__ import annotations

import dataclasses
import functools
import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeserve.forward_batch import ForwardBatch
from moeserve.models.spec import Routing
from moeserve.ops import build, native, reference, table

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> native.NativeOps:
    try:
        return native.NativeOps(build.build(directories=[tmp_path_factory.mktemp("kernels")]))
    except build.BuildError as error:
        pytest.skip(f"no C kernels here: {error}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def close(got: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def same_on_two_threads(run: Callable[[], Tensor]) -> Tensor:
    """The result of `run`, after checking that two threads give the same bits."""
    one = run()
    torch.set_num_threads(2)
    two = run()
    torch.set_num_threads(1)
    assert torch.equal(one, two)
    return one


def make_batch(
    queries: list[int], contexts: list[int], page_size: int, padding: int = 0, seed: int = 0
) -> tuple[ForwardBatch, int]:
    """Sequences with `queries` new tokens each and `contexts` tokens in the cache, on shuffled pages; and the
    number of pages. Decodes (one query) must come first."""
    starts = torch.tensor([0, *queries]).cumsum(0)
    needed = [-(-context // page_size) for context in contexts]
    pages = list(range(sum(needed) + 1))
    random.Random(seed).shuffle(pages)
    page_table = torch.zeros(len(queries), max(needed, default=0) + 2, dtype=torch.int32)
    positions, slots = [], []
    for row, (query, context) in enumerate(zip(queries, contexts, strict=True)):
        mine = [pages.pop() for _ in range(needed[row])]
        page_table[row, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        for position in range(context - query, context):
            positions.append(position)
            slots.append(mine[position // page_size] * page_size + position % page_size)
    num_rows = len(positions) + padding
    return (
        ForwardBatch(
            token_ids=torch.zeros(num_rows, dtype=torch.int64),
            positions=torch.tensor(positions + [0] * padding, dtype=torch.int64),
            kv_slots=torch.tensor(slots + [-1] * padding, dtype=torch.int64),
            query_start=starts.to(torch.int32),
            context_len=torch.tensor(contexts, dtype=torch.int32),
            page_table=page_table,
            num_decode=next((i for i, n in enumerate(queries) if n != 1), len(queries)),
            max_query_len=max(queries, default=0),
            max_context_len=max(contexts, default=0),
            logit_rows=torch.zeros(0, dtype=torch.int64),
            rows_per_rank=(num_rows,),
        ),
        sum(needed) + 1,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "size", "columns"),
    [(0, 64, 8), (1, 512, 768), (3, 100, 37), (13, 33, 4), (50, 2304, 66), (8, 1, 1), (97, 64, 130)],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(
    ops: native.NativeOps, dtype: torch.dtype, rows: int, size: int, columns: int, with_bias: bool
) -> None:
    x = torch.randn(rows, size + 5, dtype=dtype)[
        :, 2 : size + 2
    ]  # a slice of columns, as out of a wider projection
    weight = torch.randn(columns, size, dtype=dtype) / size**0.5
    bias = torch.randn(columns, dtype=dtype) if with_bias else None
    close(same_on_two_threads(lambda: ops.linear(x, weight, bias)), reference.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_a_row_is_the_same_in_any_batch(ops: native.NativeOps, dtype: torch.dtype) -> None:
    x, weight = torch.randn(101, 200, dtype=dtype), torch.randn(70, 200, dtype=dtype)
    whole = ops.linear(x, weight)
    for first, end in [(0, 1), (1, 3), (5, 10), (30, 101), (100, 101)]:
        assert torch.equal(ops.linear(x[first:end], weight), whole[first:end])


def test_what_the_kernels_are_not_made_for_goes_to_the_plain_form(ops: native.NativeOps) -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    assert torch.equal(ops.linear(x, weight), reference.linear(x, weight))
    transposed = torch.randn(8, 4).T
    close(ops.linear(x.float(), transposed), reference.linear(x.float(), transposed))
    assert torch.equal(ops.rms_norm(x, weight[0], 1e-6), reference.rms_norm(x, weight[0], 1e-6))
    assert torch.equal(ops.silu_mul(x), reference.silu_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 9, 600])
@pytest.mark.parametrize("size", [64, 7, 200])
def test_norms_and_activation(ops: native.NativeOps, dtype: torch.dtype, rows: int, size: int) -> None:
    x, residual, weight = (
        torch.randn(*shape, dtype=dtype) for shape in ((rows, size), (rows, size), (size,))
    )
    close(same_on_two_threads(lambda: ops.rms_norm(x, weight, 1e-6)), reference.rms_norm(x, weight, 1e-6))
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    wanted_normed, wanted_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, wanted_total)
    close(normed, wanted_normed)
    heads = torch.randn(rows, 5 * size, dtype=dtype)[:, size : 4 * size].view(rows, 3, size)
    close(ops.rms_norm(heads, weight, 1e-6), reference.rms_norm(heads, weight, 1e-6))
    gate_up = torch.randn(rows, 2 * size + 3, dtype=dtype)[:, : 2 * size]
    close(same_on_two_threads(lambda: ops.silu_mul(gate_up)), reference.silu_mul(gate_up))


def test_silu_at_the_ends_of_float(ops: native.NativeOps) -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 1e30, float("nan")]])
    got, wanted = (
        form(torch.cat((gate, torch.ones_like(gate)), 1)) for form in (ops.silu_mul, reference.silu_mul)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rows", "heads", "size"), [(0, 2, 16), (1, 8, 64), (77, 3, 24), (400, 4, 64)])
def test_rope(
    ops: native.NativeOps, dtype: torch.dtype, interleaved: bool, rows: int, heads: int, size: int
) -> None:
    x = torch.randn(rows, heads, size + 8, dtype=dtype)[..., 8:]  # the rope part of an MLA head
    positions = torch.randint(0, 50, (rows,))
    angles = torch.rand(50, size // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    got = same_on_two_threads(lambda: ops.rope(x, positions, cos_sin, interleaved))
    close(got, reference.rope(x, positions, cos_sin, interleaved))


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv(ops: native.NativeOps, dtype: torch.dtype) -> None:
    for cache, values in (
        (torch.zeros(5, 4, 2, 24, dtype=dtype), torch.randn(6, 6, 24, dtype=dtype)[:, 2:4]),
        (torch.zeros(5, 4, 1, 40, dtype=dtype)[..., :24], torch.randn(6, 1, 24, dtype=dtype)),
    ):
        slots = torch.tensor([3, -1, 17, 0, -1, 9])
        wanted = cache.clone()
        reference.write_kv(wanted, values, slots)
        ops.write_kv(cache, values, slots)
        assert torch.equal(cache, wanted)
        ops.write_kv(cache, values[:0], slots[:0])
        assert torch.equal(cache, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_linear(ops: native.NativeOps, dtype: torch.dtype) -> None:
    x, weight = torch.randn(50, 3, 40, dtype=dtype)[..., 8:], torch.randn(3, 70, 32, dtype=dtype) / 6
    got = same_on_two_threads(lambda: ops.head_linear(x, weight))
    close(got, reference.head_linear(x, weight))
    assert torch.equal(ops.head_linear(x[7:8], weight), got[7:8])
    assert ops.head_linear(x[:0], weight).shape == (0, 3, 70)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_take_heads(ops: native.NativeOps, dtype: torch.dtype, with_norms: bool, interleaved: bool) -> None:
    rows, heads, kv_heads, size = 70, 6, 2, 24
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * size, dtype=dtype)
    norms = (torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)) if with_norms else None
    positions, slots = torch.randint(0, 50, (rows,)), torch.randperm(90)[:rows]
    slots[3] = slots[60] = -1
    cos_sin = torch.randn(50, size)
    caches = torch.zeros(2, 2, 18, 5, kv_heads, size, dtype=dtype)  # [form, keys or values, pages, ...]
    arguments = (qkv, norms, 1e-6, positions, cos_sin, interleaved)
    got = same_on_two_threads(lambda: ops.take_heads(*arguments, caches[0][0], caches[0][1], slots))
    close(got, reference.take_heads(*arguments, caches[1][0], caches[1][1], slots))
    close(caches[0], caches[1])


ROUTINGS = [
    Routing("softmax", 4, normalize=True),
    Routing("softmax", 1),
    Routing("softmax", 3, num_groups=4, groups_kept=2),
    Routing("sigmoid", 6, 4, 2, 2, correction_bias=True, normalize=True, scaling=2.5),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_experts", [32, 60, 1028])
def test_choose_experts(
    ops: native.NativeOps, dtype: torch.dtype, routing: Routing, num_experts: int
) -> None:
    # logits that differ by more than a rounding, so that both forms see the same order
    logits = torch.stack([torch.randperm(num_experts) for _ in range(90)]).to(dtype) / 32
    bias = torch.rand(num_experts) * 1e-3 if routing.correction_bias else None
    weights, experts = ops.choose_experts(logits, bias, routing)
    wanted_weights, wanted_experts = reference.choose_experts(logits, bias, routing)
    if dtype is torch.float32:
        assert torch.equal(experts, wanted_experts)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-6)
    for first, end in [(0, 1), (5, 50), (0, 0)]:
        assert torch.equal(ops.choose_experts(logits[first:end], bias, routing)[0], weights[first:end])


def test_equal_logits_choose_the_first_experts(ops: native.NativeOps) -> None:
    _, experts = ops.choose_experts(torch.zeros(1, 40), None, Routing("softmax", 3))
    assert experts.tolist() == [[0, 1, 2]]


ATTENTION_BATCHES = [
    ([], []),
    ([1], [1]),
    ([1, 1, 1], [5, 300, 37]),
    ([7], [7]),
    ([1, 40, 3], [64, 40, 530]),
    ([300], [520]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "contexts"), ATTENTION_BATCHES)
@pytest.mark.parametrize("window", [None, 20])
def test_grouped_query_attention(
    ops: native.NativeOps, dtype: torch.dtype, queries: list[int], contexts: list[int], window: int | None
) -> None:
    batch, pages = make_batch(queries, contexts, page_size=16, padding=2)
    keys, values = torch.randn(2, pages, 16, 2, 64, dtype=dtype).unbind(0)
    q = torch.randn(batch.token_ids.shape[0], 10, 64, dtype=dtype)[:, 2:]  # a view of a wider projection
    got = same_on_two_threads(lambda: ops.paged_attention(q, keys, values, batch, 0.125, window))
    close(got, reference.paged_attention(q, keys, values, batch, 0.125, window))
    assert not got[-2:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "latent", "size"), [(16, 512, 576), (3, 20, 28), (40, 32, 48)])
def test_latent_attention_over_a_view_of_the_cache(
    ops: native.NativeOps, dtype: torch.dtype, heads: int, latent: int, size: int
) -> None:
    batch, pages = make_batch([1, 1, 9], [3, 280, 30], page_size=5)
    cache = torch.randn(pages, 5, 1, size, dtype=dtype)
    q = torch.randn(11, heads, size, dtype=dtype)
    got = ops.paged_attention(q, cache, cache[..., :latent], batch, size**-0.5, None)
    close(got, reference.paged_attention(q, cache, cache[..., :latent], batch, size**-0.5, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 33])
def test_attention_of_a_token_is_the_same_by_decode_prefill_or_chunk(
    ops: native.NativeOps, dtype: torch.dtype, window: int | None
) -> None:
    length = 270
    batch, pages = make_batch([length], [length], page_size=16)
    keys, values = torch.randn(2, pages, 16, 2, 64, dtype=dtype).unbind(0)
    q = torch.randn(length, 6, 64, dtype=dtype)
    whole = ops.paged_attention(q, keys, values, batch, 0.125, window)
    for first, end in [(0, 1), (1, 100), (100, 257), (257, 270), (200, 201), (269, 270)]:
        part = dataclasses.replace(
            batch,
            query_start=torch.tensor([0, end - first], dtype=torch.int32),
            context_len=torch.tensor([end], dtype=torch.int32),
        )
        got = ops.paged_attention(q[first:end], keys, values, part, 0.125, window)
        assert torch.equal(got, whole[first:end]), (first, end)


def test_attention_does_not_read_slots_that_were_never_written(ops: native.NativeOps) -> None:
    batch, pages = make_batch([1, 3], [18, 7], page_size=16)
    keys, values = torch.randn(2, pages, 16, 2, 64).unbind(0)
    wanted = reference.paged_attention(torch.ones(4, 4, 64), keys, values, batch, 1.0, 8)
    used = torch.zeros(pages * 16, dtype=torch.bool)
    for sequence, (low, high) in enumerate([(10, 18), (0, 7)]):
        for position in range(low, high):
            used[int(batch.page_table[sequence, position // 16]) * 16 + position % 16] = True
    for cache in (keys, values):
        cache.view(-1, 2, 64)[~used] = float("nan")
    close(ops.paged_attention(torch.ones(4, 4, 64), keys, values, batch, 1.0, 8), wanted)


def experts(slots: int, size: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(slots, 2 * inner, size, dtype=dtype) / size**0.5
    return gate_up, torch.randn(slots, size, inner, dtype=dtype) / inner**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "inner"), [(64, 32), (70, 50), (512, 256)])
def test_grouped_experts(ops: native.NativeOps, dtype: torch.dtype, size: int, inner: int) -> None:
    gate_up, down = experts(6, size, inner, dtype)
    for counts in ([0, 3, 0, 100, 1, 0], [0] * 6, [1] * 6):
        rows, tokens = torch.randn(sum(counts), size, dtype=dtype), torch.tensor(counts)
        got = same_on_two_threads(functools.partial(ops.grouped_experts, rows, tokens, gate_up, down))
        close(got, reference.grouped_experts(rows, tokens, gate_up, down))


def test_more_rows_promised_than_there_are(ops: native.NativeOps) -> None:
    with pytest.raises(AssertionError, match="more rows"):
        ops.grouped_experts(torch.zeros(3, 8), torch.tensor([2, 2]), *experts(2, 8, 8, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "choices"), [(0, 2), (1, 4), (37, 3), (300, 1)])
def test_fused_experts(ops: native.NativeOps, dtype: torch.dtype, tokens: int, choices: int) -> None:
    gate_up, down = experts(7, 96, 48, dtype)
    x, weights = torch.randn(tokens, 96, dtype=dtype), torch.rand(tokens, choices)
    slots = torch.randint(-1, 7, (tokens, choices))
    got = same_on_two_threads(lambda: ops.fused_experts(x, slots, weights, gate_up, down))
    close(got, reference.fused_experts(x, slots, weights, gate_up, down))
    for first, end in [(0, 1), (5, 36), (36, 37)]:
        part = ops.fused_experts(x[first:end], slots[first:end], weights[first:end], gate_up, down)
        assert torch.equal(part, got[first:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_experts_equal_the_dispatched_ones_to_the_bit(
    ops: native.NativeOps, dtype: torch.dtype
) -> None:
    gate_up, down = experts(5, 64, 32, dtype)
    x, weights, slots = torch.randn(20, 64, dtype=dtype), torch.rand(20, 2), torch.randint(0, 5, (20, 2))
    order = slots.flatten().argsort(stable=True)
    rows = torch.empty(40, 64, dtype=dtype)
    rows[order] = ops.grouped_experts(x[order // 2], slots.flatten().bincount(minlength=5), gate_up, down)
    total = torch.zeros(20, 64)
    for k in range(2):
        total += weights[:, k : k + 1] * rows.view(20, 2, 64)[:, k].float()
    assert torch.equal(ops.fused_experts(x, slots, weights, gate_up, down), total.to(dtype))


def test_without_a_compiler_the_plain_forms_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(table, "_fast_forms", {})
    with caplog.at_level(logging.WARNING):
        assert not native.enable()
    assert len(caplog.records) == 1 and "no C compiler" in caplog.text
    assert table.get("linear", "cpu") is reference.linear


def test_a_failed_compile_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels.c").write_text("int broken(void) { return not_declared; }\n")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    with pytest.raises(build.BuildError, match="not_declared"):
        build.build(directories=[tmp_path / "cache"])
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_cache_that_cannot_be_written_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "kernels.c").write_text("int fine(void) { return 1; }\n")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    (tmp_path / "file").write_text("")
    bad = tmp_path / "file" / "cache"
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)  # anyone could put a library there
    assert build.build(directories=[bad, shared, tmp_path / "good"]).parent == tmp_path / "good"
    with pytest.raises(build.BuildError, match="nowhere to keep"):
        build.build(directories=[bad, shared])


def test_a_library_is_compiled_once_and_anew_when_a_source_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "kernels.c").write_text("int fine(void) { return 1; }\n")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    first = build.build(directories=[tmp_path / "cache"])
    made = first.stat().st_mtime_ns
    assert build.build(directories=[tmp_path / "cache"]) == first and first.stat().st_mtime_ns == made
    (tmp_path / "part.h").write_text("/* new */\n")
    assert build.build(directories=[tmp_path / "cache"]) != first


def test_one_openmp_runtime_in_the_process(ops: native.NativeOps) -> None:
    library = next(Path(path) for path in loaded_libraries() if "kernels-" in path)
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=False).stdout
    assert "omp" not in needed
    assert sys.platform != "linux" or native._find_team() is not None


def loaded_libraries() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if ".so" in line}

# mypy: ignore-errors
"""The Triton kernels of combine, launched one after the other on one stream; for arguments see dispatch_kernels.

answer         each result to its cell; the last program releases `done`                     grid (programs,)
answer_summed  the same, with a row's choices summed first (cells = "rank")                   grid (programs, R)
wait           of dispatch_kernels, for the `done` words                                      grid (R,)
reduce         weight * result, added in top-k order                                          grid (programs,)
"""

import triton
import triton.language as tl

from moeserve.comm.all_to_all.one_sided.device_words import (
    ANSWER_ARRIVALS,
    EPOCH,
    HALF,
    NONE,
    as_float8,
    last_of,
    rounded,
)


@triton.jit
def _store_result(row, value, first, real, WIDTH: tl.constexpr, SCALES_AT: tl.constexpr, SOFT: tl.constexpr):
    """Values [rows, BH] from column `first` on to the cells at `row`; as float8 with SCALES_AT, each 128 with a scale.

    A scale is a power of two, so that it costs no bits and is the same wherever it is worked out.
    """
    BT: tl.constexpr = value.shape[0]
    BH: tl.constexpr = value.shape[1]
    column = first + tl.arange(0, BH)
    inside = real[:, None] & (column < WIDTH)[None, :]
    if SCALES_AT:
        BB: tl.constexpr = BH // 128
        value = tl.reshape(value.to(tl.float32), [BT, BB, 128])
        largest = tl.max(tl.abs(value), 2) * (1.0 / 448.0)
        power = (largest.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
        power = tl.minimum(tl.maximum(power, 1), 253)
        inverse = ((254 - power) << 23).to(tl.float32, bitcast=True)
        value = tl.reshape(value * inverse[:, :, None], [BT, BH])
        to = tl.multiple_of(row.to(tl.pointer_type(tl.uint8)), [16])
        tl.store(to[:, None] + column[None, :], as_float8(value, SOFT), mask=inside)
        block = first // 128 + tl.arange(0, BB)
        scales = tl.multiple_of((row + SCALES_AT).to(tl.pointer_type(tl.float32)), [16])
        scale = (power << 23).to(tl.float32, bitcast=True)
        tl.store(scales[:, None] + block[None, :], scale, mask=real[:, None] & (block * 128 < WIDTH)[None, :])
    else:
        to = tl.multiple_of(row.to(tl.pointer_type(value.dtype)), [16])
        tl.store(to[:, None] + column[None, :], value, mask=inside)


@triton.jit
def _load_result(
    row, first, there, kind: tl.constexpr, WIDTH: tl.constexpr, SCALES_AT: tl.constexpr, BH: tl.constexpr
):
    """float32 [rows, BH], what _store_result stored; 0 where not `there`."""
    BT: tl.constexpr = row.shape[0]
    column = first + tl.arange(0, BH)
    inside = there[:, None] & (column < WIDTH)[None, :]
    if SCALES_AT:
        BB: tl.constexpr = BH // 128
        at = tl.multiple_of(row.to(tl.pointer_type(tl.uint8)), [16])[:, None] + column[None, :]
        value = tl.load(at, mask=inside, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        block = first // 128 + tl.arange(0, BB)
        at = tl.multiple_of((row + SCALES_AT).to(tl.pointer_type(tl.float32)), [16])[:, None] + block[None, :]
        scale = tl.load(at, mask=there[:, None] & (block * 128 < WIDTH)[None, :], other=0.0)
        return tl.reshape(tl.reshape(value, [BT, BB, 128]) * scale[:, :, None], [BT, BH])
    at = tl.multiple_of(row.to(tl.pointer_type(kind)), [16])[:, None] + column[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _release_done(
    words, mask, blocks, own_got, me, programs, done_at, R: tl.constexpr, RP: tl.constexpr, PULL: tl.constexpr
):
    """The last program tells the ranks that their results are there: those with rows; under pull all."""
    if last_of(words + ANSWER_ARRIVALS, programs):
        r = tl.arange(0, RP)
        alive = tl.load(mask + r, mask=r < R, other=0) != 0
        if not PULL:
            alive = alive & (tl.load(own_got + r, mask=r < R, other=0) > 0)
        done = tl.load(blocks + r, mask=alive, other=0) + done_at + me * 8
        epoch = tl.load(words + EPOCH) + tl.zeros([RP], tl.int64)
        tl.store(words + ANSWER_ARRIVALS, 0)
        tl.debug_barrier()
        tl.atomic_xchg(done.to(tl.pointer_type(tl.int64)), epoch, mask=alive, sem="release", scope="sys")


@triton.jit
def answer(
    y,  # [N, WIDTH], in the order of own_rows
    words,
    mask,
    blocks,
    own_got,
    own_start,
    own_rows,
    max_tokens,
    me,
    programs,
    done_at,
    meta_at,
    meta_source,
    meta_row,
    result_at,
    result_source,
    result_row,
    result_cell,
    R: tl.constexpr,
    RP: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALES_AT: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    PULL: tl.constexpr,
    SOFT: tl.constexpr,
):
    count = tl.load(own_start + S)
    own = tl.load(blocks + me)
    for tile in range(tl.program_id(0), tl.cdiv(count, BT), programs):
        n = tile * BT + tl.arange(0, BT)
        real = n < count
        code = tl.load(own_rows + n, mask=real, other=0)
        source = code // K // max_tokens
        i = (code // K % max_tokens).to(tl.int64)
        if PULL:
            row = own + result_at + source.to(tl.int64) * result_source + i * result_row
        else:
            record = own + meta_at + source.to(tl.int64) * meta_source + i * meta_row
            token = tl.load(record.to(tl.pointer_type(tl.int32)), mask=real, other=0)
            row = tl.load(blocks + source, mask=real, other=0) + result_at + token.to(tl.int64) * result_row
        row += (code % K).to(tl.int64) * result_cell
        for first in tl.range(0, WIDTH, BH):
            h = first + tl.arange(0, BH)
            at = y + n.to(tl.int64)[:, None] * WIDTH + h[None, :]
            value = tl.load(at, mask=real[:, None] & (h < WIDTH)[None, :], other=0.0)
            _store_result(row, value, first, real, WIDTH, SCALES_AT, SOFT)
    _release_done(words, mask, blocks, own_got, me, programs, done_at, R, RP, PULL)


@triton.jit
def answer_summed(
    y,
    words,
    mask,
    blocks,
    own_got,
    own_place,
    max_tokens,
    me,
    programs,
    done_at,
    meta_at,
    meta_source,
    meta_row,
    weights_at,
    slots_at,
    result_at,
    result_source,
    result_row,
    result_cell,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALES_AT: tl.constexpr,
    WIRE: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    PULL: tl.constexpr,
    SOFT: tl.constexpr,
):
    """As answer, but each row's choices are weighted and summed here, in top-k order (cells = "rank")."""
    source = tl.program_id(1)
    own = tl.load(blocks + me)
    rows = tl.load(own_got + source)
    record_at = own + meta_at + source.to(tl.int64) * meta_source
    for tile in range(tl.program_id(0), tl.cdiv(rows, BT), programs):
        i = (tile * BT + tl.arange(0, BT)).to(tl.int64)
        real = i < rows
        record = record_at + i * meta_row
        if PULL:
            row = own + result_at + source.to(tl.int64) * result_source + i * result_row
        else:
            head = tl.load(record.to(tl.pointer_type(tl.int64)), mask=real, other=0)
            row = tl.load(blocks + source) + result_at + (head & 0xFFFFFFFF) * result_row
            row += ((head >> 32) & 0xFFFF) * result_cell
        for first in tl.range(0, WIDTH, BH):
            h = first + tl.arange(0, BH)
            total = tl.zeros([BT, BH], tl.float32)
            for k in tl.static_range(K):
                slot = tl.load((record + slots_at).to(tl.pointer_type(tl.int16)) + k, mask=real, other=-1)
                here = slot >= 0
                weight = tl.load(
                    (record + weights_at).to(tl.pointer_type(tl.float32)) + k, mask=here, other=0.0
                )
                n = tl.load(own_place + (source * max_tokens + i) * K + k, mask=here, other=0)
                at = y + n.to(tl.int64)[:, None] * WIDTH + h[None, :]
                value = tl.load(at, mask=here[:, None] & (h < WIDTH)[None, :], other=0.0).to(tl.float32)
                total = total + value * weight[:, None]
            _store_result(row, rounded(total, WIRE, SOFT), first, real, WIDTH, SCALES_AT, SOFT)
    _release_done(words, mask, blocks, own_got, me, programs * R, done_at, R, RP, PULL)


@triton.jit
def reduce(
    weights,  # float32 [T, K]
    out,  # [T, WIDTH]
    own_lost,  # float32 [T]: weight of the choices whose results are missing
    num_tokens,
    words,
    blocks,
    own_target,
    own_row,
    own_got,  # int32 [R]: 1 where a rank's results are there
    tokens,
    spare,
    me,
    programs,
    result_at,
    result_source,
    result_row,
    result_cell,
    K: tl.constexpr,
    KP: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALES_AT: tl.constexpr,
    WIRE: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    PULL: tl.constexpr,
    SUMMED: tl.constexpr,
    SOFT: tl.constexpr,
):
    n = tl.minimum(tl.load(num_tokens), tokens).to(tl.int32)
    own = tl.load(blocks + me)
    first_token = tl.load(words + HALF) * spare
    ks = tl.arange(0, KP)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, BT), programs):
        t = tile * BT + tl.arange(0, BT)
        real = t < n
        cells = t[:, None] * K + ks[None, :]
        targets = tl.load(own_target + cells, mask=real[:, None] & (ks < K)[None, :], other=NONE)
        answered = tl.load(own_got + targets, mask=targets >= 0, other=0)
        missing = (targets != NONE) & (answered == 0)
        shares = tl.load(weights + cells, mask=missing, other=0.0)
        tl.store(own_lost + t, tl.sum(shares, 1), mask=t < tokens)
        for first in tl.range(0, WIDTH, BH):
            h = first + tl.arange(0, BH)
            total = tl.zeros([BT, BH], tl.float32)
            used = t * 0
            for k in tl.static_range(K):
                target = tl.load(own_target + t * K + k, mask=real, other=NONE)
                there = tl.load(own_got + target, mask=target >= 0, other=0) != 0
                row = tl.load(own_row + t * K + k, mask=target != NONE, other=-1)
                cell = used * 0 + k
                if SUMMED:  # a rank's sum lies in the cell of its first choice
                    cell = used * 0 if PULL else used
                    there = there & (row >= 0)
                    used += (row >= 0).to(tl.int32)
                if PULL:
                    row = tl.where(row < 0, -1 - row, row).to(tl.int64)
                    at = tl.load(blocks + target, mask=there, other=0) + result_at
                    at += me.to(tl.int64) * result_source + row * result_row
                else:
                    at = own + result_at + (first_token + t) * result_row
                at += cell.to(tl.int64) * result_cell
                value = _load_result(at, first, there, WIRE, WIDTH, SCALES_AT, BH)
                if not SUMMED:
                    weight = tl.load(weights + t * K + k, mask=there, other=0.0)
                    value = value * weight[:, None]
                total = total + value
            at = out + t.to(tl.int64)[:, None] * WIDTH + h[None, :]
            result = rounded(total, out.dtype.element_ty, SOFT)
            tl.store(at, result, mask=(t < tokens)[:, None] & (h < WIDTH)[None, :])

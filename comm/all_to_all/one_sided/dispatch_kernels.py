# mypy: ignore-errors
"""The Triton kernels of dispatch, launched one after the other on one stream.

    place   which row of which rank each choice is; writes meta and counts to the ranks   grid (R,)
    put     the rows themselves, once a rank; the last program releases the mail words    grid (programs,)
    wait    for the word of one source, until it is there or the deadline has passed      grid (R,)
    index   where each received row stands in the order of slots                          grid (S, R)

Nothing is decided on the host: epoch, mask, table, deadline and token count are words in device memory, so that the
same launches can be replayed from a CUDA graph. `blocks` is int64 [R], the address of each rank's block; own_* are
this rank's own buffers; byte offsets and strides are those of EpLayout, in bytes.

Where a remote pointer is made, multiple_of says what an address out of a table hides: without it a thread stores 2
bytes at a time. A barrier stands before each release: Triton 3.6 puts none there itself. Programs of a grid never
wait for one another, and only `wait` waits at all: the interpreter runs programs in order.
"""

import triton
import triton.language as tl

from moeserve.comm.all_to_all.one_sided.device_words import (
    ACTIVE,
    DEADLINE,
    EPOCH,
    HALF,
    LOST,
    META_VERSION,
    MISMATCHES,
    NONE,
    PUT_ARRIVALS,
    ROTATION,
    ROW_BITS,
    ROW_MASK,
    UNSAFE,
    VERSION,
    last_of,
    next_half,
    now,
)


@triton.jit
def place(
    ids,  # int64 [T, K] experts, or slots without TRANSLATE; -1 for none
    weights,  # float32 [T, K]; read with SUMMED only
    table,  # int32 [2, E, columns] slots, which of the two is state[ACTIVE]
    state,  # int32 [3]
    num_tokens,  # int64 [1]
    words,
    mask,  # int32 [R], 0 for ranks that are out
    blocks,
    own_target,  # int32 [T, K] rank of each choice, NONE or LOST
    own_row,  # int32 [T, K] its row there; -1 - row when an earlier choice of the token has the same rank
    own_sent,  # int32 [R] rows for each rank
    own_counts,  # int64 [E] of the ids seen so far
    tokens,  # of this launch; num_tokens may be less
    spare,  # tokens of half of the result cells, 0 where none are kept spare
    me,
    num_experts,
    columns,
    count_at,
    count_parity,
    count_source,
    meta_at,
    meta_source,
    meta_row,
    weights_at,
    slots_at,
    R: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,  # power of two above S
    K: tl.constexpr,
    KP: tl.constexpr,
    BT: tl.constexpr,
    TRANSLATE: tl.constexpr,
    SUMMED: tl.constexpr,
):
    rank = tl.program_id(0)
    n = tl.minimum(tl.load(num_tokens), tokens).to(tl.int32)
    alive = tl.load(mask + rank)
    parity = (tl.load(words + EPOCH) + 1) & 1
    first_token = next_half(words) * spare
    version = 0
    turn = 0
    if TRANSLATE:
        table += tl.load(state + ACTIVE) * num_experts * columns
        version = tl.load(state + VERSION)
        turn = tl.load(state + ROTATION)
    block = tl.load(blocks + rank)
    records = block + meta_at + me.to(tl.int64) * meta_source
    k = tl.arange(0, KP)
    nobody = tl.where(rank == 0, -1, R)  # the first program sees to choices without a rank
    rows = 0
    slot_counts = tl.zeros([SP], tl.int32)
    for start in range(0, n, BT):
        t = start + tl.arange(0, BT)
        real = (t < n)[:, None] & (k < K)[None, :]
        cell = t[:, None] * K + k[None, :]
        id = tl.load(ids + cell, mask=real, other=-1).to(tl.int32)
        slot = id
        if TRANSLATE:
            slot = tl.load(table + id * columns + ((t + turn) % columns)[:, None], mask=id >= 0, other=-1)
        rank_of = tl.where((slot >= 0) & (slot < R * S), slot // S, -1)
        mine = rank_of == rank
        tl.atomic_add(own_counts + id, 1, mask=mine, sem="relaxed", scope="gpu")
        seen = tl.cumsum(mine.to(tl.int32), 1)
        hit = tl.max(mine.to(tl.int32), 1)
        row = rows + tl.cumsum(hit, 0) - hit
        here = tl.where(mine & (seen == 1), row[:, None], -1 - row[:, None])
        target = tl.where(mine, tl.where(alive != 0, rank, LOST), NONE)
        tl.store(own_row + cell, here, mask=mine)
        tl.store(own_target + cell, target, mask=mine | (real & (rank_of == nobody)))
        local = tl.where(mine, slot - rank * S, -1)
        record = records + row.to(tl.int64) * meta_row
        arrives = hit * alive != 0
        word = (first_token + t) | (version.to(tl.int64) & 0x7FFF) << 48
        if SUMMED:
            # z's cell: how many other ranks the token's earlier choices went to
            other = rank_of[:, :, None] == rank_of[:, None, :]
            earlier = (k[None, :] < k[:, None])[None, :, :]
            new = (rank_of >= 0) & (tl.max((other & earlier).to(tl.int32), 2) == 0)
            before_mine = (seen == 0) & new
            word |= tl.sum(before_mine.to(tl.int64), 1) << 32
            value = tl.load(weights + cell, mask=mine, other=0.0)
            at = (record + weights_at)[:, None].to(tl.pointer_type(tl.float32)) + k[None, :]
            tl.store(at, value, mask=arrives[:, None] & (k < K)[None, :])
        tl.store(record.to(tl.pointer_type(tl.int64)), word, mask=arrives)
        at = (record + slots_at)[:, None].to(tl.pointer_type(tl.int16)) + k[None, :]
        tl.store(at, local.to(tl.int16), mask=arrives[:, None] & (k < K)[None, :])
        slot_counts += tl.histogram(tl.reshape(tl.where(mine, local, S), [BT * KP]), SP)
        rows += tl.sum(hit, 0)
    s = tl.arange(0, SP)
    at = (block + count_at + parity * count_parity + me.to(tl.int64) * count_source).to(
        tl.pointer_type(tl.int32)
    )
    tl.store(at + s, slot_counts, mask=s < S * alive)
    tl.store(own_sent + rank, rows * alive)


@triton.jit
def put(
    x,  # WORD [T, x_words]
    scales,  # WORD [T, scale_words]
    num_tokens,
    words,
    mask,
    blocks,
    own_target,
    own_row,
    own_sent,
    own_counts,
    tokens,
    me,
    programs,
    mail_at,
    epoch_at,
    stats_at,
    stats_source,
    x_at,
    x_source,
    x_row,
    scales_at,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    X_WORDS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    GATHERED: tl.constexpr,  # experts whose counts go to all ranks
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    word: tl.constexpr = x.dtype.element_ty
    n = tl.minimum(tl.load(num_tokens), tokens).to(tl.int32)
    epoch = tl.load(words + EPOCH) + 1
    k = tl.arange(0, KP)
    h = tl.arange(0, BH)
    for tile in range(tl.program_id(0), tl.cdiv(n, BT), programs):
        t = tile * BT + tl.arange(0, BT)
        real = (t < n)[:, None] & (k < K)[None, :]
        cell = t[:, None] * K + k[None, :]
        target = tl.load(own_target + cell, mask=real, other=NONE)
        row = tl.load(own_row + cell, mask=real & (target >= 0), other=-1)
        goes = row >= 0
        block = tl.load(blocks + target, mask=goes, other=0)
        to = block + x_at + me.to(tl.int64) * x_source + row.to(tl.int64) * x_row
        rows = tl.multiple_of(to.to(tl.pointer_type(word)), [16, 16])
        for first in tl.range(0, X_WORDS, BH):
            inside = first + h < X_WORDS
            value = tl.load(
                x + t.to(tl.int64)[:, None] * X_WORDS + (first + h)[None, :],
                mask=(t < n)[:, None] & inside[None, :],
            )
            tl.store(
                rows[:, :, None] + (first + h)[None, None, :],
                tl.broadcast_to(value[:, None, :], [BT, KP, BH]),
                mask=goes[:, :, None] & inside[None, None, :],
            )
        if SCALE_WORDS:
            rows = tl.multiple_of((to + scales_at).to(tl.pointer_type(word)), [16, 16])
            for first in tl.range(0, SCALE_WORDS, BH):
                inside = first + h < SCALE_WORDS
                value = tl.load(
                    scales + t.to(tl.int64)[:, None] * SCALE_WORDS + (first + h)[None, :],
                    mask=(t < n)[:, None] & inside[None, :],
                )
                tl.store(
                    rows[:, :, None] + (first + h)[None, None, :],
                    tl.broadcast_to(value[:, None, :], [BT, KP, BH]),
                    mask=goes[:, :, None] & inside[None, None, :],
                )
    if GATHERED:
        for rank in range(tl.program_id(0), R, programs):
            to = tl.load(blocks + rank) + stats_at + me.to(tl.int64) * stats_source
            for first in tl.range(0, GATHERED, BH):
                inside = first + h < GATHERED * tl.load(mask + rank)
                value = tl.load(own_counts + first + h, mask=inside, other=0).to(tl.int32)
                tl.store(to.to(tl.pointer_type(tl.int32)) + first + h, value, mask=inside)
    if last_of(words + PUT_ARRIVALS, programs):
        r = tl.arange(0, RP)
        alive = tl.load(mask + r, mask=r < R, other=0) != 0
        sent = tl.load(own_sent + r, mask=alive, other=0)
        mail = tl.load(blocks + r, mask=alive, other=0) + mail_at + ((epoch & 1) * R + me) * 8
        tl.store((tl.load(blocks + me) + epoch_at).to(tl.pointer_type(tl.int64)), epoch)
        tl.store(words + PUT_ARRIVALS, 0)
        tl.store(words + EPOCH, epoch)
        tl.store(words + HALF, next_half(words))
        tl.debug_barrier()
        tl.atomic_xchg(
            mail.to(tl.pointer_type(tl.int64)),
            (epoch << ROW_BITS) | sent,
            mask=alive,
            sem="release",
            scope="sys",
        )


@triton.jit
def wait(
    words,
    mask,
    blocks,
    own_sent,
    own_got,  # int32 [R]: rows from each source (MAIL), else 1 where its results are there
    own_fault,  # int64 [R]: epoch in which a rank was found late
    host_fault,  # the same in the host's memory
    own_waited,  # int64 [R]: nanoseconds waited for each rank so far
    me,
    word_at,
    R: tl.constexpr,
    MAIL: tl.constexpr,
    ALL: tl.constexpr,  # wait for ranks too that were sent nothing
    CLOCK: tl.constexpr,
):
    rank = tl.program_id(0)
    epoch = tl.load(words + EPOCH)
    budget = tl.load(words + DEADLINE)
    wanted = tl.load(mask + rank) != 0
    if not ALL:
        wanted = wanted & (tl.load(own_sent + rank) > 0)
    got = 0
    if wanted:
        at = tl.load(blocks + me) + word_at + rank * 8
        if MAIL:
            at += (epoch & 1) * R * 8
        word = at.to(tl.pointer_type(tl.int64))
        looks = budget * 0
        start = now(looks, CLOCK)
        waited = looks
        value = tl.atomic_add(word, 0, sem="acquire", scope="sys")
        seen = value >> ROW_BITS if MAIL else value
        while (seen < epoch) & (waited < budget):
            looks += 1
            value = tl.atomic_add(word, 0, sem="acquire", scope="sys")
            seen = value >> ROW_BITS if MAIL else value
            waited = now(looks, CLOCK) - start
        tl.store(own_waited + rank, tl.load(own_waited + rank) + waited)
        if seen == epoch:
            got = (value & ROW_MASK).to(tl.int32) if MAIL else got + 1
        else:  # late; or ahead, which only a rank can be that has given us up
            tl.store(mask + rank, 0)
            half = tl.load(words + HALF)
            tl.atomic_or(words + UNSAFE, half + 1, sem="relaxed", scope="gpu")
            tl.store(own_fault + rank, epoch)
            tl.store(host_fault + rank, epoch)
    tl.store(own_got + rank, got)


@triton.jit
def index(
    state,
    words,
    blocks,
    own_got,
    own_start,  # int32 [S + 1]: the rows of slot s are own_rows[own_start[s]:own_start[s + 1]]
    own_rows,  # int32 [R * T * K]: (source * T + row) * K + k of each row, by slot, source, token, choice
    own_place,  # int32 [R * T * K]: the inverse; with SUMMED only
    max_tokens,
    me,
    count_at,
    count_parity,
    count_source,
    meta_at,
    meta_source,
    meta_row,
    slots_at,
    R: tl.constexpr,
    RP: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BT: tl.constexpr,
    TRANSLATE: tl.constexpr,
    SUMMED: tl.constexpr,
):
    slot = tl.program_id(0)
    source = tl.program_id(1)
    rows = tl.load(own_got + source)
    if (rows > 0) | (source == 0):
        block = tl.load(blocks + me)
        parity = tl.load(words + EPOCH) & 1
        r = tl.arange(0, RP)
        s = tl.arange(0, SP)
        arrived = tl.load(own_got + r, mask=r < R, other=0) > 0
        at = block + count_at + parity * count_parity + r.to(tl.int64) * count_source
        at = at.to(tl.pointer_type(tl.int32))[:, None] + s[None, :]
        counts = tl.load(at, mask=arrived[:, None] & (s < S)[None, :], other=0)
        start = tl.sum(tl.where(s < slot, tl.sum(counts, 0), 0), 0)
        of_slot = tl.sum(tl.where((s == slot)[None, :], counts, 0), 1)  # by source
        if source == 0:
            tl.store(own_start + slot, start)
            if slot == S - 1:
                tl.store(own_start + S, start + tl.sum(of_slot, 0))
        start += tl.sum(tl.where(r < source, of_slot, 0), 0)
        records = block + meta_at + source.to(tl.int64) * meta_source
        if tl.sum(tl.where(r == source, of_slot, 0), 0) > 0:
            k = tl.arange(0, KP)
            for first in range(0, rows, BT):
                i = first + tl.arange(0, BT)
                real = (i < rows)[:, None] & (k < K)[None, :]
                local = (records + i.to(tl.int64) * meta_row + slots_at).to(tl.pointer_type(tl.int16))
                mine = tl.load(local[:, None] + k[None, :], mask=real, other=-1) == slot
                flat = tl.reshape(mine.to(tl.int32), [BT * KP])
                position = start + tl.reshape(tl.cumsum(flat, 0) - flat, [BT, KP])
                code = (source * max_tokens + i)[:, None] * K + k[None, :]
                tl.store(own_rows + position, code, mask=mine)
                if SUMMED:
                    tl.store(own_place + code, position, mask=mine)
                start += tl.sum(flat, 0)
        if TRANSLATE and slot == 0:
            version = tl.load(state + VERSION) & 0x7FFF
            for first in range(0, rows, BT):
                i = first + tl.arange(0, BT)
                field = (records + i.to(tl.int64) * meta_row + META_VERSION).to(tl.pointer_type(tl.int16))
                theirs = tl.load(field, mask=i < rows, other=0)
                wrong = tl.sum(((theirs != version) & (i < rows)).to(tl.int64), 0)
                tl.atomic_add(words + MISMATCHES, wrong, mask=wrong > 0, sem="relaxed", scope="gpu")

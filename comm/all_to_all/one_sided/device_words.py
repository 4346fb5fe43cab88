# mypy: ignore-errors
"""What the Triton kernels share: the words they keep in device memory, and small device functions.

The signatures of kernels have no types: their arguments are of Triton's language, not of Python's.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(-1)
"""Target of a choice that has no slot."""
LOST = tl.constexpr(-2)
"""Target of a choice whose rank is masked."""

ROW_BITS = tl.constexpr(20)  # of a mail word, as in layout.py
ROW_MASK = tl.constexpr((1 << 20) - 1)
META_VERSION = tl.constexpr(6)  # byte of a record

# The engine's int64 `words`. HALF: which half of the result cells this step uses; UNSAFE: a bit for each half that a
# late rank may still write.
EPOCH = tl.constexpr(0)
DEADLINE = tl.constexpr(1)
PUT_ARRIVALS = tl.constexpr(2)
ANSWER_ARRIVALS = tl.constexpr(3)
MISMATCHES = tl.constexpr(4)
HALF = tl.constexpr(5)
UNSAFE = tl.constexpr(6)
NUM_WORDS = 8

# A table's int32 `state`.
ACTIVE = tl.constexpr(0)
VERSION = tl.constexpr(1)
ROTATION = tl.constexpr(2)

RESULT_TYPES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}
"""Of results that travel as they are."""


@triton.jit
def now(looks, CLOCK: tl.constexpr):
    """Nanoseconds; where there is no clock (interpreter), one look counts as 0.1 ms."""
    if CLOCK:
        return tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    return looks * 100_000


@triton.jit
def as_float8(x, SOFT: tl.constexpr):
    """float32 of at most 448 in size -> its float8_e4m3fn bits, uint8, to nearest even.

    SOFT: in integers, for the interpreter, whose own conversion loses the carry into the exponent.
    """
    if SOFT:
        bits = x.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        size = bits & 0x7FFFFFFF
        small = ((size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)) - 0x46800000
        normal = (size - 0x3C000000 + 0x7FFFF + ((size >> 20) & 1)) >> 20
        return (tl.where(size < 0x3C800000, small, normal) | sign).to(tl.uint8)
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def rounded(x, dtype: tl.constexpr, SOFT: tl.constexpr):
    """float32 -> dtype, to nearest even. SOFT: bfloat16 in integers, since the interpreter truncates."""
    if SOFT and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, even, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def next_half(words):
    """The half of the result cells that the next step uses: the first, unless a late rank may write there."""
    return tl.load(words + UNSAFE) & 1


@triton.jit
def last_of(arrivals, programs):
    """Whether this program is the last to come here; what all have written before is then visible to it."""
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()
    return last

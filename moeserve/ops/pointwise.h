/* Norms, activations, rotary embedding and cache writes: one row after another, no sums across rows.
 * Included once for each element type (elem, FN). Values are rounded to the element type where the plain forms
 * round, so that in bfloat16 both see the same numbers.
 */

#define FEW_ELEMENTS 32768  /* below this much work a second thread costs more than it brings */
#define ROWS_PER_ITEM 8

static inline int FN(threads_for)(long elements, int threads) { return elements < FEW_ELEMENTS ? 1 : threads; }

/* --- norms -------------------------------------------------------------------------------------------------- */

/* out = x / rms(x) * weight over `size` elements; out may be x. */
INLINE void FN(norm_row)(const elem *x, const elem *weight, elem *out, long size, float eps) {
    vf squares = {0};
    for (long i = 0; i < size; i += LANES) {
        vf value = FN(load_n)(x + i, size - i);
        squares = fma_vf(value, value, squares);
    }
    vf scale = splat(1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)size + eps));
    for (long i = 0; i < size; i += LANES) {
        vf value = FN(round)(FN(load_n)(x + i, size - i) * scale);
        FN(store_n)(out + i, value * FN(load_n)(weight + i, size - i), size - i);
    }
}

struct FN(norm) {
    const elem *x, *residual, *weight;
    elem *out, *total;
    long rows, heads, size, row_stride, head_stride;
    float eps;
};

static void FN(norm_item)(void *argument, long item) {
    const struct FN(norm) *op = argument;
    long end = min_long(op->rows, (item + 1) * ROWS_PER_ITEM);
    for (long row = item * ROWS_PER_ITEM; row < end; row++)
        for (long head = 0; head < op->heads; head++)
            FN(norm_row)(op->x + row * op->row_stride + head * op->head_stride, op->weight,
                         op->out + (row * op->heads + head) * op->size, op->size, op->eps);
}

/* x [rows, heads, size] of the given strides, weight [size] -> out [rows, heads, size]. */
void FN(moeserve_rms_norm)(const elem *x, const elem *weight, elem *out, long rows, long heads, long size,
                           long row_stride, long head_stride, float eps, int threads) {
    struct FN(norm) op = {x, NULL, weight, out, NULL, rows, heads, size, row_stride, head_stride, eps};
    for_each_item(ceil_div(rows, ROWS_PER_ITEM), FN(threads_for)(rows * heads * size, threads), FN(norm_item), &op);
}

static void FN(add_norm_item)(void *argument, long item) {
    const struct FN(norm) *op = argument;
    long end = min_long(op->rows, (item + 1) * ROWS_PER_ITEM);
    for (long row = item * ROWS_PER_ITEM; row < end; row++) {
        const elem *x = op->x + row * op->size, *residual = op->residual + row * op->size;
        elem *total = op->total + row * op->size;
        for (long i = 0; i < op->size; i += LANES) {
            long n = op->size - i;
            FN(store_n)(total + i, FN(load_n)(x + i, n) + FN(load_n)(residual + i, n), n);
        }
        FN(norm_row)(total, op->weight, op->out + row * op->size, op->size, op->eps);
    }
}

/* All [rows, size] contiguous: total = x + residual, out = rms_norm(total). */
void FN(moeserve_add_rms_norm)(const elem *x, const elem *residual, const elem *weight, elem *out, elem *total,
                               long rows, long size, float eps, int threads) {
    struct FN(norm) op = {x, residual, weight, out, total, rows, 1, size, size, 0, eps};
    for_each_item(ceil_div(rows, ROWS_PER_ITEM), FN(threads_for)(rows * size, threads), FN(add_norm_item), &op);
}

/* --- silu_mul ----------------------------------------------------------------------------------------------- */

struct FN(silu) {
    const elem *gate_up;
    elem *out;
    long rows, size, row_stride;
};

static void FN(silu_item)(void *argument, long item) {
    const struct FN(silu) *op = argument;
    long end = min_long(op->rows, (item + 1) * ROWS_PER_ITEM);
    for (long row = item * ROWS_PER_ITEM; row < end; row++) {
        const elem *gate = op->gate_up + row * op->row_stride, *up = gate + op->size;
        for (long i = 0; i < op->size; i += LANES) {
            long n = op->size - i;
            vf active = FN(round)(silu_vf(FN(load_n)(gate + i, n)));
            FN(store_n)(op->out + row * op->size + i, active * FN(load_n)(up + i, n), n);
        }
    }
}

/* gate_up [rows, 2 * size] of row stride row_stride -> out [rows, size]. */
void FN(moeserve_silu_mul)(const elem *gate_up, elem *out, long rows, long size, long row_stride, int threads) {
    struct FN(silu) op = {gate_up, out, rows, size, row_stride};
    for_each_item(ceil_div(rows, ROWS_PER_ITEM), FN(threads_for)(rows * size, threads), FN(silu_item), &op);
}

/* --- rope --------------------------------------------------------------------------------------------------- */

/* Rotate the pairs (i, i + size / 2) of x by cos_sin [size]: cos of the size / 2 angles, then sin. out may be x. */
INLINE void FN(rope_halves)(const elem *x, const float *cos_sin, elem *out, long size) {
    long half = size / 2;
    for (long i = 0; i < half; i += LANES) {
        long n = half - i;
        vf first = FN(load_n)(x + i, n), second = FN(load_n)(x + half + i, n);
        vf cosine = load_n_f32(cos_sin + i, n), sine = load_n_f32(cos_sin + half + i, n);
        FN(store_n)(out + i, first * cosine - second * sine, n);
        FN(store_n)(out + half + i, second * cosine + first * sine, n);
    }
}

/* The same for the pairs (2i, 2i + 1). */
INLINE void FN(rope_pairs)(const elem *x, const float *cos_sin, elem *out, long size) {
    long half = size / 2;
    for (long i = 0; i < size; i += LANES) {
        long n = min_long(LANES, size - i);
        float values[LANES], turned[LANES];
        store_f32(values, FN(load_n)(x + i, n));
        for (long j = 0; j < n; j += 2) {
            float cosine = cos_sin[(i + j) / 2], sine = cos_sin[half + (i + j) / 2];
            turned[j] = values[j] * cosine - values[j + 1] * sine;
            turned[j + 1] = values[j + 1] * cosine + values[j] * sine;
        }
        FN(store_n)(out + i, load_n_f32(turned, n), n);
    }
}

INLINE void FN(rope_row)(const elem *x, const float *cos_sin, elem *out, long size, int interleaved) {
    if (interleaved)
        FN(rope_pairs)(x, cos_sin, out, size);
    else
        FN(rope_halves)(x, cos_sin, out, size);
}

struct FN(rope) {
    const elem *x;
    const int64_t *positions;
    const float *cos_sin;
    elem *out;
    long rows, heads, size, row_stride, head_stride;
    int interleaved;
};

static void FN(rope_item)(void *argument, long item) {
    const struct FN(rope) *op = argument;
    long end = min_long(op->rows, (item + 1) * ROWS_PER_ITEM);
    for (long row = item * ROWS_PER_ITEM; row < end; row++)
        for (long head = 0; head < op->heads; head++)
            FN(rope_row)(op->x + row * op->row_stride + head * op->head_stride,
                         op->cos_sin + op->positions[row] * op->size,
                         op->out + (row * op->heads + head) * op->size, op->size, op->interleaved);
}

/* x [rows, heads, size] of the given strides, positions [rows], cos_sin [max position, size] -> out contiguous. */
void FN(moeserve_rope)(const elem *x, const int64_t *positions, const float *cos_sin, elem *out, long rows,
                       long heads, long size, long row_stride, long head_stride, int interleaved, int threads) {
    struct FN(rope) op = {x, positions, cos_sin, out, rows, heads, size, row_stride, head_stride, interleaved};
    for_each_item(ceil_div(rows, ROWS_PER_ITEM), FN(threads_for)(rows * heads * size, threads), FN(rope_item), &op);
}

/* --- write_kv ----------------------------------------------------------------------------------------------- */

/* values [rows, heads, size] into cache [pages, page_size, heads, size] at flat slots [rows]; -1 is skipped. */
void FN(moeserve_write_kv)(elem *cache, const elem *values, const int64_t *slots, long rows, long heads, long size,
                           long page_size, long page_stride, long slot_stride, long cache_head_stride,
                           long row_stride, long head_stride) {
    for (long row = 0; row < rows; row++) {
        if (slots[row] < 0) continue;
        elem *target = cache + slots[row] / page_size * page_stride + slots[row] % page_size * slot_stride;
        for (long head = 0; head < heads; head++)
            memcpy(target + head * cache_head_stride, values + row * row_stride + head * head_stride,
                   (size_t)size * sizeof(elem));
    }
}

/* --- take_heads --------------------------------------------------------------------------------------------- */

struct FN(heads) {
    const elem *qkv, *q_norm, *k_norm;
    const int64_t *positions, *slots;
    const float *cos_sin;
    elem *q, *keys, *values;
    long rows, q_heads, kv_heads, size, row_stride, page_size;
    long key_page, key_slot, key_head, value_page, value_slot, value_head;
    float eps;
    int interleaved;
};

/* One head's norm, if there is one, and its rotation. */
INLINE void FN(take_head)(const struct FN(heads) *op, const elem *x, const elem *norm, const float *cos_sin,
                          elem *out) {
    if (norm) FN(norm_row)(x, norm, out, op->size, op->eps);
    FN(rope_row)(norm ? out : x, cos_sin, out, op->size, op->interleaved);
}

static void FN(heads_item)(void *argument, long item) {
    const struct FN(heads) *op = argument;
    long end = min_long(op->rows, (item + 1) * ROWS_PER_ITEM);
    for (long row = item * ROWS_PER_ITEM; row < end; row++) {
        const elem *x = op->qkv + row * op->row_stride;
        const float *cos_sin = op->cos_sin + op->positions[row] * op->size;
        for (long head = 0; head < op->q_heads; head++, x += op->size)
            FN(take_head)(op, x, op->q_norm, cos_sin, op->q + (row * op->q_heads + head) * op->size);
        if (op->slots[row] < 0) continue;
        long page = op->slots[row] / op->page_size, slot = op->slots[row] % op->page_size;
        elem *key = op->keys + page * op->key_page + slot * op->key_slot;
        elem *value = op->values + page * op->value_page + slot * op->value_slot;
        for (long head = 0; head < op->kv_heads; head++, x += op->size)
            FN(take_head)(op, x, op->k_norm, cos_sin, key + head * op->key_head);
        for (long head = 0; head < op->kv_heads; head++, x += op->size)
            memcpy(value + head * op->value_head, x, (size_t)op->size * sizeof(elem));
    }
}

/* qkv [rows, q_heads + 2 * kv_heads, size]: queries, normed (unless q_norm is NULL) and rotated, to q; keys likewise
 * and values to the cache at flat slots, -1 skipped. sizes: rows, query heads, KV heads, size, row stride of qkv, page
 * size. strides: key page, slot, head; value page, slot, head. */
void FN(moeserve_take_heads)(const elem *qkv, const elem *q_norm, const elem *k_norm, const int64_t *positions,
                             const int64_t *slots, const float *cos_sin, elem *q, elem *keys, elem *values,
                             const int64_t *sizes, const int64_t *strides, float eps, int interleaved, int threads) {
    struct FN(heads) op = {
        .qkv = qkv, .q_norm = q_norm, .k_norm = k_norm, .positions = positions, .slots = slots, .cos_sin = cos_sin,
        .q = q, .keys = keys, .values = values,
        .rows = sizes[0], .q_heads = sizes[1], .kv_heads = sizes[2], .size = sizes[3], .row_stride = sizes[4],
        .page_size = sizes[5],
        .key_page = strides[0], .key_slot = strides[1], .key_head = strides[2],
        .value_page = strides[3], .value_slot = strides[4], .value_head = strides[5],
        .eps = eps, .interleaved = interleaved,
    };
    for_each_item(ceil_div(op.rows, ROWS_PER_ITEM),
                  FN(threads_for)(op.rows * (op.q_heads + op.kv_heads) * op.size, threads), FN(heads_item), &op);
}

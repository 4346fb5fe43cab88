/* Causal attention over the paged cache, decode and prefill alike. Included once for each element type (elem, FN).
 *
 * An item is a tile of up to QUERY_ROWS (token, head) rows of one sequence that share a KV head. Context is walked in
 * segments of SEGMENT keys, cut at fixed positions: each has its own softmax, and the partial results are merged in
 * order. So a token's result is the same bits whether it came by decode, by a whole prefill or by a chunk of one.
 */

#define QUERY_ROWS 16
#define SEGMENT 256
#define VALUE_ROWS 4     /* rows and vectors of the register tile that sums values */
#define VALUE_VECTORS 4

struct FN(attention) {
    const elem *q, *keys, *values;
    elem *out;
    const int32_t *query_start, *context_len, *page_table;
    long kv_heads, group, size, value_size, page_size, page_table_stride;
    long q_row, q_head;                       /* strides, in elements */
    long key_page, key_slot, key_head;
    long value_page, value_slot, value_head;
    long window;                              /* 0: none */
    float scale;
    const int32_t (*tiles)[2];                /* (sequence, first row) */
    long num_tiles;
};

/* The state of one tile while its segments pass: merged sums of values, their shares' total and the largest score. */
struct FN(tile_state) {
    const elem *query[QUERY_ROWS];
    elem *out[QUERY_ROWS];
    long position[QUERY_ROWS];
    float best[QUERY_ROWS], total[QUERY_ROWS];
    long rows;
};

/* Turn the scores of keys first..first+n-1 of one row into shares exp(score - best); keys outside low..high-1 get 0.
 * Padded with zeros to a multiple of LANES. Returns the largest score, and the shares' sum in *total. */
INLINE float FN(softmax_row)(float *scores, long n, long low, long high, float scale, float *total) {
    vf largest = splat(-__builtin_inff()), lane, sum = {0};
    for (int i = 0; i < LANES; i++) lane[i] = (float)i;
    for (long i = 0; i < n; i += LANES) {
        vi seen = (lane >= (float)(low - i)) & (lane < (float)(high - i));
        vf score = choose(seen, load_f32(scores + i) * scale, splat(-__builtin_inff()));
        largest = max_vf(largest, score);
        store_f32(scores + i, score);
    }
    float best = max_lanes(largest);
    for (long i = 0; i < n; i += LANES) {
        vf share = exp_vf(load_f32(scores + i) - best);
        sum += share;
        store_f32(scores + i, share);
    }
    *total = sum_lanes(sum);
    return best;
}

/* sums[r][v] = sum over keys j of shares[r][j] * values[j], for a register tile of rows and vectors (constants after
 * inlining); the last vector holds `width` elements. */
INLINE void FN(value_tile)(const int rows, const int vectors, const float *shares, const elem *const *values,
                           long low, long high, long column, long width, float *sums, long sums_stride) {
    vf sum[VALUE_ROWS][VALUE_VECTORS] = {{{0}}};
    for (long j = low; j < high; j++) {
        const elem *value = values[j] + column;
        vf wide[VALUE_VECTORS];
        for (int v = 0; v < vectors - 1; v++) wide[v] = FN(load)(value + v * LANES);
        wide[vectors - 1] = FN(load_n)(value + (vectors - 1) * LANES, width);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf share = splat(shares[r * SEGMENT + j]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] = fma_vf(share, wide[v], sum[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) store_f32(sums + r * sums_stride + v * LANES, sum[r][v]);
}

INLINE void FN(value_rows)(const int rows, const float *shares, const elem *const *values, long low, long high,
                           long size, float *sums, long sums_stride) {
    long column = 0;
    for (; column + VALUE_VECTORS * LANES <= size; column += VALUE_VECTORS * LANES)
        FN(value_tile)(rows, VALUE_VECTORS, shares, values, low, high, column, LANES, sums + column, sums_stride);
    for (; column < size; column += LANES)
        FN(value_tile)(rows, 1, shares, values, low, high, column, min_long(LANES, size - column), sums + column,
                       sums_stride);
}

static void FN(sum_values)(long rows, const float *shares, const elem *const *values, long low, long high, long size,
                           float *sums, long sums_stride) {
    long row = 0;
    for (; row + VALUE_ROWS <= rows; row += VALUE_ROWS)
        FN(value_rows)(VALUE_ROWS, shares + row * SEGMENT, values, low, high, size, sums + row * sums_stride,
                       sums_stride);
    for (; row < rows; row++)
        FN(value_rows)(1, shares + row * SEGMENT, values, low, high, size, sums + row * sums_stride, sums_stride);
}

/* merged = merged * keep + part * add, over whole vectors. */
INLINE void FN(merge_row)(float *merged, const float *part, long size, float keep, float add) {
    for (long i = 0; i < size; i += LANES)
        store_f32(merged + i, load_f32(merged + i) * keep + load_f32(part + i) * add);
}

/* Pointers to the keys and values of positions first..first+n-1 of a sequence, for one KV head. */
INLINE void FN(find_rows)(const struct FN(attention) *op, const int32_t *pages, long head, long first, long n,
                          const elem **keys, const elem **values) {
    long page = first / op->page_size, slot = first % op->page_size;
    for (long j = 0; j < n; j++) {
        keys[j] = op->keys + pages[page] * op->key_page + slot * op->key_slot + head * op->key_head;
        values[j] = op->values + pages[page] * op->value_page + slot * op->value_slot + head * op->value_head;
        if (++slot == op->page_size) slot = 0, page++;
    }
}

/* First position that a token at `position` sees. */
INLINE long FN(window_start)(const struct FN(attention) *op, long position) {
    return op->window ? max_long(0, position - op->window + 1) : 0;
}

static void FN(attend_segment)(const struct FN(attention) *op, struct FN(tile_state) *tile, const int32_t *pages,
                               long head, long segment, float *merged) {
    const elem *keys[SEGMENT], *values[SEGMENT];
    float scores[QUERY_ROWS * SEGMENT];
    long padded_size = ceil_div(op->value_size, LANES) * LANES;
    float *part = merged + QUERY_ROWS * padded_size;
    /* Rows are in order of position: the first reaches back farthest, the last sees the newest key. */
    long start = max_long(segment, FN(window_start)(op, tile->position[0]));
    long end = min_long(segment + SEGMENT, tile->position[tile->rows - 1] + 1);
    long low = start - segment, high = end - segment, aligned = low / TILE_COLUMNS * TILE_COLUMNS;
    long padded = ceil_div(high, LANES) * LANES;
    FN(find_rows)(op, pages, head, start, end - start, keys + low, values + low);
    for (long j = aligned; j < low; j++) keys[j] = keys[low];
    FN(dot_block)(tile->query, tile->rows, keys + aligned, FN(pad_columns)(keys + aligned, high - aligned), op->size,
                  scores + aligned, SEGMENT);
    float best[QUERY_ROWS], total[QUERY_ROWS];
    for (long r = 0; r < tile->rows; r++)
        best[r] = FN(softmax_row)(scores + r * SEGMENT, padded, FN(window_start)(op, tile->position[r]) - segment,
                                  tile->position[r] + 1 - segment, op->scale, total + r);
    FN(sum_values)(tile->rows, scores, values, low, high, op->value_size, part, padded_size);
    for (long r = 0; r < tile->rows; r++) {
        if (best[r] == -__builtin_inff()) continue;  /* this row sees nothing here */
        float newest = best[r] > tile->best[r] ? best[r] : tile->best[r];
        float keep = __builtin_expf(tile->best[r] - newest), add = __builtin_expf(best[r] - newest);
        FN(merge_row)(merged + r * padded_size, part + r * padded_size, padded_size, keep, add);
        tile->total[r] = tile->total[r] * keep + total[r] * add;
        tile->best[r] = newest;
    }
}

static void FN(attention_item)(void *argument, long item) {
    const struct FN(attention) *op = argument;
    long head = item % op->kv_heads;
    const int32_t *which = op->tiles[op->num_tiles - 1 - item / op->kv_heads];  /* a prefill's longest rows first */
    long sequence = which[0], first = which[1], query = op->query_start[sequence];
    long count = op->query_start[sequence + 1] - query, context = op->context_len[sequence];
    long heads = op->kv_heads * op->group, padded_size = ceil_div(op->value_size, LANES) * LANES;
    const int32_t *pages = op->page_table + sequence * op->page_table_stride;
    float merged[2 * QUERY_ROWS * padded_size];
    struct FN(tile_state) tile = {.rows = min_long(QUERY_ROWS, count * op->group - first)};
    memset(merged, 0, sizeof merged);
    for (long r = 0; r < tile.rows; r++) {
        long token = (first + r) / op->group, q_head = head * op->group + (first + r) % op->group;
        tile.query[r] = op->q + (query + token) * op->q_row + q_head * op->q_head;
        tile.out[r] = op->out + ((query + token) * heads + q_head) * op->value_size;
        tile.position[r] = context - count + token;
        tile.best[r] = -__builtin_inff();
    }
    long oldest = FN(window_start)(op, tile.position[0]), newest = tile.position[tile.rows - 1];
    for (long segment = oldest / SEGMENT * SEGMENT; segment <= newest; segment += SEGMENT)
        FN(attend_segment)(op, &tile, pages, head, segment, merged);
    for (long r = 0; r < tile.rows; r++)
        for (long i = 0; i < op->value_size; i += LANES)
            FN(store_n)(tile.out[r] + i, load_f32(merged + r * padded_size + i) / tile.total[r], op->value_size - i);
}

#define SLOWER_THAN_LINEAR 5  /* a multiply-add here: few rows a key, and the exponentials between two products */

/* See reference.py for the meaning. strides: q row, head; key page, slot, head; value page, slot, head. sizes: rows
 * of q, sequences, KV heads, query heads a KV head, D, Dv, page size, stride of the page table, window or 0. */
int FN(moeserve_paged_attention)(const elem *q, const elem *keys, const elem *values, elem *out,
                                 const int32_t *query_start, const int32_t *context_len, const int32_t *page_table,
                                 const int64_t *strides, const int64_t *sizes, float scale, int threads) {
    struct FN(attention) op = {
        .q = q, .keys = keys, .values = values, .out = out,
        .query_start = query_start, .context_len = context_len, .page_table = page_table,
        .q_row = strides[0], .q_head = strides[1],
        .key_page = strides[2], .key_slot = strides[3], .key_head = strides[4],
        .value_page = strides[5], .value_slot = strides[6], .value_head = strides[7],
        .kv_heads = sizes[2], .group = sizes[3], .size = sizes[4], .value_size = sizes[5], .page_size = sizes[6],
        .page_table_stride = sizes[7], .window = sizes[8], .scale = scale,
    };
    long rows = sizes[0], sequences = sizes[1], used = query_start[sequences];
    long most = used * op.group / QUERY_ROWS + sequences;
    int32_t(*tiles)[2] = scratch((size_t)(most + 1) * sizeof *tiles);
    if (!tiles) return -1;
    long cached = 0, pairs = 0;  /* tokens read, and (query, token) pairs at most */
    for (long sequence = 0; sequence < sequences; sequence++) {
        long count = (query_start[sequence + 1] - query_start[sequence]) * op.group;
        cached += context_len[sequence];
        pairs += count * context_len[sequence];
        for (long first = 0; first < count; first += QUERY_ROWS) {
            tiles[op.num_tiles][0] = (int32_t)sequence;
            tiles[op.num_tiles++][1] = (int32_t)first;
        }
    }
    op.tiles = (const int32_t(*)[2])tiles;
    long row_size = op.kv_heads * op.group * op.value_size;
    memset(out + used * row_size, 0, (size_t)((rows - used) * row_size) * sizeof(elem));
    long elements = op.kv_heads * (op.size + op.value_size);
    for_each_item(op.num_tiles * op.kv_heads,
                  worth(cached * elements * (long)sizeof(elem), SLOWER_THAN_LINEAR * pairs * elements, threads),
                  FN(attention_item), &op);
    return 0;
}

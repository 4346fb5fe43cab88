/* Dot products of rows with rows: the heart of linear, of the experts and of attention scores.
 * Included once for each element type (elem, FN).
 *
 * Both operands are rows along K, as checkpoints store weights. Every product keeps LANES partial sums over K in
 * ascending order and adds them up by sum_lanes_4: the value of (row, column) is the same bits whatever other rows
 * and columns are computed with it.
 */

#define TILE_ROWS 6
#define TILE_COLUMNS 4
#define NEAR_BYTES 16384     /* of rows: stay in the first-level cache */
#define PREFETCH_BYTES 8192  /* how far ahead of use weights are asked for */

#if ELEM_IS_BF16 && defined(USE_AVX512_BF16)
typedef __m512bh FN(chunk);
#define STEP 32

INLINE FN(chunk) FN(load_chunk)(const elem *p) { return (__m512bh)_mm512_loadu_si512(p); }

INLINE vf FN(multiply_add)(FN(chunk) a, FN(chunk) b, vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
typedef vf FN(chunk);
#define STEP LANES

INLINE FN(chunk) FN(load_chunk)(const elem *p) { return FN(load)(p); }

INLINE vf FN(multiply_add)(FN(chunk) a, FN(chunk) b, vf sum) { return fma_vf(a, b, sum); }
#endif

/* Weights are asked for ahead of use in the order of their addresses, not in that of the columns' interleaved walk: the
 * memory then delivers two to three times as much. Past the end of a block lies the next one, which comes next.
 *
 * out[r * out_stride + c] = a[r] . b[c] for `rows` rows (a constant after inlining) and TILE_COLUMNS columns. */
INLINE void FN(dot_tile)(const int rows, const elem *const *a, const elem *const *b, long k, float *out,
                         long out_stride) {
    vf sum[TILE_ROWS][TILE_COLUMNS] = {{{0}}};
    const elem *column[TILE_COLUMNS], *row[TILE_ROWS];
    for (int c = 0; c < TILE_COLUMNS; c++) column[c] = b[c];
    for (int r = 0; r < rows; r++) row[r] = a[r];
    long i = 0;
    for (; i + STEP <= k; i += STEP) {
        FN(chunk) weight[TILE_COLUMNS];
        for (int c = 0; c < TILE_COLUMNS; c++) {
            weight[c] = FN(load_chunk)(column[c] + i);
            const elem *ahead = column[0] + PREFETCH_BYTES / sizeof(elem) + TILE_COLUMNS * i + c * STEP;
            if (rows == 1)
                __builtin_prefetch(ahead, 0, 3);
            else
                __builtin_prefetch(ahead, 0, 2);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            FN(chunk) value = FN(load_chunk)(row[r] + i);
#pragma GCC unroll 4
            for (int c = 0; c < TILE_COLUMNS; c++) sum[r][c] = FN(multiply_add)(value, weight[c], sum[r][c]);
        }
    }
    if (i < k) {
        elem row_end[TILE_ROWS][STEP] = {{0}}, column_end[TILE_COLUMNS][STEP] = {{0}};
        for (int r = 0; r < rows; r++) memcpy(row_end[r], row[r] + i, (size_t)(k - i) * sizeof(elem));
        for (int c = 0; c < TILE_COLUMNS; c++) memcpy(column_end[c], column[c] + i, (size_t)(k - i) * sizeof(elem));
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < TILE_COLUMNS; c++)
                sum[r][c] = FN(multiply_add)(FN(load_chunk)(row_end[r]), FN(load_chunk)(column_end[c]), sum[r][c]);
    }
    int done = 0;
    if (rows >= 4) sum_lanes_16((const vf(*)[TILE_COLUMNS])sum, out, out_stride), done = 4;
#pragma GCC unroll 3
    for (int r = done; r < rows; r++) sum_lanes_4(sum[r], out + r * out_stride);
}

static void FN(dot_rows)(int rows, const elem *const *a, const elem *const *b, long k, float *out, long out_stride) {
    switch (rows) {
    case 1: FN(dot_tile)(1, a, b, k, out, out_stride); break;
    case 2: FN(dot_tile)(2, a, b, k, out, out_stride); break;
    case 3: FN(dot_tile)(3, a, b, k, out, out_stride); break;
    case 4: FN(dot_tile)(4, a, b, k, out, out_stride); break;
    case 5: FN(dot_tile)(5, a, b, k, out, out_stride); break;
    default: FN(dot_tile)(TILE_ROWS, a, b, k, out, out_stride); break;
    }
}

/* Pad a list of n column pointers to whole tiles by repeating the last; their results are not used. */
INLINE long FN(pad_columns)(const elem **columns, long n) {
    while (n % TILE_COLUMNS) columns[n] = columns[n - 1], n++;
    return n;
}

/* out[r * out_stride + c] = a[r] . b[c] for m rows and n columns, n a multiple of TILE_COLUMNS. Of the two loops the
 * outer one walks what has to come from farther away: the columns while all rows fit in the first-level cache. */
static void FN(dot_block)(const elem *const *a, long m, const elem *const *b, long n, long k, float *out,
                          long out_stride) {
    long tiles = ceil_div(m, TILE_ROWS), width = m * k * (long)sizeof(elem) <= NEAR_BYTES ? TILE_COLUMNS : n;
    for (long block = 0; block < n; block += width)
        for (long t = 0, first = 0; t < tiles; t++) {
            int rows = (int)((m - first) / (tiles - t));  /* near equal tiles: 8 rows as 4 and 4, not 6 and 2 */
            for (long c = block; c < block + width; c += TILE_COLUMNS)
                FN(dot_rows)(rows, a + first, b + c, k, out + first * out_stride + c, out_stride);
            first += rows;
        }
}

/* --- linear ------------------------------------------------------------------------------------------------- */

#define BLOCK_ROWS 48
#define BLOCK_COLUMNS 64
#define BLOCK_BYTES 131072  /* of weights: stays in the second-level cache while rows pass by */

/* Columns of weights of `k` elements that one item works on. */
INLINE long FN(block_columns)(long k) {
    long fit = BLOCK_BYTES / (k * (long)sizeof(elem)) / TILE_COLUMNS * TILE_COLUMNS;
    return max_long(8, min_long(fit, BLOCK_COLUMNS));
}

struct FN(linear) {
    const elem *x, *weight, *bias;
    elem *out;
    long rows, columns, k, heads, x_row, x_head, columns_per_item, row_blocks, column_blocks;
};

static void FN(linear_item)(void *argument, long item) {
    const struct FN(linear) *op = argument;
    const elem *a[BLOCK_ROWS], *b[BLOCK_COLUMNS];
    float sums[BLOCK_ROWS * BLOCK_COLUMNS];
    long row = item % op->row_blocks * BLOCK_ROWS, blocks = item / op->row_blocks;
    long column = blocks % op->column_blocks * op->columns_per_item, head = blocks / op->column_blocks;
    long m = min_long(BLOCK_ROWS, op->rows - row), n = min_long(op->columns_per_item, op->columns - column);
    for (long r = 0; r < m; r++) a[r] = op->x + (row + r) * op->x_row + head * op->x_head;
    for (long c = 0; c < n; c++) b[c] = op->weight + (head * op->columns + column + c) * op->k;
    FN(dot_block)(a, m, b, FN(pad_columns)(b, n), op->k, sums, BLOCK_COLUMNS);
    for (long r = 0; r < m; r++) {
        elem *out = op->out + ((row + r) * op->heads + head) * op->columns + column;
        for (long c = 0; c < n; c += LANES) {
            vf value = load_f32(sums + r * BLOCK_COLUMNS + c);
            if (op->bias) value += FN(load_n)(op->bias + column + c, n - c);
            FN(store_n)(out + c, value, n - c);
        }
    }
}

/* A matrix a head: x [rows, heads, k] of the given strides, weight [heads, columns, k], bias [columns] (of one head)
 * or NULL -> out [rows, heads, columns]. */
void FN(moeserve_linear)(const elem *x, const elem *weight, const elem *bias, elem *out, long rows, long heads,
                         long columns, long k, long x_row, long x_head, int threads) {
    struct FN(linear) op = {x, weight, bias, out, rows, columns, k, heads, x_row, x_head, FN(block_columns)(k), 0, 0};
    op.row_blocks = ceil_div(rows, BLOCK_ROWS);
    op.column_blocks = ceil_div(columns, op.columns_per_item);
    long weights = heads * columns * k;
    for_each_item(op.row_blocks * op.column_blocks * heads,
                  worth(weights * (long)sizeof(elem), rows * weights, threads), FN(linear_item), &op);
}

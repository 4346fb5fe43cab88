/* SwiGLU experts over rows sorted by slot: each expert's weights are read once a call, whatever the batch.
 * Included once for each element type (elem, FN).
 *
 * Two passes, shared by both ops: hidden = silu(gate) * up, then down. A pass is cut into items of (a panel: up to
 * BLOCK_ROWS rows of one slot) x (a block of columns).
 */

struct FN(panel) {
    long slot, first, rows;
};

struct FN(experts) {
    const elem *gate_up, *down;  /* [S, 2F, H], [S, H, F] */
    const elem **rows;           /* [N] in slot order */
    elem **targets;              /* [N], where each row's result goes */
    elem *hidden;                /* [N, F] */
    struct FN(panel) *panels;
    long num_panels, size, inner, columns_per_item;
};

/* hidden columns of one panel: gate and up of the same columns, so that the product needs no second pass. */
static void FN(gate_up_item)(void *argument, long item) {
    const struct FN(experts) *op = argument;
    const elem *b[BLOCK_COLUMNS];
    float sums[BLOCK_ROWS * BLOCK_COLUMNS];
    long blocks = ceil_div(op->inner, op->columns_per_item), column = item % blocks * op->columns_per_item;
    const struct FN(panel) *panel = op->panels + item / blocks;
    long n = min_long(op->columns_per_item, op->inner - column);
    const elem *gate = op->gate_up + (panel->slot * 2 * op->inner + column) * op->size;
    for (long c = 0; c < n; c++) b[c] = gate + c * op->size;
    long up = FN(pad_columns)(b, n);
    for (long c = 0; c < n; c++) b[up + c] = gate + (op->inner + c) * op->size;
    FN(dot_block)(op->rows + panel->first, panel->rows, b, up + FN(pad_columns)(b + up, n), op->size, sums,
                  BLOCK_COLUMNS);
    for (long r = 0; r < panel->rows; r++) {
        elem *out = op->hidden + (panel->first + r) * op->inner + column;
        for (long c = 0; c < n; c += LANES) {
            const float *sum = sums + r * BLOCK_COLUMNS + c;
            vf product = silu_vf(load_n_f32(sum, n - c)) * load_n_f32(sum + up, n - c);
            FN(store_n)(out + c, product, n - c);
        }
    }
}

static void FN(down_item)(void *argument, long item) {
    const struct FN(experts) *op = argument;
    const elem *a[BLOCK_ROWS], *b[BLOCK_COLUMNS];
    float sums[BLOCK_ROWS * BLOCK_COLUMNS];
    long blocks = ceil_div(op->size, op->columns_per_item), column = item % blocks * op->columns_per_item;
    const struct FN(panel) *panel = op->panels + item / blocks;
    long n = min_long(op->columns_per_item, op->size - column);
    const elem *down = op->down + (panel->slot * op->size + column) * op->inner;
    for (long c = 0; c < n; c++) b[c] = down + c * op->inner;
    for (long r = 0; r < panel->rows; r++) a[r] = op->hidden + (panel->first + r) * op->inner;
    FN(dot_block)(a, panel->rows, b, FN(pad_columns)(b, n), op->inner, sums, BLOCK_COLUMNS);
    for (long r = 0; r < panel->rows; r++)
        for (long c = 0; c < n; c += LANES)
            FN(store_n)(op->targets[panel->first + r] + column + c, load_n_f32(sums + r * BLOCK_COLUMNS + c, n - c),
                        n - c);
}

/* Cut every slot's rows (counts[s] of them, in slot order) into panels and run both passes. */
static void FN(run_experts)(struct FN(experts) *op, const int64_t *counts, long slots, int threads) {
    long first = 0, active = 0, weights = op->inner * op->size;
    op->num_panels = 0;
    for (long slot = 0; slot < slots; slot++) {
        long left = counts[slot];
        active += left > 0;
        for (long pieces = ceil_div(left, BLOCK_ROWS); pieces > 0; pieces--) {
            long rows = ceil_div(left, pieces);
            op->panels[op->num_panels++] = (struct FN(panel)){slot, first, rows};
            first += rows, left -= rows;
        }
    }
    op->columns_per_item = FN(block_columns)(op->size) / 2 / TILE_COLUMNS * TILE_COLUMNS;
    for_each_item(op->num_panels * ceil_div(op->inner, op->columns_per_item),
                  worth(active * 2 * weights * (long)sizeof(elem), first * 2 * weights, threads), FN(gate_up_item), op);
    op->columns_per_item = FN(block_columns)(op->inner);
    for_each_item(op->num_panels * ceil_div(op->size, op->columns_per_item),
                  worth(active * weights * (long)sizeof(elem), first * weights, threads), FN(down_item), op);
}

/* rows [N, size] sorted by slot, counts int64 [slots] summing to N at most -> out [N, size]. Returns 0, -1 for want
 * of memory, -2 when the counts promise more rows than there are. */
int FN(moeserve_grouped_experts)(const elem *rows, const int64_t *counts, const elem *gate_up, const elem *down,
                                 elem *out, long num_rows, long slots, long size, long inner, int threads) {
    long promised = 0;
    for (long slot = 0; slot < slots; slot++) promised += counts[slot];
    if (promised > num_rows) return -2;
    size_t n = (size_t)num_rows, panels = n / BLOCK_ROWS + (size_t)min_long(num_rows, slots) + 1;
    char *block = scratch(n * (size_t)inner * sizeof(elem) + n * 16 + panels * sizeof(struct FN(panel)) + 256);
    if (!block) return -1;
    struct FN(experts) op = {.gate_up = gate_up, .down = down, .size = size, .inner = inner};
    op.hidden = carve(&block, n * (size_t)inner * sizeof(elem));
    op.rows = carve(&block, n * sizeof *op.rows);
    op.targets = carve(&block, n * sizeof *op.targets);
    op.panels = carve(&block, panels * sizeof *op.panels);
    for (long i = 0; i < num_rows; i++) {
        op.rows[i] = rows + i * size;
        op.targets[i] = out + i * size;
    }
    FN(run_experts)(&op, counts, slots, threads);
    return 0;
}

/* --- fused_experts ------------------------------------------------------------------------------------------ */

#define CHUNK_BYTES (64l << 20)  /* of scratch for the rows of one round */

struct FN(weighted_sum) {
    const elem *rows;  /* [tokens * choices, size] */
    const int64_t *slots;
    const float *weights;
    elem *out;
    long tokens, choices, size, num_slots;
};

/* out[t] = sum over k, in order, of weights[t, k] * rows[t, k]. */
static void FN(weighted_sum_item)(void *argument, long item) {
    const struct FN(weighted_sum) *op = argument;
    long end = min_long(op->tokens, (item + 1) * ROWS_PER_ITEM);
    for (long token = item * ROWS_PER_ITEM; token < end; token++) {
        for (long i = 0; i < op->size; i += LANES) {
            vf total = {0};
            for (long k = token * op->choices; k < (token + 1) * op->choices; k++)
                if (op->slots[k] >= 0 && op->slots[k] < op->num_slots)
                    total += splat(op->weights[k]) * FN(load_n)(op->rows + k * op->size + i, op->size - i);
            FN(store_n)(op->out + token * op->size + i, total, op->size - i);
        }
    }
}

/* One round of at most as many tokens as the scratch was made for. */
static void FN(fused_round)(struct FN(experts) *op, const elem *x, const struct FN(weighted_sum) *sum, elem *results,
                            int64_t *counts, int64_t *next, int threads) {
    long pairs = sum->tokens * sum->choices;
    memset(counts, 0, (size_t)sum->num_slots * sizeof *counts);
    for (long i = 0; i < pairs; i++)
        if (sum->slots[i] >= 0 && sum->slots[i] < sum->num_slots) counts[sum->slots[i]]++;
    for (long slot = 0, start = 0; slot < sum->num_slots; slot++) next[slot] = start, start += counts[slot];
    for (long i = 0; i < pairs; i++) {
        if (sum->slots[i] < 0 || sum->slots[i] >= sum->num_slots) continue;
        long place = next[sum->slots[i]]++;
        op->rows[place] = x + i / sum->choices * op->size;
        op->targets[place] = results + i * op->size;
    }
    FN(run_experts)(op, counts, sum->num_slots, threads);
    for_each_item(ceil_div(sum->tokens, ROWS_PER_ITEM), FN(threads_for)(pairs * op->size, threads),
                  FN(weighted_sum_item), (void *)sum);
}

/* x [tokens, size], slots int64 and weights float [tokens, choices] -> out [tokens, size]. A slot outside
 * 0..num_slots-1 contributes nothing. Returns 0, or -1 for want of memory. */
int FN(moeserve_fused_experts)(const elem *x, const int64_t *slots, const float *weights, const elem *gate_up,
                               const elem *down, elem *out, long tokens, long choices, long num_slots, long size,
                               long inner, int threads) {
    long token_bytes = choices * (size + inner) * (long)sizeof(elem);
    long round = min_long(tokens, max_long(64, CHUNK_BYTES / token_bytes));
    size_t n = (size_t)(round * choices), panels = n / BLOCK_ROWS + (size_t)min_long((long)n, num_slots) + 1;
    char *block = scratch((size_t)(round * token_bytes) + n * 16 + panels * sizeof(struct FN(panel)) +
                          (size_t)num_slots * 16 + 512);
    if (!block) return -1;
    struct FN(experts) op = {.gate_up = gate_up, .down = down, .size = size, .inner = inner};
    elem *results = carve(&block, n * (size_t)size * sizeof(elem));
    op.hidden = carve(&block, n * (size_t)inner * sizeof(elem));
    op.rows = carve(&block, n * sizeof *op.rows);
    op.targets = carve(&block, n * sizeof *op.targets);
    op.panels = carve(&block, panels * sizeof *op.panels);
    int64_t *counts = carve(&block, (size_t)num_slots * sizeof *counts);
    int64_t *next = carve(&block, (size_t)num_slots * sizeof *next);
    for (long first = 0; first < tokens; first += round) {
        struct FN(weighted_sum) sum = {results, slots + first * choices, weights + first * choices,
                                       out + first * size, min_long(round, tokens - first), choices, size,
                                       num_slots};
        FN(fused_round)(&op, x + first * size, &sum, results, counts, next, threads);
    }
    return 0;
}

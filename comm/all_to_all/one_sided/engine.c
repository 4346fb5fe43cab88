/* The CPU engine's inner loops: rows into peers' blocks, words that say so, rows out again, and the sum.
 *
 * `ep` is the array that cpu_engine.py writes: sizes and byte offsets of EpLayout, then the address of every rank's
 * block. Who may write what and when: layout.py and cpu_engine.py. All results equal plain.py's, bit by bit.
 */
#include <stdint.h>
#include <string.h>
#include <time.h>

enum {
    RANKS, RANK, SLOTS, TOP_K, ROW_BITS, ROW_BYTES, SCALE_AT, SCALE_BYTES, RESULT_BYTES, MAIL, DONE, COUNTS, COUNTS_PARITY,
    COUNTS_RANK, META, META_RANK, META_ROW, META_TOKEN, META_VERSION, META_SLOTS, X, X_RANK, X_ROW, Z, Z_CELL, BASES
};

#define BLOCK_OF(r) ((char *)(intptr_t)ep[BASES + (r)])
#define MIN(a, b) ((a) < (b) ? (a) : (b))

static void publish(char *word, int64_t value) { __atomic_store_n((int64_t *)word, value, __ATOMIC_RELEASE); }

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Puts each token's row once into the block of every rank that holds one of its slots, then the mail words.
 *
 * x, scales: [tokens] rows of ROW_BYTES and SCALE_BYTES. slots [tokens, K]: -1, or a slot of a rank; those of ranks
 * with alive[r] = 0 are skipped. first: number of the first token's z cells. counts: scratch [R, S]; sent: rows put
 * to each rank [R]. -> -1, and nothing done, for a slot that no rank has; else 0. */
int ep_put(const int64_t *ep, int64_t epoch, int64_t tokens, const char *x, const char *scales, const int64_t *slots,
            const uint8_t *alive, int64_t first, int64_t version, int32_t *counts, int64_t *sent) {
    const int64_t ranks = ep[RANKS], me = ep[RANK], each = ep[SLOTS], top_k = ep[TOP_K];
    for (int64_t c = 0; c < tokens * top_k; c++) {
        if (slots[c] >= ranks * each) return -1;
    }
    memset(counts, 0, sizeof(int32_t) * (size_t)(ranks * each));
    memset(sent, 0, sizeof(int64_t) * (size_t)ranks);
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t *chosen = slots + t * top_k;
        for (int64_t k = 0; k < top_k; k++) {
            if (chosen[k] < 0) continue;
            const int64_t r = chosen[k] / each;
            if (!alive[r]) continue;
            int64_t before = 0;
            while (before < k && (chosen[before] < 0 || chosen[before] / each != r)) before++;
            if (before < k) continue; /* the row went there for an earlier choice */
            const int64_t i = sent[r]++;
            char *row = BLOCK_OF(r) + ep[X] + me * ep[X_RANK] + i * ep[X_ROW];
            memcpy(row, x + t * ep[ROW_BYTES], (size_t)ep[ROW_BYTES]);
            if (scales) memcpy(row + ep[SCALE_AT], scales + t * ep[SCALE_BYTES], (size_t)ep[SCALE_BYTES]);
            char *meta = BLOCK_OF(r) + ep[META] + me * ep[META_RANK] + i * ep[META_ROW];
            *(int32_t *)(meta + ep[META_TOKEN]) = (int32_t)(first + t);
            *(int16_t *)(meta + ep[META_VERSION]) = (int16_t)version;
            int16_t *local = (int16_t *)(meta + ep[META_SLOTS]);
            for (int64_t j = 0; j < top_k; j++) {
                const int there = chosen[j] >= 0 && chosen[j] / each == r;
                local[j] = there ? (int16_t)(chosen[j] - r * each) : -1;
                if (there) counts[r * each + local[j]]++;
            }
        }
    }
    for (int64_t i = 1; i <= ranks; i++) { /* each rank begins with its own right-hand neighbour */
        const int64_t r = (me + i) % ranks;
        if (!alive[r]) continue;
        memcpy(BLOCK_OF(r) + ep[COUNTS] + (epoch & 1) * ep[COUNTS_PARITY] + me * ep[COUNTS_RANK], counts + r * each,
               sizeof(int32_t) * (size_t)each);
        publish(BLOCK_OF(r) + ep[MAIL] + ((epoch & 1) * ranks + me) * 8, epoch << ep[ROW_BITS] | sent[r]);
    }
    return 0;
}

/* Waits until the word of every rank with pending[r] = 1 shows `epoch` above its lowest `bits`, and clears
 * pending[r]; the lowest bits go to low[r].
 *
 * Spins for spin_ns, then sleeps sleep_ns at a time; gives up after limit_ns.
 * -> ranks still pending; -1 when a word is newer than epoch, as the others went on without us. */
int ep_wait(const int64_t *words, int64_t ranks, int64_t epoch, int64_t bits, uint8_t *pending, int64_t *low,
            int64_t spin_ns, int64_t sleep_ns, int64_t limit_ns) {
    int64_t start = 0;
    for (;;) {
        int left = 0;
        for (int64_t r = 0; r < ranks; r++) {
            if (!pending[r]) continue;
            const int64_t word = __atomic_load_n(words + r, __ATOMIC_ACQUIRE);
            if (word >> bits > epoch) return -1;
            if (word >> bits < epoch) {
                left++;
                continue;
            }
            pending[r] = 0;
            low[r] = word & ((1LL << bits) - 1);
        }
        if (!left) return 0;
        const int64_t now = now_ns();
        if (!start) start = now;
        if (now - start >= limit_ns) return left;
        if (now - start >= spin_ns) {
            const struct timespec pause = {0, sleep_ns};
            nanosleep(&pause, 0);
        }
    }
}

/* How many choices arrived: counts [R, S] of each source and slot, zeros for sources without rows; per_slot [S];
 * first [R, S]: where they begin when ordered by slot, then source. -> their number. */
int64_t ep_count(const int64_t *ep, int64_t epoch, const int64_t *rows, int64_t *counts, int64_t *per_slot,
                 int64_t *first) {
    const int64_t ranks = ep[RANKS], each = ep[SLOTS];
    const char *mine = BLOCK_OF(ep[RANK]) + ep[COUNTS] + (epoch & 1) * ep[COUNTS_PARITY];
    int64_t total = 0;
    for (int64_t s = 0; s < each; s++) {
        const int64_t before = total;
        for (int64_t source = 0; source < ranks; source++) {
            const int32_t *of_source = (const int32_t *)(mine + source * ep[COUNTS_RANK]);
            const int64_t count = rows[source] ? of_source[s] : 0;
            counts[source * each + s] = count;
            first[source * each + s] = total;
            total += count;
        }
        per_slot[s] = total - before;
    }
    return total;
}

/* Copies the rows that arrived out of the block.
 *
 * rows: of each source [R]. next: where the rows of each source and slot go in the result [R, S], moved on.
 * -> x_out [N] rows, scales_out [N] if the rows have scales; origin [N, 2]: source rank, z cell.
 * -> records whose table version is another than ours. */
int64_t ep_take(const int64_t *ep, const int64_t *rows, int64_t version, int64_t *next, char *x_out, char *scales_out,
                int64_t *origin) {
    const int64_t top_k = ep[TOP_K], bytes = ep[ROW_BYTES];
    const char *mine = BLOCK_OF(ep[RANK]);
    int64_t others = 0;
    for (int64_t source = 0; source < ep[RANKS]; source++) {
        for (int64_t i = 0; i < rows[source]; i++) {
            const char *row = mine + ep[X] + source * ep[X_RANK] + i * ep[X_ROW];
            const char *meta = mine + ep[META] + source * ep[META_RANK] + i * ep[META_ROW];
            const int16_t *local = (const int16_t *)(meta + ep[META_SLOTS]);
            const int64_t token = *(const int32_t *)(meta + ep[META_TOKEN]);
            others += *(const int16_t *)(meta + ep[META_VERSION]) != (int16_t)version;
            for (int64_t k = 0; k < top_k; k++) {
                if (local[k] < 0) continue;
                const int64_t n = next[source * ep[SLOTS] + local[k]]++;
                memcpy(x_out + n * bytes, row, (size_t)bytes);
                if (scales_out) memcpy(scales_out + n * ep[SCALE_BYTES], row + ep[SCALE_AT], (size_t)ep[SCALE_BYTES]);
                origin[2 * n] = source;
                origin[2 * n + 1] = token * top_k + k;
            }
        }
    }
    return others;
}

/* Copies those results of y [N] whose z cells lie in [low, high) into the blocks of their sources, at cell - low,
 * and tells every rank with tell[r] = 1 that they are there. origin: as ep_take gave it. */
void ep_push(const int64_t *ep, int64_t epoch, int64_t n, const char *y, const int64_t *origin, int64_t low,
             int64_t high, const uint8_t *tell) {
    const int64_t bytes = ep[RESULT_BYTES], ranks = ep[RANKS], me = ep[RANK];
    for (int64_t i = 0; i < n; i++) {
        const int64_t r = origin[2 * i], cell = origin[2 * i + 1];
        if (cell < low || cell >= high) continue;
        memcpy(BLOCK_OF(r) + ep[Z] + (cell - low) * ep[Z_CELL], y + i * bytes, (size_t)bytes);
    }
    for (int64_t i = 1; i <= ranks; i++) {
        const int64_t r = (me + i) % ranks;
        if (tell[r]) publish(BLOCK_OF(r) + ep[DONE] + me * 8, epoch);
    }
}

static inline float from_bfloat16(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bfloat16(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#define PART 1024 /* elements of a row at a time: the sums stay in the first-level cache */
#define AS_IS(value) (value)
#define SUM(name, type, LOAD, STORE)                                                                             \
    void name(const int64_t *ep, int64_t tokens, int64_t first, const int64_t *slots, const float *weights,     \
              const uint8_t *alive, int64_t width, type *out) {                                                  \
        const int64_t top_k = ep[TOP_K];                                                                         \
        const char *z = BLOCK_OF(ep[RANK]) + ep[Z] + first * top_k * ep[Z_CELL];                                  \
        float total[PART];                                                                                       \
        for (int64_t t = 0; t < tokens; t++) {                                                                   \
            for (int64_t start = 0; start < width; start += PART) {                                              \
                const int64_t count = MIN(width - start, PART);                                                  \
                type *target = out + t * width + start;                                                          \
                for (int64_t h = 0; h < count; h++) total[h] = 0.0f;                                             \
                for (int64_t c = t * top_k; c < (t + 1) * top_k; c++) {                                          \
                    if (slots[c] < 0 || !alive[slots[c] / ep[SLOTS]]) continue;                                  \
                    const type *row = (const type *)(z + c * ep[Z_CELL]) + start;                                \
                    const float weight = weights[c];                                                             \
                    for (int64_t h = 0; h < count; h++) total[h] += weight * LOAD(row[h]);                       \
                }                                                                                                \
                for (int64_t h = 0; h < count; h++) target[h] = STORE(total[h]);                                 \
            }                                                                                                    \
        }                                                                                                        \
    }

/* out [tokens, width]: the sum over choices, in order, of weight * z cell, in float32; choices without a slot and
 * those of ranks with alive[r] = 0 count nothing. */
SUM(ep_sum_float32, float, AS_IS, AS_IS)
SUM(ep_sum_bfloat16, uint16_t, from_bfloat16, to_bfloat16)

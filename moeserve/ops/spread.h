/* Shares each expert's tokens of one step among its replicas; see spread.py, whose whole numbers these are. */

#define SPREAD_UNIT 1024
#define SPREAD_SWEEPS 3
#define SPREAD_EXPERT_PHASE 583

struct spread {
    long tokens, top_k, num_experts, num_ranks, num_split, width;
    const int64_t *slot, *rank, *row, *expert, *num_hosts, *hosts, *host_slots;
};

/* The level of `load` poured over n hosts that stand at below[]; sorted has room for n. */
INLINE int64_t surface_of(const int64_t *below, int64_t *sorted, long n, int64_t load) {
    int64_t surface = INT64_MAX, sum = load;
    for (long i = 0; i < n; i++) {
        long at = i;
        for (; at > 0 && sorted[at - 1] > below[i]; at--) sorted[at] = sorted[at - 1];
        sorted[at] = below[i];
    }
    for (long i = 0; i < n; i++) {
        sum += sorted[i];
        int64_t mean = sum / (i + 1);
        if (mean > surface) break; /* from its lowest point on the mean only rises */
        surface = mean;
    }
    return surface;
}

INLINE void pour(const struct spread *op, long split, int64_t load, int64_t *levels, int64_t *poured,
                 int64_t *below, int64_t *sorted) {
    long n = op->num_hosts[split];
    const int64_t *hosts = op->hosts + split * op->width;
    for (long i = 0; i < n; i++) below[i] = levels[hosts[i]] - poured[i];
    int64_t surface = surface_of(below, sorted, n, load), rest = load;
    for (long i = 0; i < n; i++) {
        poured[i] = max_long(0, surface - below[i]);
        rest -= poured[i];
    }
    poured[0] += rest;
    for (long i = 0; i < n; i++) levels[hosts[i]] = below[i] + poured[i];
}

/* experts [tokens, top_k], valid [tokens] -> slots [tokens, top_k]. 0, or -1 when there is no memory. */
int moeserve_spread_tokens(const int64_t *experts, const uint8_t *valid, int64_t *slots, const struct spread *op,
                           long phase) {
    long cells = op->num_split * op->width;
    size_t numbers = (size_t)(op->num_experts + op->num_ranks + 1 + cells + op->num_split + 2 * op->width);
    int64_t *counts = scratch(numbers * sizeof *counts);
    if (!counts) return -1;
    memset(counts, 0, numbers * sizeof *counts);
    int64_t *levels = counts + op->num_experts, *poured = levels + op->num_ranks + 1, *next = poured + cells;
    int64_t *below = next + op->num_split, *sorted = below + op->width;
    for (long t = 0; t < op->tokens; t++)
        for (long k = 0; valid[t] && k < op->top_k; k++) counts[experts[t * op->top_k + k]]++;
    for (long e = 0; e < op->num_experts; e++)
        if (op->row[e] < 0) levels[op->rank[e]] += counts[e] * SPREAD_UNIT;
    for (long x = 0; x < op->num_split; x++) {
        int64_t load = counts[op->expert[x]] * SPREAD_UNIT, even = load / op->num_hosts[x];
        for (long i = 0; i < op->num_hosts[x]; i++) {
            int64_t part = i ? even : load - even * (op->num_hosts[x] - 1);
            poured[x * op->width + i] = part;
            levels[op->hosts[x * op->width + i]] += part;
        }
    }
    for (int sweep = 0; sweep < SPREAD_SWEEPS; sweep++)
        for (long x = 0; x < op->num_split; x++) {
            int64_t count = counts[op->expert[x]];
            if (count) pour(op, x, count * SPREAD_UNIT, levels, poured + x * op->width, below, sorted);
        }
    for (long x = 0; x < op->num_split; x++) { /* what was poured becomes the cuts */
        int64_t sum = (op->expert[x] * SPREAD_EXPERT_PHASE + phase) % SPREAD_UNIT;
        for (long i = 0; i < op->num_hosts[x]; i++) {
            sum += poured[x * op->width + i];
            poured[x * op->width + i] = sum / SPREAD_UNIT;
        }
    }
    for (long t = 0; t < op->tokens; t++)
        for (long k = 0; k < op->top_k; k++) {
            int64_t expert = experts[t * op->top_k + k], *slot = slots + t * op->top_k + k;
            if (!valid[t]) {
                *slot = -1;
            } else if (op->row[expert] < 0) {
                *slot = op->slot[expert];
            } else {
                long x = op->row[expert], host = 0;
                int64_t number = next[x]++;
                while (host + 1 < op->num_hosts[x] && number >= poured[x * op->width + host]) host++;
                *slot = op->host_slots[x * op->width + host];
            }
        }
    return 0;
}

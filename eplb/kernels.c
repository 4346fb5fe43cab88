/* The inner loops of the solvers, for all layers in a call. plain/ holds the same functions in numpy: both give
 * the same bits, so that a placement does not depend on whether a compiler was there. Build without contraction
 * of multiply and add and without reordered sums (see native.py).
 *
 * Letters: N layers, E experts, T windows, G ranks, K slots a rank, P = K * G slots. Slots are numbered slot-major
 * here, j * G + g, so that loops over ranks run through neighbouring memory. load [N][E][T] is scaled to a mean
 * rank load of 1 in each window.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CANDIDATES 24
#define LIMIT 1024.0f /* (1 + x / LIMIT) ^ LIMIT stands for exp(x): products only, the same bits everywhere */
#define FLOOR 0.92f   /* keeps the smallest power, 8e-38, a normal number */

static inline float power(float x) {
    float y = 1.0f + x * (1.0f / LIMIT);
    y = y > FLOOR ? y : FLOOR;
    for (int i = 0; i < 10; i++) y = y * y;
    return y;
}

static void *get(size_t count, size_t size) {
    void *found = calloc(count ? count : 1, size);
    if (!found) {
        fputs("eplb: out of memory\n", stderr);
        abort();
    }
    return found;
}

/* ------------------------------------------------------------------ loads */

/* windows [T][N][E] of any scale to load [N][E][T], mean [N][E] and std [N][E], with a mean rank load of 1 in each
 * window. A window without load counts as even. */
void eplb_prepare(int T, int N, int E, int G, const double *windows, float *load, double *mean, double *std) {
    double *sum = get(E, sizeof(double));
    for (int n = 0; n < N; n++) {
        double *m = mean + (size_t)n * E, *v = std + (size_t)n * E;
        float *out = load + (size_t)n * E * T;
        for (int e = 0; e < E; e++) m[e] = v[e] = 0.0;
        for (int t = 0; t < T; t++) {
            const double *row = windows + ((size_t)t * N + n) * E;
            double total = 0.0;
            for (int e = 0; e < E; e++) total += row[e];
            double scale = total > 0.0 ? (double)G / total : 0.0, even = total > 0.0 ? 0.0 : (double)G / (double)E;
            for (int e = 0; e < E; e++) {
                sum[e] = row[e] * scale + even;
                m[e] += sum[e];
            }
            for (int e = 0; e < E; e++) out[(size_t)e * T + t] = (float)sum[e];
        }
        for (int e = 0; e < E; e++) m[e] = m[e] / (double)T;
        for (int e = 0; e < E; e++) {
            double square = 0.0;
            for (int t = 0; t < T; t++) {
                double d = (double)out[(size_t)e * T + t] - m[e];
                square += d * d;
            }
            v[e] = sqrt(square / (double)T);
        }
    }
    free(sum);
}

/* ------------------------------------------------------------------ replicas */

/* count[e]: `least` replicas each, then one more at a time for the expert with the largest weight a replica. */
static void replicate(int E, int G, int P, int least, const float *weight, int32_t *count, float *each) {
    for (int e = 0; e < E; e++) count[e] = least, each[e] = weight[e] / (float)least;
    for (int left = P - E * least; left > 0; left--) {
        int best = -1;
        for (int e = 0; e < E; e++)
            if (count[e] < G && (best < 0 || each[e] > each[best])) best = e;
        if (best < 0) { /* every expert on every rank: doubles cannot be avoided */
            best = 0;
            for (int e = 1; e < E; e++)
                if (each[e] > each[best]) best = e;
        }
        count[best]++;
        each[best] = weight[best] / (float)count[best];
    }
}

void eplb_replicate(int N, int E, int G, int P, int least, const float *weight, int32_t *count) {
    float *each = get(E, sizeof(float));
    for (int n = 0; n < N; n++) replicate(E, G, P, least, weight + (size_t)n * E, count + (size_t)n * E, each);
    free(each);
}

/* ------------------------------------------------------------------ placing */

static int root(const int32_t *parent, int g) {
    while (parent[g] != g) g = parent[g];
    return g;
}

static void place(int E, int T, int G, int K, const float *load, const int32_t *count, const int32_t *order, float z,
                  int connect, int32_t *slots) {
    float *mean = get(G, sizeof(float)), *dev = get((size_t)T * G, sizeof(float));
    float *cost = get(G, sizeof(float)), *own = get(T, sizeof(float));
    int32_t *used = get(G, sizeof(int32_t)), *parent = get(G, sizeof(int32_t)), *size = get(G, sizeof(int32_t));
    int32_t *degree = get(G, sizeof(int32_t));
    uint8_t *holds = get(G, 1), *joined = get(G, 1);
    float inverse = 1.0f / (float)T;
    for (int g = 0; g < G; g++) parent[g] = g, size[g] = 1;
    for (int p = 0; p < K * G; p++) slots[p] = -1;
    for (int pass = connect ? 0 : 1; pass < 2; pass++)
        for (int n = 0; n < E; n++) {
            int e = order[n];
            if (connect && (count[e] > 1) == (pass == 1)) continue;
            float each = 0.0f;
            for (int t = 0; t < T; t++) own[t] = load[(size_t)e * T + t] / (float)count[e], each += own[t];
            each = each * inverse;
            for (int t = 0; t < T; t++) own[t] = own[t] - each;
            memset(holds, 0, G);
            memset(joined, 0, G);
            for (int c = 0; c < count[e]; c++) {
                if (pass == 1) {
                    for (int g = 0; g < G; g++) cost[g] = 0.0f;
                    for (int t = 0; t < T; t++) {
                        float step = own[t];
                        const float *row = dev + (size_t)t * G;
                        for (int g = 0; g < G; g++) cost[g] += (row[g] + step) * (row[g] + step);
                    }
                    for (int g = 0; g < G; g++) cost[g] = (mean[g] + each) + z * sqrtf(cost[g] * inverse);
                } else {
                    for (int g = 0; g < G; g++) {
                        int r = root(parent, g);
                        cost[g] = mean[g] + (float)(100 * degree[g]) + (joined[r] ? 1e8f : (float)(10000 * size[r]));
                    }
                }
                int best = -1;
                for (int g = 0; g < G; g++) {
                    if (used[g] >= K) continue;
                    if (holds[g]) cost[g] += 1e9f;
                    if (best < 0 || cost[g] < cost[best]) best = g;
                }
                slots[used[best]++ * G + best] = e;
                holds[best] = 1;
                mean[best] += each;
                for (int t = 0; t < T; t++) dev[(size_t)t * G + best] += own[t];
                if (pass == 0) joined[root(parent, best)] = 1, degree[best]++;
            }
            int first = -1;
            for (int g = 0; pass == 0 && g < G; g++) {
                if (!holds[g]) continue;
                if (first < 0) { first = g; continue; }
                int a = root(parent, first), b = root(parent, g);
                if (a != b) parent[b] = a, size[a] += size[b];
            }
        }
    free(mean), free(dev), free(cost), free(own), free(used), free(parent), free(size), free(degree);
    free(holds), free(joined);
}

/* Where an expert stands twice on a rank, swap one of the two for what another rank can give. */
static void part_doubles(int E, int G, int K, int32_t *slots) {
    int32_t *has = get((size_t)E * G, sizeof(int32_t));
    for (int p = 0; p < K * G; p++) has[(size_t)slots[p] * G + p % G]++;
    for (int p = 0; p < K * G; p++) {
        int e = slots[p], g = p % G;
        if (has[(size_t)e * G + g] < 2) continue;
        for (int q = 0; q < K * G; q++) {
            int x = slots[q], h = q % G;
            if (has[(size_t)e * G + h] || (has[(size_t)x * G + g] && has[(size_t)x * G + h] < 2)) continue;
            slots[p] = x, slots[q] = e;
            has[(size_t)e * G + g]--, has[(size_t)x * G + g]++, has[(size_t)e * G + h]++, has[(size_t)x * G + h]--;
            break;
        }
    }
    free(has);
}

/* Put the replicas of the experts, in the given order [N][E], on ranks: slots [N][K][G]. connect: first those of
 * replicated experts, so that ranks joined by a shared expert become one component; the others to the rank with
 * the least mean + z * std of its load over the windows. */
void eplb_place(int N, int E, int T, int G, int K, const float *load, const int32_t *count, const int32_t *order,
                float z, int connect, int32_t *slots) {
    for (int n = 0; n < N; n++) {
        int32_t *out = slots + (size_t)n * K * G;
        place(E, T, G, K, load + (size_t)n * E * T, count + (size_t)n * E, order + (size_t)n * E, z, connect, out);
        part_doubles(E, G, K, out);
    }
}

/* Number of components of the graph of ranks joined by a shared expert. */
static int components(int E, int G, int K, const int32_t *slots, const int32_t *count, int32_t *parent,
                      int32_t *first) {
    int left = G;
    for (int g = 0; g < G; g++) parent[g] = g;
    for (int e = 0; e < E; e++) first[e] = -1;
    for (int j = 0; j < K; j++)
        for (int g = 0; g < G; g++) {
            int e = slots[j * G + g];
            if (count[e] < 2) continue;
            if (first[e] < 0) { first[e] = g; continue; }
            int a = root(parent, first[e]), b = root(parent, g);
            if (a != b) parent[b] = a, left--;
        }
    return left;
}

/* The same for one layer, to be called from outside. */
int eplb_components(int E, int G, int K, const int32_t *slots, const int32_t *count) {
    int32_t *parent = get(G, 4), *first = get(E, 4);
    int found = components(E, G, K, slots, count, parent, first);
    free(parent), free(first);
    return found;
}

/* ------------------------------------------------------------------ improving under an even split */

typedef struct { float score; int kind, i, p; } Candidate; /* kind 0: swap, 1: a replica of i's expert into p */

static void offer(Candidate *list, int *n, float score, int kind, int i, int p) {
    if (*n == CANDIDATES && score >= list[CANDIDATES - 1].score) return;
    int at = *n < CANDIDATES ? (*n)++ : CANDIDATES - 1;
    while (at > 0 && list[at - 1].score > score) list[at] = list[at - 1], at--;
    list[at] = (Candidate){score, kind, i, p};
}

typedef struct { /* options of eplb_improve */
    float beta;       /* steepness of the penalty */
    float least_gain; /* smallest relative gain on the ranks concerned */
    int32_t rounds;   /* tries at most */
    int32_t patience; /* hottest ranks without a gain before giving up */
    int32_t budget;   /* changed slots at most, < 0: no limit */
    int32_t connect;  /* the number of components does not rise */
    int32_t reassign; /* redundant slots may go to another expert */
    int32_t least;    /* replicas that every expert keeps */
} Options;

typedef struct { /* one layer while it is improved */
    int E, T, G, K, P, parts, changed;
    Options o;
    float highest;
    const float *load;
    int32_t *count, *slots;
    const int32_t *node;
    float *L, *R;              /* [G][T] rank loads and their penalties */
    float *W;                  /* [T][G] the penalties once more */
    float *A, *bar;            /* [T][P] slot loads, [P] their means */
    float *own, *cross;        /* [P] slot loads weighed by the penalties of their rank and of the hottest */
    float *sums;               /* [G] of penalties */
    float *hosts, *weights;    /* [E] own and sums over the slots of an expert */
    float *sa, *score;         /* [G] */
    int32_t *parent, *first, *touched;
    uint8_t *has, *skip;       /* [E][G] copies, [G] ranks given up */
} Layer;

static Layer open_layer(int E, int T, int G, int K, const float *load, int32_t *count, int32_t *slots,
                        const int32_t *node, Options o) {
    int P = K * G;
    Layer y = {.E = E, .T = T, .G = G, .K = K, .P = P, .o = o, .load = load, .count = count, .slots = slots, .node = node};
    y.L = get((size_t)G * T, 4), y.W = get((size_t)T * G, 4), y.R = get((size_t)G * T, 4);
    y.A = get((size_t)T * P, 4), y.bar = get(P, 4), y.own = get(P, 4), y.cross = get(P, 4), y.sums = get(G, 4);
    y.sa = get(G, 4), y.score = get(G, 4), y.hosts = get(E, 4), y.weights = get(E, 4);
    y.parent = get(G, 4), y.first = get(E, 4), y.touched = get(G, 4), y.has = get((size_t)E * G, 1), y.skip = get(G, 1);
    for (int j = 0; j < K; j++)
        for (int g = 0; g < G; g++) {
            int p = j * G + g, e = slots[p];
            float total = 0.0f, each = 1.0f / (float)count[e];
            y.has[(size_t)e * G + g]++;
            for (int t = 0; t < T; t++) {
                float a = load[(size_t)e * T + t] * each;
                y.A[(size_t)t * P + p] = a, total += a, y.L[(size_t)g * T + t] += a;
            }
            y.bar[p] = total * (1.0f / (float)T);
        }
    for (int x = 0; x < T * G; x++) y.highest = y.L[x] > y.highest ? y.L[x] : y.highest;
    for (int g = 0; g < G; g++)
        for (int t = 0; t < T; t++)
            y.W[(size_t)t * G + g] = y.R[(size_t)g * T + t] = power(o.beta * (y.L[(size_t)g * T + t] - y.highest));
    y.parts = o.connect ? components(E, G, K, slots, count, y.parent, y.first) : 0;
    return y;
}

static void close_layer(Layer *y) {
    free(y->L), free(y->W), free(y->R), free(y->A), free(y->bar), free(y->own), free(y->cross), free(y->sums);
    free(y->sa), free(y->score), free(y->hosts), free(y->weights);
    free(y->parent), free(y->first), free(y->touched), free(y->has), free(y->skip);
}

/* The rank with the largest sum of penalties that is not given up, -1 if there is none. */
static int hottest(Layer *y) {
    int G = y->G, h = -1;
    float *sums = y->sums;
    for (int g = 0; g < G; g++) sums[g] = 0.0f;
    for (int t = 0; t < y->T; t++)
        for (int g = 0; g < G; g++) sums[g] += y->W[(size_t)t * G + g];
    for (int g = 0; g < G; g++)
        if (!y->skip[g] && (h < 0 || sums[g] > sums[h])) h = g;
    return h;
}

/* Fills own and cross for the hottest rank h, and hosts and weights where slots may be reassigned. */
static void weigh(Layer *y, int h) {
    int G = y->G, P = y->P;
    float *own = y->own, *cross = y->cross;
    for (int p = 0; p < P; p++) own[p] = 0.0f, cross[p] = 0.0f;
    for (int t = 0; t < y->T; t++) {
        const float *row = y->W + (size_t)t * G;
        float at = row[h];
        for (int j = 0; j < y->K; j++) {
            const float *a = y->A + (size_t)t * P + j * G;
            float *x = own + j * G, *z = cross + j * G;
            for (int g = 0; g < G; g++) x[g] += row[g] * a[g], z[g] += at * a[g];
        }
    }
    if (!y->o.reassign) return;
    for (int e = 0; e < y->E; e++) y->hosts[e] = 0.0f, y->weights[e] = 0.0f;
    for (int p = 0; p < P; p++) y->hosts[y->slots[p]] += own[p], y->weights[y->slots[p]] += y->sums[p % G];
}

/* What follows the first order of a penalty whose exponent changes by x: its second order, or with soft = 1 no more
 * than |x|, so that a slot much heavier than those of other ranks is not taken for one that cannot move. */
static inline float bend(float x, float soft) { return (x * x) / (2.0f + soft * fabsf(x)); }

/* Swaps of slot i of rank h with all others, by the first and second order of what they change. */
static int offer_swaps(Layer *y, int h, int i, float soft, Candidate *list, int found) {
    int G = y->G, a = y->slots[i * G + h];
    float beta = y->o.beta, mine = y->bar[i * G + h], here = y->sa[h], sh = y->sums[h];
    const float *sa = y->sa, *sums = y->sums;
    float *score = y->score;
    for (int j = 0; j < y->K; j++) {
        const float *x = y->own + j * G, *z = y->cross + j * G, *m = y->bar + j * G;
        float lowest = 0.0f;
        for (int g = 0; g < G; g++) {
            float d = beta * (mine - m[g]);
            score[g] = beta * ((sa[g] - here) + (z[g] - x[g])) + (sums[g] + sh) * bend(d, soft);
            lowest = score[g] < lowest ? score[g] : lowest;
        }
        if (!(lowest < 0.0f) || (found == CANDIDATES && lowest >= list[found - 1].score)) continue;
        for (int g = 0; g < G; g++) {
            int b = y->slots[j * G + g];
            if (score[g] < 0.0f && y->node[g] == y->node[h] && !y->has[(size_t)a * G + g] && !y->has[(size_t)b * G + h])
                offer(list, &found, score[g], 0, i, j * G + g);
        }
    }
    return found;
}

/* Replicas of the expert in slot i of rank h in place of redundant ones of others. */
static int offer_replicas(Layer *y, int h, int i, float soft, Candidate *list, int found) {
    int G = y->G, a = y->slots[i * G + h];
    float beta = y->o.beta, mine = y->bar[i * G + h];
    float r = (float)y->count[a] / (float)(y->count[a] + 1), rest = 1.0f - r;
    float base = y->weights[a] * bend(beta * (rest * mine), soft) - beta * (rest * y->hosts[a]);
    for (int p = 0; p < y->P; p++) {
        int b = y->slots[p], g = p % G;
        if (y->count[b] <= y->o.least || y->has[(size_t)a * G + g] || y->node[g] != y->node[h]) continue;
        float q = 1.0f / (float)(y->count[b] - 1), d = r * mine - y->bar[p], f = q * y->bar[p];
        float s = beta * ((r * y->sa[g] - y->own[p]) + q * (y->hosts[b] - y->own[p])) + base;
        s = s + (y->sums[g] * bend(beta * d, soft) + (y->weights[b] - y->sums[g]) * bend(beta * f, soft));
        if (s < 0.0f) offer(list, &found, s, 1, i, p);
    }
    return found;
}

/* The best candidates by their estimates. */
static int list_candidates(Layer *y, int h, float soft, Candidate *list) {
    int G = y->G, found = 0;
    float *sa = y->sa;
    for (int i = 0; i < y->K; i++) {
        for (int g = 0; g < G; g++) sa[g] = 0.0f;
        for (int t = 0; t < y->T; t++) {
            float x = y->A[(size_t)t * y->P + i * G + h];
            const float *row = y->W + (size_t)t * G;
            for (int g = 0; g < G; g++) sa[g] += row[g] * x;
        }
        int left = y->o.budget < 0 ? 2 : y->o.budget - y->changed;
        if (left >= 2) found = offer_swaps(y, h, i, soft, list, found);
        if (y->o.reassign && y->count[y->slots[i * G + h]] < G && left > 0)
            found = offer_replicas(y, h, i, soft, list, found);
    }
    return found;
}

/* What the candidate takes off the penalties in full, per slot written; 0 if too little. */
static float gain_of(Layer *y, int h, Candidate c) {
    int G = y->G, T = y->T, num = 0, *touched = y->touched;
    int a = y->slots[c.i * G + h], g = c.p % G, b = y->slots[c.p];
    const uint8_t *on_a = y->has + (size_t)a * G, *on_b = y->has + (size_t)b * G;
    touched[num++] = h;
    touched[num++] = g; /* never h: a stands there already */
    for (int x = 0; c.kind && x < G; x++)
        if (x != h && x != g && (on_a[x] || on_b[x])) touched[num++] = x;
    const float *la = y->load + (size_t)a * T, *lb = y->load + (size_t)b * T;
    float na = (float)y->count[a], nb = (float)y->count[b], beta = y->o.beta, highest = y->highest;
    float before = 0.0f, after = 0.0f;
    for (int k = 0; k < num; k++) {
        int x = touched[k];
        float fa, fb; /* the change of rank x's load, as parts of the experts' loads */
        if (c.kind) {
            fa = (float)on_a[x] * (1.0f / (na + 1.0f) - 1.0f / na);
            fb = (float)on_b[x] * (1.0f / (nb - 1.0f) - 1.0f / nb);
            if (x == g) fa = 1.0f / (na + 1.0f), fb = fb - 1.0f / (nb - 1.0f);
        } else {
            fa = x == h ? -1.0f / na : 1.0f / na;
            fb = x == h ? 1.0f / nb : -1.0f / nb;
        }
        const float *now = y->L + (size_t)x * T, *was = y->R + (size_t)x * T;
        float old[16], new[16]; /* sums by lane, then lane by lane: an order that vectors keep */
        for (int v = 0; v < 16; v++) old[v] = 0.0f, new[v] = 0.0f;
        int t = 0;
        for (; t + 16 <= T; t += 16)
            for (int v = 0; v < 16; v++) {
                old[v] += was[t + v];
                new[v] += power(beta * (((now[t + v] + fa * la[t + v]) + fb * lb[t + v]) - highest));
            }
        for (int v = 0; t + v < T; v++) {
            old[v] += was[t + v];
            new[v] += power(beta * (((now[t + v] + fa * la[t + v]) + fb * lb[t + v]) - highest));
        }
        for (int v = 0; v < 16; v++) before += old[v], after += new[v];
    }
    float gain = before - after;
    if (!(gain > y->o.least_gain * before)) return 0.0f;
    return y->o.budget >= 0 && !c.kind ? gain * 0.5f : gain; /* a swap writes two slots */
}

/* Writes the candidate's slots. */
static void exchange(Layer *y, int h, Candidate c) {
    int pa = c.i * y->G + h, a = y->slots[pa], b = y->slots[c.p];
    y->slots[c.p] = a;
    if (c.kind)
        y->count[a]++, y->count[b]--;
    else
        y->slots[pa] = b;
}

/* Whether the candidate would part ranks that shared experts join now. */
static int parts_more(Layer *y, int h, Candidate c) {
    int pa = c.i * y->G + h, a = y->slots[pa], b = y->slots[c.p];
    if (y->count[a] < 2 && y->count[b] < 2) return 0;
    exchange(y, h, c);
    int now = components(y->E, y->G, y->K, y->slots, y->count, y->parent, y->first);
    y->slots[c.p] = b;
    if (c.kind)
        y->count[a]--, y->count[b]++;
    else
        y->slots[pa] = a;
    return now > y->parts;
}

/* Carries the candidate out, and sums anew what it changes, so that errors do not grow. */
static void apply(Layer *y, int h, Candidate c) {
    int G = y->G, T = y->T, P = y->P, g = c.p % G, a = y->slots[c.i * G + h], b = y->slots[c.p];
    uint8_t *on_a = y->has + (size_t)a * G, *on_b = y->has + (size_t)b * G;
    exchange(y, h, c);
    on_a[g]++, on_b[g]--;
    if (!c.kind) on_b[h]++, on_a[h]--;
    y->changed += c.kind ? 1 : 2;
    for (int p = 0; p < P; p++) {
        int e = y->slots[p];
        if (e != a && e != b) continue;
        float total = 0.0f, each = 1.0f / (float)y->count[e];
        for (int t = 0; t < T; t++) {
            float v = y->load[(size_t)e * T + t] * each;
            y->A[(size_t)t * P + p] = v, total += v;
        }
        y->bar[p] = total * (1.0f / (float)T);
    }
    for (int x = 0; x < G; x++) {
        if (x != h && x != g && !(c.kind && (on_a[x] || on_b[x]))) continue;
        float *now = y->L + (size_t)x * T, *was = y->R + (size_t)x * T, highest = y->highest, beta = y->o.beta;
        for (int t = 0; t < T; t++) {
            float total = 0.0f;
            for (int j = 0; j < y->K; j++) total += y->A[(size_t)t * P + j * G + x];
            now[t] = total;
        }
        for (int t = 0; t < T; t++) was[t] = power(beta * (now[t] - highest));
        for (int t = 0; t < T; t++) y->W[(size_t)t * G + x] = was[t];
    }
    if (y->o.connect) y->parts = components(y->E, G, y->K, y->slots, y->count, y->parent, y->first);
}

static int improve(int E, int T, int G, int K, const float *load, int32_t *count, int32_t *slots,
                   const int32_t *node, Options o) {
    Layer y = open_layer(E, T, G, K, load, count, slots, node, o);
    int given_up = 0;
    for (int round = 0; round < o.rounds && given_up < o.patience; round++) {
        int h = hottest(&y);
        if (h < 0) break;
        weigh(&y, h);
        Candidate list[CANDIDATES];
        int chosen = -1;
        float best = 0.0f;
        /* what is in force may be far off: softer estimates then, where the others find nothing */
        for (int soft = 0; soft <= (o.budget >= 0) && chosen < 0; soft++) {
            int found = list_candidates(&y, h, (float)soft, list);
            for (int n = 0; n < found; n++) {
                float gain = gain_of(&y, h, list[n]);
                if (gain > best && !(o.connect && parts_more(&y, h, list[n]))) chosen = n, best = gain;
            }
        }
        if (chosen < 0)
            y.skip[h] = 1, given_up++;
        else
            apply(&y, h, list[chosen]);
    }
    close_layer(&y);
    return y.changed;
}

/* Lower the sum over ranks and windows of power(beta * (load - highest)) by swaps of two slots and, if reassign,
 * by giving redundant slots to other experts. count [N][E] and slots [N][K][G] in and out; node [G]: slots change
 * places within a node only. changed [N]: slots written. */
void eplb_improve(int N, int E, int T, int G, int K, const float *load, int32_t *count, int32_t *slots,
                  const int32_t *node, const Options *options, int32_t *changed) {
    for (int n = 0; n < N; n++)
        changed[n] = improve(E, T, G, K, load + (size_t)n * E * T, count + (size_t)n * E,
                             slots + (size_t)n * K * G, node, *options);
}

/* ------------------------------------------------------------------ annealing small layers */

static uint64_t split_mix(uint64_t *state) { /* Steele, Lea, Flood 2014 */
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* Mean over the windows of the highest rank load; L [G][T]. */
static float highest_mean(int G, int T, const float *L) {
    float total = 0.0f;
    for (int t = 0; t < T; t++) {
        float most = L[t];
        for (int g = 1; g < G; g++) most = L[(size_t)g * T + t] > most ? L[(size_t)g * T + t] : most;
        total += most;
    }
    return total / (float)T;
}

static void anneal(int E, int T, int G, int K, const float *load, int32_t *count, int32_t *slots,
                   const int32_t *node, float beta, int steps, int connect, int least, uint64_t state) {
    int P = K * G, spare = 0;
    float *L = get((size_t)G * T, 4), *N = get((size_t)G * T, 4), *energy = get(G, 4), *after = get(G, 4);
    int32_t *best_count = get(E, 4), *best_slots = get(P, 4), *parent = get(G, 4), *first = get(E, 4);
    int32_t *touched = get(G, 4);
    uint8_t *has = get((size_t)E * G, 1), *at = get((size_t)E * G, 1); /* copies on ranks, experts in nodes */
    for (int p = 0; p < P; p++) at[(size_t)slots[p] * G + node[p % G]] = 1; /* as they stand now: they stay there */
    memcpy(best_count, count, sizeof(int32_t) * E);
    memcpy(best_slots, slots, sizeof(int32_t) * P);
    for (int p = 0; p < P; p++) has[(size_t)slots[p] * G + p % G]++;
    for (int e = 0; e < E; e++) spare += count[e] - least;
    for (int p = 0; p < P; p++) {
        float each = 1.0f / (float)count[slots[p]];
        for (int t = 0; t < T; t++) L[(size_t)(p % G) * T + t] += load[(size_t)slots[p] * T + t] * each;
    }
    float highest = 0.0f, total = 0.0f;
    for (int x = 0; x < G * T; x++) highest = L[x] > highest ? L[x] : highest;
    for (int g = 0; g < G; g++) {
        for (int t = 0; t < T; t++) energy[g] += power(beta * (L[(size_t)g * T + t] - highest));
        total += energy[g];
    }
    float best = highest_mean(G, T, L);
    int parts = connect ? components(E, G, K, slots, count, parent, first) : 0;
    for (int step = 0; step < steps; step++) {
        float left = (float)(steps - step) / (float)steps, heat = 4.0f * (left * left) + 0.002f;
        uint64_t kind = split_mix(&state), one = split_mix(&state), two = split_mix(&state);
        float chance = (float)(split_mix(&state) >> 40) * (1.0f / 16777216.0f);
        int reassign = spare > 0 && kind % 2 == 0, p = (int)(one % (uint64_t)P), g = p % G, b = slots[p];
        int q = (int)(two % (uint64_t)P), h = q % G, a = reassign ? (int)(two % (uint64_t)E) : slots[q], num = 0;
        if (a == b || has[(size_t)a * G + g] || !at[(size_t)a * G + node[g]]) continue;
        if (reassign ? count[b] <= least || count[a] >= G : has[(size_t)b * G + h] || node[g] != node[h]) continue;
        touched[num++] = g;
        if (reassign) {
            for (int x = 0; x < G; x++)
                if (x != g && (has[(size_t)a * G + x] || has[(size_t)b * G + x])) touched[num++] = x;
        } else {
            touched[num++] = h;
        }
        float na = (float)count[a], nb = (float)count[b], change = 0.0f;
        const float *la = load + (size_t)a * T, *lb = load + (size_t)b * T;
        for (int k = 0; k < num; k++) {
            int x = touched[k];
            float fa, fb;
            if (reassign) {
                fa = (float)has[(size_t)a * G + x] * (1.0f / (na + 1.0f) - 1.0f / na);
                fb = (float)has[(size_t)b * G + x] * (1.0f / (nb - 1.0f) - 1.0f / nb);
                if (x == g) fa = 1.0f / (na + 1.0f), fb = fb - 1.0f / (nb - 1.0f);
            } else {
                fa = x == g ? 1.0f / na : -1.0f / na;
                fb = x == g ? -1.0f / nb : 1.0f / nb;
            }
            float sum = 0.0f;
            for (int t = 0; t < T; t++) {
                float next = (L[(size_t)x * T + t] + fa * la[t]) + fb * lb[t];
                N[(size_t)k * T + t] = next, sum += power(beta * (next - highest));
            }
            after[k] = sum, change += sum - energy[x];
        }
        if (change > 0.0f && !(chance < power(-(change / (heat * total))))) continue;
        slots[p] = a;
        if (reassign)
            count[a]++, count[b]--;
        else
            slots[q] = b;
        if (connect && components(E, G, K, slots, count, parent, first) > parts) {
            slots[p] = b;
            if (reassign)
                count[a]--, count[b]++;
            else
                slots[q] = a;
            continue;
        }
        has[(size_t)a * G + g]++, has[(size_t)b * G + g]--;
        if (!reassign) has[(size_t)b * G + h]++, has[(size_t)a * G + h]--;
        for (int k = 0; k < num; k++) {
            energy[touched[k]] = after[k];
            memcpy(L + (size_t)touched[k] * T, N + (size_t)k * T, sizeof(float) * T);
        }
        total = 0.0f;
        for (int x = 0; x < G; x++) total += energy[x];
        float score = highest_mean(G, T, L);
        if (score < best) {
            best = score;
            memcpy(best_count, count, sizeof(int32_t) * E);
            memcpy(best_slots, slots, sizeof(int32_t) * P);
        }
    }
    memcpy(count, best_count, sizeof(int32_t) * E);
    memcpy(slots, best_slots, sizeof(int32_t) * P);
    free(L), free(N), free(energy), free(after), free(best_count), free(best_slots), free(parent), free(first);
    free(touched), free(has), free(at);
}

/* Simulated annealing by swaps of slots and new owners of redundant slots; keeps the best by the mean over the
 * windows of the highest rank load. count [N][E] and slots [N][K][G] in and out; node [G]: experts stay in the nodes
 * in which they stand. */
void eplb_anneal(int N, int E, int T, int G, int K, const float *load, int32_t *count, int32_t *slots,
                 const int32_t *node, float beta, int steps, int connect, int least, int seed) {
    for (int n = 0; n < N; n++)
        anneal(E, T, G, K, load + (size_t)n * E * T, count + (size_t)n * E, slots + (size_t)n * K * G, node, beta,
               steps, connect, least, (uint64_t)seed);
}

/* ------------------------------------------------------------------ exploring under routing step by step */

#define LANES 64 /* windows side by side, at most */
#define FEW 16
#define SWEEPS 6

typedef struct { /* one layer while it is explored */
    int E, G, K, lanes, edges, many;
    const float *load;       /* [blocks][E][lanes] */
    int32_t *count, *slots;
    int32_t *edge;           /* [edges][2] neighbouring replicas of an expert, by number */
    int32_t *slot, *rank;    /* [many] the replicas' slots and ranks */
    int32_t *last, *first;   /* [E] */
    float *R, *part;         /* [G][lanes] rank loads, [many][lanes] loads of replicas */
} Flow;

static int link(Flow *y, int n, int i, int j) {
    if (y->rank[i] == y->rank[j]) return n; /* twins on a rank have nothing to even out */
    y->edge[2 * n] = i, y->edge[2 * n + 1] = j;
    return n + 1;
}

/* Numbers the slots of replicated experts, and the pairs of replicas between which load may flow. */
static void join(Flow *y) {
    int n = 0, many = 0;
    for (int e = 0; e < y->E; e++) y->last[e] = -1;
    for (int j = 0; j < y->K; j++)
        for (int g = 0; g < y->G; g++) {
            int e = y->slots[j * y->G + g];
            if (y->count[e] < 2) continue;
            y->slot[many] = j * y->G + g, y->rank[many] = g;
            if (y->last[e] < 0)
                y->first[e] = many;
            else
                n = link(y, n, y->last[e], many);
            y->last[e] = many++;
        }
    for (int e = 0; e < y->E; e++)
        if (y->count[e] > 2) n = link(y, n, y->last[e], y->first[e]);
    y->edges = n, y->many = many;
}

static inline __attribute__((always_inline)) float flow_of(Flow *y, int block, int lanes) {
    int G = y->G, many = 0;
    const float *load = y->load + (size_t)block * y->E * lanes;
    memset(y->R, 0, sizeof(float) * G * lanes);
    for (int j = 0; j < y->K; j++)
        for (int g = 0; g < G; g++) {
            int e = y->slots[j * G + g];
            const float *restrict l = load + (size_t)e * lanes;
            float *restrict r = y->R + (size_t)g * lanes;
            if (y->count[e] < 2) {
                for (int v = 0; v < lanes; v++) r[v] += l[v];
                continue;
            }
            float each = 1.0f / (float)y->count[e], *restrict part = y->part + (size_t)many++ * lanes;
            for (int v = 0; v < lanes; v++) part[v] = l[v] * each, r[v] += part[v];
        }
    for (int s = 0; s < SWEEPS; s++) {
        float half = 3 * s < 2 * SWEEPS ? 0.75f : 0.5f; /* lengthened steps first */
        for (int n = 0; n < y->edges; n++) {
            int i = y->edge[2 * n], j = y->edge[2 * n + 1];
            float *restrict a = y->part + (size_t)i * lanes, *restrict b = y->part + (size_t)j * lanes;
            float *restrict x = y->R + (size_t)y->rank[i] * lanes, *restrict z = y->R + (size_t)y->rank[j] * lanes;
            for (int v = 0; v < lanes; v++) {
                float d = half * (z[v] - x[v]);
                d = d < b[v] ? d : b[v];
                d = d > -a[v] ? d : -a[v];
                a[v] += d, b[v] -= d, x[v] += d, z[v] -= d;
            }
        }
    }
    float total = 0.0f, most[LANES];
    for (int v = 0; v < lanes; v++) most[v] = y->R[v];
    for (int g = 1; g < G; g++)
        for (int v = 0; v < lanes; v++) most[v] = y->R[g * lanes + v] > most[v] ? y->R[g * lanes + v] : most[v];
    for (int v = 0; v < lanes; v++) total += most[v];
    return total;
}

/* Sum over the windows of a block of the highest rank load, after replicas have evened out their ranks. */
static float flow(Flow *y, int block) {
    return y->lanes == FEW ? flow_of(y, block, FEW) : flow_of(y, block, LANES);
}

/* The windows of load [E][T] with their distance from the mean stretched: out [blocks][E][LANES], each window
 * scaled to a mean rank load of 1 again. Block b takes every blocks-th window, over and over where they end. */
static void stretch(int E, int T, int G, int blocks, const float *load, const float *mean, float by, float *out) {
    for (int b = 0; b < blocks; b++) {
        float *to = out + (size_t)b * E * LANES, total[LANES];
        for (int v = 0; v < LANES; v++) total[v] = 0.0f;
        for (int e = 0; e < E; e++)
            for (int v = 0; v < LANES; v++) {
                float x = mean[e] + by * (load[(size_t)e * T + (v * blocks + b) % T] - mean[e]);
                x = x > 0.0f ? x : 0.0f;
                to[(size_t)e * LANES + v] = x, total[v] += x;
            }
        for (int v = 0; v < LANES; v++) total[v] = (float)G / total[v];
        for (int e = 0; e < E; e++)
            for (int v = 0; v < LANES; v++) to[(size_t)e * LANES + v] *= total[v];
    }
}

static Flow open_flow(int E, int G, int K, int lanes, const float *load, int32_t *count, int32_t *slots) {
    int P = K * G;
    Flow y = {.E = E, .G = G, .K = K, .lanes = lanes, .load = load, .count = count, .slots = slots};
    y.edge = get((size_t)4 * P, 4), y.slot = get(P, 4), y.rank = get(P, 4), y.last = get(E, 4), y.first = get(E, 4);
    y.R = get((size_t)G * lanes, 4), y.part = get((size_t)P * lanes, 4);
    join(&y);
    return y;
}

static void close_flow(Flow *y) {
    free(y->edge), free(y->slot), free(y->rank), free(y->last), free(y->first), free(y->R), free(y->part);
}

static const float STRETCH[] = {1.0f, 1.5f, 2.0f, 3.0f, 4.0f};

static void explore(int E, int T, int G, int K, const float *load, int32_t *count, int32_t *slots,
                    const int32_t *node, int least, int tries, float open, uint64_t state) {
    int P = K * G, blocks = (T + LANES - 1) / LANES, spare = 0;
    float *mean = get(E, 4), *wide = get((size_t)blocks * E * LANES, 4);
    uint8_t *has = get((size_t)E * G, 1);
    Flow y = open_flow(E, G, K, LANES, wide, count, slots);
    for (int e = 0; e < E; e++) {
        for (int t = 0; t < T; t++) mean[e] += load[(size_t)e * T + t];
        mean[e] = mean[e] * (1.0f / (float)T);
        spare += count[e] - least;
    }
    for (int p = 0; p < P; p++) has[(size_t)slots[p] * G + p % G]++;
    float start = 0.0f, here = 0.0f, most = open * (float)(blocks * LANES);
    for (int k = 0; k < 5 && here < most; k++) {
        stretch(E, T, G, blocks, load, mean, STRETCH[k], wide);
        start = here = flow(&y, 0);
        for (int b = 1; b < blocks; b++) here += flow(&y, b);
    }
    if (here < most) tries = 0; /* routing takes up all there is */
    for (int n = 0; n < tries; n++) {
        uint64_t kind = split_mix(&state), one = split_mix(&state), two = split_mix(&state);
        int reassign = spare > 0 && kind % 4 == 0, p = (int)(one % (uint64_t)P), g = p % G, b = slots[p];
        int q = (int)(two % (uint64_t)P), h = q % G, a = slots[q];
        const uint8_t *on_a = has + (size_t)a * G;
        if (a == b || on_a[g] || node[g] != node[h]) continue;
        if (reassign ? count[b] <= least || count[a] >= G : has[(size_t)b * G + h]) continue;
        slots[p] = a;
        if (reassign)
            count[a]++, count[b]--;
        else
            slots[q] = b;
        join(&y);
        float first = flow(&y, 0), now = first;
        if (first < start) /* the others only where this block gains */
            for (int k = 1; k < blocks; k++) now += flow(&y, k);
        if (first < start && now < here * (1.0f - 1e-6f)) {
            start = first, here = now;
            has[(size_t)a * G + g]++, has[(size_t)b * G + g]--;
            if (!reassign) has[(size_t)b * G + h]++, has[(size_t)a * G + h]--;
            continue;
        }
        slots[p] = b;
        if (reassign)
            count[a]--, count[b]++;
        else
            slots[q] = a;
    }
    free(mean), free(wide), free(has);
    close_flow(&y);
}

/* Lower the mean over the windows of the highest rank load, with replicas' parts set for each window, by random
 * swaps within nodes and new owners of redundant slots. Windows are stretched until at least `open` is left of it,
 * so that there is something to win. count [N][E] and slots [N][K][G] in and out; node [G]. */
void eplb_explore(int N, int E, int T, int G, int K, const float *load, int32_t *count, int32_t *slots,
                  const int32_t *node, int least, int tries, float open, int seed) {
    for (int n = 0; n < N; n++)
        explore(E, T, G, K, load + (size_t)n * E * T, count + (size_t)n * E, slots + (size_t)n * K * G, node, least,
                tries, open, (uint64_t)seed);
}

static float dot(const float *a, const float *b, int lanes) { /* by sixteen, then one by one */
    float sum[16], total = 0.0f;
    for (int v = 0; v < 16; v++) sum[v] = a[v] * b[v];
    for (int t = 16; t < lanes; t += 16)
        for (int v = 0; v < 16; v++) sum[v] += a[t + v] * b[t + v];
    for (int v = 0; v < 16; v++) total += sum[v];
    return total;
}

/* heat [G][lanes]: how near each rank is to the highest of its window, 1 in all; mean [lanes]: 1 / G. The hottest. */
static int heat_of(Flow *y, float *heat, float *mean) {
    int G = y->G, lanes = y->lanes, hot = 0;
    float most = -1.0f, top[LANES], total[LANES];
    for (int v = 0; v < lanes; v++) top[v] = y->R[v], total[v] = 0.0f, mean[v] = 1.0f / (float)G;
    for (int g = 1; g < G; g++)
        for (int v = 0; v < lanes; v++) top[v] = y->R[g * lanes + v] > top[v] ? y->R[g * lanes + v] : top[v];
    for (int g = 0; g < G; g++)
        for (int v = 0; v < lanes; v++) {
            float x = 1.0f + (60.0f / 64.0f) * (y->R[g * lanes + v] - top[v]);
            x = x > 0.0f ? x : 0.0f;
            for (int i = 0; i < 6; i++) x = x * x;
            heat[g * lanes + v] = x, total[v] += x;
        }
    for (int g = 0; g < G; g++) {
        float sum = 0.0f;
        for (int v = 0; v < lanes; v++) heat[g * lanes + v] = heat[g * lanes + v] / total[v];
        for (int v = 0; v < lanes; v++) sum += heat[g * lanes + v];
        if (sum > most) most = sum, hot = g;
    }
    return hot;
}

static const float *load_in(const Flow *y, const int32_t *part_of, int p) {
    return part_of[p] < 0 ? y->load + (size_t)y->slots[p] * y->lanes : y->part + (size_t)part_of[p] * y->lanes;
}

/* By estimate: replicas of an expert of the hottest rank in place of redundant ones, which takes half of its load
 * away, and swaps of experts that stand alone. */
static int list_moves(Flow *y, const uint8_t *has, int least, int left, float *heat, float *sums, int32_t *part_of,
                      int *hottest, Candidate *list) {
    int G = y->G, P = y->K * G, lanes = y->lanes, found = 0;
    float mean[LANES], *own = sums, *at = sums + P, *even = sums + 2 * P, *to = sums + 3 * P;
    int h = *hottest = heat_of(y, heat, mean);
    for (int p = 0; p < P; p++) part_of[p] = -1;
    for (int i = 0; i < y->many; i++) part_of[y->slot[i]] = i;
    for (int q = 0; q < P; q++) {
        const float *load = load_in(y, part_of, q);
        own[q] = dot(load, heat + (q % G) * lanes, lanes), at[q] = dot(load, heat + h * lanes, lanes);
        even[q] = dot(load, mean, lanes);
    }
    for (int i = 0; i < y->K; i++) {
        int p = i * G + h, a = y->slots[p];
        const float *load = load_in(y, part_of, p);
        for (int g = 0; g < G; g++) to[g] = dot(load, heat + g * lanes, lanes);
        for (int q = 0; q < P; q++) {
            int g = q % G, b = y->slots[q];
            if (has[(size_t)a * G + g]) continue;
            float relief = to[h] - to[g], copy = 0.5f * relief + (own[q] - even[q]);
            float swap = 0.5f * (relief - (at[q] - own[q]));
            if (y->count[b] > least && copy > 0.0f) offer(list, &found, -copy, 1, i, q);
            if (left >= 2 && y->count[a] == 1 && y->count[b] == 1 && swap > 0.0f) offer(list, &found, -swap, 0, i, q);
        }
    }
    return found;
}

static void move(Flow *y, int h, Candidate c) {
    int p = c.i * y->G + h, a = y->slots[p], b = y->slots[c.p];
    y->slots[c.p] = a;
    if (c.kind)
        y->count[a]++, y->count[b]--;
    else
        y->slots[p] = b;
    join(y);
}

static void move_back(Flow *y, int h, Candidate c, int a, int b) {
    y->slots[c.p] = b;
    if (c.kind)
        y->count[a]--, y->count[b]++;
    else
        y->slots[c.i * y->G + h] = a;
}

static float follow(int E, int T, int G, int K, const float *load, int32_t *count, int32_t *slots, int least, int left,
                    float target, float least_gain) {
    int P = K * G, lanes = T <= FEW ? FEW : LANES, h;
    float *wide = get((size_t)E * lanes, 4), *heat = get((size_t)G * lanes, 4), *sums = get((size_t)3 * P + G, 4);
    int32_t *part_of = get(P, 4);
    uint8_t *has = get((size_t)E * G, 1);
    for (int e = 0; e < E; e++)
        for (int v = 0; v < lanes; v++) wide[(size_t)e * lanes + v] = load[(size_t)e * T + v % T];
    for (int p = 0; p < P; p++) has[(size_t)slots[p] * G + p % G]++;
    Flow y = open_flow(E, G, K, lanes, wide, count, slots);
    float here = flow(&y, 0);
    while (left > 0 && here > target * (float)lanes) {
        Candidate list[CANDIDATES];
        int found = list_moves(&y, has, least, left, heat, sums, part_of, &h, list), chosen = -1;
        float best = least_gain * (float)lanes;
        for (int n = 0; n < found && (n < 8 || chosen < 0); n++) { /* more than 8 only until one gains */
            int a = slots[list[n].i * G + h], b = slots[list[n].p];
            move(&y, h, list[n]);
            float gain = here - flow(&y, 0);
            if (!list[n].kind) gain = gain * 0.5f; /* it writes two slots */
            if (gain > best) best = gain, chosen = n;
            move_back(&y, h, list[n], a, b);
        }
        if (chosen < 0) break;
        Candidate c = list[chosen];
        int a = slots[c.i * G + h], b = slots[c.p], g = c.p % G;
        move(&y, h, c);
        here = flow(&y, 0);
        has[(size_t)a * G + g]++, has[(size_t)b * G + g]--;
        if (!c.kind) has[(size_t)b * G + h]++, has[(size_t)a * G + h]--;
        left -= c.kind ? 1 : 2;
    }
    close_flow(&y);
    free(wide), free(heat), free(sums), free(part_of), free(has);
    return here * (1.0f / (float)lanes);
}

/* At most `budget` slot changes a layer that lower the mean over the windows (64 at most) of the highest rank load
 * with replicas' parts set for each window, each by least_gain a slot, until it is at the target. count [N][E] and
 * slots [N][K][G] in and out; score [N]: that mean. */
void eplb_follow(int N, int E, int T, int G, int K, const float *load, int32_t *count, int32_t *slots, int least,
                 int budget, float target, float least_gain, float *score) {
    for (int n = 0; n < N; n++)
        score[n] = follow(E, T, G, K, load + (size_t)n * E * T, count + (size_t)n * E, slots + (size_t)n * K * G, least,
                          budget, target, least_gain);
}

/* ------------------------------------------------------------------ routing shares */

/* Experts that stand on several ranks, with one host slot a rank; twins: further slots on a rank, and its host. */
typedef struct { int n, *start, *expert, *slot, *rank, twins, *twin, *host; } Replicas;

static Replicas replicas_of(int E, int G, int P, const int32_t *slots, const int32_t *rank_of) {
    Replicas r = {0, get(E + 1, 4), get(E, 4), get(P, 4), get(P, 4), 0, get(P, 4), get(P, 4)};
    int *count = get(E, 4), *at = get(E, 4), *first = get((size_t)E * G, 4), total = 0;
    for (int p = 0; p < P; p++) {
        int *seen = first + (size_t)slots[p] * G + rank_of[p];
        if (*seen)
            r.twin[r.twins] = p, r.host[r.twins++] = *seen - 1;
        else
            *seen = p + 1, count[slots[p]]++;
    }
    for (int e = 0; e < E; e++)
        if (count[e] > 1) r.expert[r.n] = e, r.start[r.n++] = at[e] = total, total += count[e];
    r.start[r.n] = total;
    for (int p = 0; p < P; p++)
        if (count[slots[p]] > 1 && first[(size_t)slots[p] * G + rank_of[p]] == p + 1) {
            int k = at[slots[p]]++;
            r.slot[k] = p, r.rank[k] = rank_of[p];
        }
    free(count), free(at), free(first);
    return r;
}

static void free_replicas(Replicas r) {
    free(r.start), free(r.expert), free(r.slot), free(r.rank), free(r.twin), free(r.host);
}

/* Water filling: each expert in turn spreads its load over its hosts so that their levels become equal, with the
 * step lengthened by omega in the first two thirds of the sweeps. share [P] in and out, ranks [G] out. */
static void fill(Replicas r, int G, int P, const double *load, const int32_t *slots, const int32_t *rank_of,
                 int sweeps, double omega, double *share, double *ranks, double *level) {
    for (int g = 0; g < G; g++) ranks[g] = 0.0;
    for (int p = 0; p < P; p++) ranks[rank_of[p]] += load[slots[p]] * share[p];
    for (int i = 0; sweeps > 0 && i < r.twins; i++) /* of slots on one rank the first takes all */
        share[r.host[i]] += share[r.twin[i]], share[r.twin[i]] = 0.0;
    for (int s = 0; s < sweeps; s++) {
        double step = 3 * s < 2 * sweeps && s + 1 < sweeps ? omega : 1.0;
        for (int n = 0; n < r.n; n++) {
            int from = r.start[n], c = r.start[n + 1] - from;
            const int *slot = r.slot + from, *rank = r.rank + from;
            double w = load[r.expert[n]];
            if (!(w > 0.0)) continue;
            if (c == 2) {
                double x = share[slot[0]], a = ranks[rank[0]] - w * x, b = ranks[rank[1]] - w * (1.0 - x);
                double y = x + step * (((b - a) + w) / (2.0 * w) - x);
                y = y < 0.0 ? 0.0 : y > 1.0 ? 1.0 : y;
                share[slot[0]] = y, share[slot[1]] = 1.0 - y;
                ranks[rank[0]] = a + w * y, ranks[rank[1]] = b + w * (1.0 - y);
                continue;
            }
            for (int i = 0; i < c; i++) { /* levels of the hosts without this expert, ascending */
                double b = ranks[rank[i]] - w * share[slot[i]];
                int k = i;
                while (k > 0 && level[k - 1] > b) level[k] = level[k - 1], k--;
                level[k] = b;
            }
            double sum = 0.0, water = 0.0, total = 0.0;
            for (int i = 0; i < c; i++) {
                sum += level[i];
                water = (w + sum) / (double)(i + 1);
                if (i + 1 == c || water <= level[i + 1]) break;
            }
            for (int i = 0; i < c; i++) {
                double x = share[slot[i]], b = ranks[rank[i]] - w * x, y = water - b;
                y = x + step * ((y > 0.0 ? y : 0.0) / w - x);
                y = y > 0.0 ? y : 0.0;
                ranks[rank[i]] = b, share[slot[i]] = y, total += y;
            }
            for (int i = 0; i < c; i++) {
                share[slot[i]] = share[slot[i]] / total;
                ranks[rank[i]] += w * share[slot[i]];
            }
        }
    }
}

/* B sets of loads [N][B][E] over each layer's slots [N][P]: share [N][B][P] in and out, ranks [N][B][G] out;
 * rank_of [P]. */
void eplb_fill(int N, int B, int E, int G, int P, const double *load, const int32_t *slots, const int32_t *rank_of,
               int sweeps, double omega, double *share, double *ranks) {
    double *level = get(P, sizeof(double));
    for (int n = 0; n < N; n++) {
        const int32_t *row = slots + (size_t)n * P;
        Replicas r = replicas_of(E, G, P, row, rank_of);
        for (int i = 0; i < B; i++) {
            size_t at = (size_t)n * B + i;
            fill(r, G, P, load + at * E, row, rank_of, sweeps, omega, share + at * P, ranks + at * G, level);
        }
        free_replicas(r);
    }
    free(level);
}

/* The choice of experts from a router's logits. Included once for each element type (elem, FN). */

#define MOST_EXPERTS 1024

struct FN(router) {
    const elem *logits;
    const float *bias;
    float *weights;
    int64_t *experts;
    long tokens, num_experts, top_k, groups, groups_kept, group_terms;
    float scaling;
    int sigmoid, normalize;
};

/* Index of the largest of n values, the first of equals; the value becomes -infinity. */
INLINE long FN(take_largest)(float *values, long n) {
    long best = 0;
    for (long i = 1; i < n; i++)
        if (values[i] > values[best]) best = i;
    values[best] = -__builtin_inff();
    return best;
}

/* Sigmoid or softmax of n logits, in float32. scores has room for a whole last vector. */
INLINE void FN(score_experts)(const elem *logits, long n, int sigmoid, float *scores) {
    vf largest = splat(-__builtin_inff()), sum = {0};
    for (long i = 0; i < n; i += LANES) {
        vf value = FN(load_n)(logits + i, n - i);
        store_f32(scores + i, sigmoid ? 1.0f / (1.0f + exp_vf(-value)) : value);
    }
    if (sigmoid) return;
    for (long i = n; i < ceil_div(n, LANES) * LANES; i++) scores[i] = -__builtin_inff();
    for (long i = 0; i < n; i += LANES) largest = max_vf(largest, load_f32(scores + i));
    float best = max_lanes(largest);
    for (long i = 0; i < n; i += LANES) {
        vf share = exp_vf(load_f32(scores + i) - best);
        sum += share;
        store_f32(scores + i, share);
    }
    float total = sum_lanes(sum);
    for (long i = 0; i < n; i += LANES) store_f32(scores + i, load_f32(scores + i) / total);
}

/* Leave only the experts of the best groups: a group scores the sum of its group_terms best. */
INLINE void FN(drop_groups)(const struct FN(router) *op, float *choice) {
    float group_scores[MOST_EXPERTS], copy[MOST_EXPERTS];
    char kept[MOST_EXPERTS] = {0};
    long width = op->num_experts / op->groups;
    memcpy(copy, choice, (size_t)op->num_experts * sizeof *copy);
    for (long group = 0; group < op->groups; group++) {
        group_scores[group] = 0;
        for (long term = 0; term < op->group_terms; term++)
            group_scores[group] += choice[group * width + FN(take_largest)(copy + group * width, width)];
    }
    for (long i = 0; i < op->groups_kept; i++) kept[FN(take_largest)(group_scores, op->groups)] = 1;
    for (long i = 0; i < op->num_experts; i++)
        if (!kept[i / width]) choice[i] = -__builtin_inff();
}

static void FN(router_item)(void *argument, long item) {
    const struct FN(router) *op = argument;
    float scores[MOST_EXPERTS], choice[MOST_EXPERTS];
    long end = min_long(op->tokens, (item + 1) * ROWS_PER_ITEM);
    for (long token = item * ROWS_PER_ITEM; token < end; token++) {
        float *weights = op->weights + token * op->top_k, sum = 0;
        FN(score_experts)(op->logits + token * op->num_experts, op->num_experts, op->sigmoid, scores);
        for (long i = 0; i < op->num_experts; i++) choice[i] = op->bias ? scores[i] + op->bias[i] : scores[i];
        if (op->groups > 1) FN(drop_groups)(op, choice);
        for (long k = 0; k < op->top_k; k++) {
            long expert = FN(take_largest)(choice, op->num_experts);
            op->experts[token * op->top_k + k] = expert;
            weights[k] = scores[expert];
            sum += weights[k];
        }
        for (long k = 0; k < op->top_k; k++)
            weights[k] = (op->normalize ? weights[k] / (sum + 1e-20f) : weights[k]) * op->scaling;
    }
}

/* logits [tokens, num_experts], bias [num_experts] or NULL -> weights and experts [tokens, top_k]. See
 * reference.choose_experts for the meaning of the rest; num_experts is at most MOST_EXPERTS. */
void FN(moeserve_choose_experts)(const elem *logits, const float *bias, float *weights, int64_t *experts, long tokens,
                                 long num_experts, long top_k, long groups, long groups_kept, long group_terms,
                                 float scaling, int sigmoid, int normalize, int threads) {
    struct FN(router) op = {logits,      bias,        weights, experts, tokens,   num_experts, top_k, groups,
                            groups_kept, group_terms, scaling, sigmoid, normalize};
    for_each_item(ceil_div(tokens, ROWS_PER_ITEM), FN(threads_for)(tokens * num_experts, threads), FN(router_item),
                  &op);
}

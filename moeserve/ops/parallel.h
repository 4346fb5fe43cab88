/* Work shared by the threads of the one pool that torch already has, and scratch memory kept between calls.
 *
 * The kernels are built without OpenMP: a second runtime in the process would fight torch's for the cores. They
 * borrow GOMP_parallel, the entry point of the runtime that torch loaded, given by address at start. Items are
 * handed out by a counter, so a thread that loses its core for a while delays nobody; no result depends on which
 * thread computed it.
 */
#ifndef MOESERVE_PARALLEL_H
#define MOESERVE_PARALLEL_H

#include <stdatomic.h>
#include <stdlib.h>

#include "simd.h"

typedef void team_fn(void (*body)(void *), void *argument, unsigned threads, unsigned flags);
typedef void item_fn(void *argument, long item);

static team_fn *start_team;

void moeserve_set_team(void *function) { start_team = (team_fn *)function; }

struct work {
    item_fn *run;
    void *argument;
    long count;
    atomic_long next;
};

static void take_items(void *pointer) {
    struct work *work = pointer;
    for (;;) {
        long item = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed);
        if (item >= work->count) return;
        work->run(work->argument, item);
    }
}

#define BYTES_PER_NANOSECOND 16          /* that one core reads from memory, about */
#define MULTIPLY_ADDS_PER_NANOSECOND 64  /* and computes */
#define NANOSECONDS_PER_THREAD 100000    /* of work; less is not worth a wake-up, and a wait if its core is taken */

/* How many of `threads` to use for work that reads so many bytes of weights or cache and computes so much. */
static int worth(long bytes, long multiply_adds, int threads) {
    long nanoseconds = max_long(bytes / BYTES_PER_NANOSECOND, multiply_adds / MULTIPLY_ADDS_PER_NANOSECOND);
    return (int)max_long(1, min_long(threads, nanoseconds / NANOSECONDS_PER_THREAD));
}

/* run(argument, i) for i in 0..count-1, in any order, on at most `threads` threads. */
static void for_each_item(long count, int threads, item_fn *run, void *argument) {
    struct work work = {run, argument, count, 0};
    if (threads > count) threads = (int)count;
    if (threads > 1 && start_team)
        start_team(take_items, &work, (unsigned)threads, 0);
    else
        take_items(&work);
}

/* Memory that the calling thread keeps, at least `size` bytes at a multiple of 64; its content is undefined. NULL
 * when there is none to be had. Valid until the same thread asks again. */
static void *scratch(size_t size) {
    static _Thread_local void *kept;
    static _Thread_local size_t kept_size;
    if (size > kept_size) {
        free(kept);
        size = (size + 4095) & ~(size_t)4095;
        kept = aligned_alloc(64, size);
        kept_size = kept ? size : 0;
    }
    return kept;
}

/* The next `size` bytes of a scratch block, kept aligned. */
INLINE void *carve(char **block, size_t size) {
    void *part = *block;
    *block += (size + 63) & ~(size_t)63;
    return part;
}

#endif

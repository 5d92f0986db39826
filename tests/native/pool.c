/* Threads that are slow just after they arrived at a barrier, as one is that the system puts off there: the others go on,
   and the next piece of work is of fewer threads. Prints how many pieces were done right. */

#include <stdatomic.h>
#include <unistd.h>

static _Thread_local int slow;

static long long delayed(long long arrived) {
    if (slow) usleep(200);
    return arrived;
}

#undef atomic_fetch_add_explicit
#define atomic_fetch_add_explicit(number, by, order) delayed(__atomic_fetch_add(number, by, __ATOMIC_ACQ_REL))

#include "numbers.h"
#include "pool.h"
#include <stdio.h>

static atomic_llong sum;

static void work(void *pool, int thread) {
    slow = thread > 0;
    atomic_fetch_add(&sum, 1 + thread);
    meet(pool);
}

int main(void) {
    Pool *pool = open_pool(4);
    long done = 0;
    long long want = 0;
    for (long n, round = 0; round < 400; round++) {
        n = 1 + (round * 7 + round / 5) % 4, want += n * (n + 1) / 2;
        run(pool, (int)n, work, pool);
        done += sum == want;
    }
    close_pool(pool);
    printf("%ld\n", done);
    return 0;
}

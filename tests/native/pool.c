/* Threads at barriers when it is least convenient. Prints how many pieces of work were done right of each kind: with
   threads that are slow just after they arrived, as one is that the system puts off there (the others go on, and the
   next piece is of fewer threads), and with a caller that comes just as the others fall asleep. */

#include <stdatomic.h>
#include <unistd.h>

static _Thread_local int slow;

static long long delayed(long long arrived) {
    if (slow) usleep(200);
    return arrived;
}

#undef atomic_fetch_add_explicit
#define atomic_fetch_add_explicit(number, by, order) delayed(atomic_fetch_add(number, by))

#include "numbers.h"
#include "pool.h"
#include <stdio.h>

static atomic_llong sum;
static int64_t late;

static void of_slow_threads(void *pool, int thread) {
    slow = thread > 0;
    atomic_fetch_add(&sum, 1 + thread);
    meet(pool);
}

static void of_a_late_caller(void *pool, int thread) {
    slow = 0;
    if (!thread)
        for (int64_t end = nanoseconds() + late; nanoseconds() < end;) {}
    atomic_fetch_add(&sum, 1 + thread);
    meet(pool);
}

int main(void) {
    Pool *pool = open_pool(4);
    long done = 0;
    long long want = 0;
    for (long n, round = 0; round < 400; round++) {
        n = 1 + (round * 7 + round / 5) % 4, want += n * (n + 1) / 2;
        run(pool, (int)n, of_slow_threads, pool);
        done += sum == want;
    }
    close_pool(pool), pool = open_pool(2); /* of whom none sleeps on */
    printf("%ld", done), done = 0;
    for (long round = 0; round < 20000; round++) {
        late = SPIN_NANOSECONDS + round % 400 * 50, want += 3;
        run(pool, 2, of_a_late_caller, pool);
        done += sum == want;
    }
    close_pool(pool);
    printf(" %ld\n", done);
    return 0;
}

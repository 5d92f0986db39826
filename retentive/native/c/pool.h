/* A few threads that work on the same token: each runs the same function and meets the others at barriers.

The caller is the first of them. Who waits spins for a moment, since a phase of a token takes microseconds, and sleeps
then, since the processor may be another program's.
*/

#pragma once
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { MOST_THREADS = 64, SPINS = 4000 }; /* some tens of microseconds */

typedef struct Pool Pool;
typedef void Work(void *what, int thread);
typedef struct { Pool *pool; int thread; } Member;

struct Pool {
    int threads;
    Work *work;
    void *what;
    pthread_mutex_t lock;
    pthread_cond_t change;
    pthread_t members[MOST_THREADS];
    Member names[MOST_THREADS];
    _Alignas(64) atomic_int round; /* of work; a negative number ends the threads */
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int passed; /* barriers so far */
};

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* until *number is no longer `was` */
static void wait_for_change(Pool *p, atomic_int *number, int was) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(number, memory_order_acquire) != was) return;
        pause_briefly();
    }
    pthread_mutex_lock(&p->lock);
    while (atomic_load_explicit(number, memory_order_acquire) == was) pthread_cond_wait(&p->change, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

static void tell_change(Pool *p, atomic_int *number, int now) {
    pthread_mutex_lock(&p->lock);
    atomic_store_explicit(number, now, memory_order_release);
    pthread_cond_broadcast(&p->change);
    pthread_mutex_unlock(&p->lock);
}

/* all threads come here before any goes on */
static void meet(Pool *p) {
    if (p->threads == 1) return;
    int was = atomic_load_explicit(&p->passed, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel) + 1 < p->threads)
        wait_for_change(p, &p->passed, was);
    else {
        atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
        tell_change(p, &p->passed, was == INT_MAX ? 0 : was + 1);
    }
}

static void *member(void *name) {
    Pool *p = ((Member *)name)->pool;
    for (int round = 0;;) {
        wait_for_change(p, &p->round, round);
        round = atomic_load_explicit(&p->round, memory_order_acquire);
        if (round < 0) return NULL;
        p->work(p->what, ((Member *)name)->thread);
        meet(p);
    }
}

/* `work(what, thread)` in every thread of the pool; returns when all are done */
static void run(Pool *p, Work *work, void *what) {
    p->work = work, p->what = what;
    int round = atomic_load_explicit(&p->round, memory_order_relaxed);
    if (p->threads > 1) tell_change(p, &p->round, round == INT_MAX ? 0 : round + 1);
    work(what, 0);
    meet(p);
}

static void close_pool(Pool *p) {
    if (!p) return;
    tell_change(p, &p->round, -1);
    for (int t = 1; t < p->threads; t++) pthread_join(p->members[t], NULL);
    pthread_mutex_destroy(&p->lock), pthread_cond_destroy(&p->change);
    free(p);
}

/* NULL when there was no memory, or no threads */
static Pool *open_pool(int threads) {
    Pool *p = aligned_alloc(64, (sizeof(Pool) + 63) / 64 * 64);
    if (!p) return NULL;
    p->threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    atomic_init(&p->round, 0), atomic_init(&p->arrived, 0), atomic_init(&p->passed, 0);
    pthread_mutex_init(&p->lock, NULL), pthread_cond_init(&p->change, NULL);
    for (int t = 1; t < p->threads; t++) {
        p->names[t] = (Member){p, t};
        if (!pthread_create(&p->members[t], NULL, member, &p->names[t])) continue;
        p->threads = t; /* those that began have seen no work yet */
        close_pool(p);
        return NULL;
    }
    return p;
}

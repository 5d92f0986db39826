/* A few threads that work on the same tokens: each runs the same function and meets the others at barriers.

The caller is the first of them. Who waits spins for a moment, since a phase of a token takes microseconds, and sleeps
then, since the processor may be another program's. A call may use fewer threads than there are: the others sleep on.
In a browser they are workers of the page, which come when they can; without shared memory the caller is alone.
*/

#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef void Work(void *what, int thread);

#if defined(__wasm__) && !defined(__wasm_atomics__)

typedef struct { int threads; char *space; int64_t space_bytes; } Pool;

INLINE void meet(Pool *p) { (void)p; }
INLINE void run(Pool *p, int threads, Work *work, void *what) { (void)p, (void)threads, work(what, 0); }
INLINE void start_members(Pool *p, int threads) { p->threads = 1, (void)threads; }
INLINE void end_members(Pool *p) { (void)p; }

#else

#include <stdatomic.h>
#ifndef __wasm__
#include <pthread.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif
#endif

enum { MOST_THREADS = 64 };
enum { SPIN_NANOSECONDS = 50000, SPINS = 16, LOOKS = 20000 }; /* SPINS between two looks at the clock; LOOKS without */

typedef struct Pool Pool;
typedef struct { Pool *pool; int thread; } Member;

struct Pool {
    atomic_int threads;  /* that there are */
    int active;          /* that work now */
    unsigned caller;     /* the core that the caller is on */
    char *space;         /* of the caller's, kept from call to call */
    int64_t space_bytes;
    Work *work;
    void *what;
#ifndef __wasm__
    pid_t process; /* whose the threads are */
    pthread_mutex_t lock;
    pthread_cond_t change;
    pthread_t members[MOST_THREADS];
    Member names[MOST_THREADS];
#endif
    atomic_int sleepers;
    _Alignas(64) atomic_llong round; /* 128 a piece of work, and how many work on it; -1 ends the threads */
    _Alignas(64) atomic_llong arrived;
    _Alignas(64) atomic_llong passed; /* barriers so far */
};

static inline unsigned core(void) {
    unsigned number = 0;
#ifdef __linux__
    syscall(SYS_getcpu, &number, NULL, NULL);
#endif
    return number;
}

/* Who was woken up on the caller's core goes to another one: the system likes to wake a thread beside its waker, and
   moves it only after milliseconds, in which both would wait for each other at every barrier. */
static void leave_core(unsigned callers) {
#ifdef __linux__
    unsigned long mask[16] = {0}, others[16]; /* of 1,024 cores */
    if (core() != callers || callers >= sizeof mask * 8) return;
    if (syscall(SYS_sched_getaffinity, 0, sizeof mask, mask) < 0) return;
    memcpy(others, mask, sizeof mask);
    others[callers / (8 * sizeof *mask)] &= ~(1ul << callers % (8 * sizeof *mask));
    if (!syscall(SYS_sched_setaffinity, 0, sizeof others, others)) syscall(SYS_sched_setaffinity, 0, sizeof mask, mask);
#else
    (void)callers;
#endif
}

#ifdef __wasm__

/* whether *number is soon no longer `was`; asking the browser for the time takes as long as many looks */
static int changes_soon(atomic_llong *number, long long was) {
    for (int i = 0; i < LOOKS; i++)
        if (atomic_load_explicit(number, memory_order_acquire) != was) return 1;
    return 0;
}

static void sleep_until_change(Pool *p, atomic_llong *number, long long was) {
    atomic_fetch_add(&p->sleepers, 1); /* before the number is looked at: who changes it then sees the sleeper */
    while (atomic_load(number) == was) __builtin_wasm_memory_atomic_wait64((long long *)number, was, -1);
    atomic_fetch_sub(&p->sleepers, 1);
}

static void wake(Pool *p, atomic_llong *number) {
    (void)p, __builtin_wasm_memory_atomic_notify((int *)number, MOST_THREADS);
}

#else

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static inline int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

/* whether *number is soon no longer `was` */
static int changes_soon(atomic_llong *number, long long was) {
    int64_t end = 0;
    do {
        for (int i = 0; i < SPINS; i++) {
            if (atomic_load_explicit(number, memory_order_acquire) != was) return 1;
            pause_briefly();
        }
        if (!end) end = nanoseconds() + SPIN_NANOSECONDS;
    } while (nanoseconds() < end);
    return 0;
}

static void sleep_until_change(Pool *p, atomic_llong *number, long long was) {
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->sleepers, 1); /* before the number is looked at: who changes it then sees the sleeper */
    while (atomic_load(number) == was) pthread_cond_wait(&p->change, &p->lock);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->lock);
}

static void wake(Pool *p, atomic_llong *number) {
    (void)number;
    pthread_mutex_lock(&p->lock); /* no sleeper is between its look and its sleep */
    pthread_cond_broadcast(&p->change);
    pthread_mutex_unlock(&p->lock);
}

#endif

static void wait_for_change(Pool *p, atomic_llong *number, long long was) {
    if (!changes_soon(number, was)) sleep_until_change(p, number, was);
}

/* An exchange, although a store would do: qemu lets a store be seen after the load that follows it, and a thread that
   falls asleep just then would not be woken. On x86 both are the same instruction. */
static void tell_change(Pool *p, atomic_llong *number, long long now) {
    atomic_exchange(number, now);
    if (atomic_load(&p->sleepers)) wake(p, number);
}

/* all threads that work come here before any goes on */
static void meet(Pool *p) {
    int active = p->active; /* before arriving: after it the others may go on, and the next work be of fewer */
    if (active == 1) return;
    long long was = atomic_load_explicit(&p->passed, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel) + 1 < active) {
        wait_for_change(p, &p->passed, was);
        return;
    }
    atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
    tell_change(p, &p->passed, was + 1);
}

/* what a member does: all work after `round` that is for as many threads */
static void work_as_member(Pool *p, int thread, long long round) {
    for (;;) {
        wait_for_change(p, &p->round, round);
        round = atomic_load_explicit(&p->round, memory_order_acquire);
        if (round < 0) return;
        if (thread >= round % 128) continue;
        leave_core(p->caller);
        p->work(p->what, thread);
        meet(p);
    }
}

static void init_members(Pool *p) {
    p->active = 1, atomic_init(&p->threads, 1), atomic_init(&p->sleepers, 0);
    atomic_init(&p->round, 0), atomic_init(&p->arrived, 0), atomic_init(&p->passed, 0);
}

#ifdef __wasm__

/* A thread that the page has started, one of at most MOST_THREADS. It is counted when it knows what is no work of its. */
static void join(Pool *p) {
    long long round = atomic_load(&p->round);
    work_as_member(p, atomic_fetch_add(&p->threads, 1), round);
}

static void start_members(Pool *p, int threads) { (void)threads, init_members(p); }
static void end_members(Pool *p) { tell_change(p, &p->round, -1); }

#else

static void *member(void *name) {
    work_as_member(((Member *)name)->pool, ((Member *)name)->thread, 0);
    return NULL;
}

/* the members, of which none runs; as many as the system gives */
static void start_members(Pool *p, int threads) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    init_members(p), p->process = getpid();
    pthread_mutex_init(&p->lock, NULL), pthread_cond_init(&p->change, NULL);
    for (int t = 1; t < threads; t++, p->threads++) {
        p->names[t] = (Member){p, t};
        if (pthread_create(&p->members[t], NULL, member, &p->names[t])) return;
    }
}

static void end_members(Pool *p) {
    if (p->process != getpid()) return; /* a fork copied the memory, but no threads */
    tell_change(p, &p->round, -1);
    for (int t = 1; t < p->threads; t++) pthread_join(p->members[t], NULL);
    pthread_mutex_destroy(&p->lock), pthread_cond_destroy(&p->change);
}

#endif

/* `work(what, thread)` in so many threads of the pool; returns when all are done */
static void run(Pool *p, int threads, Work *work, void *what) {
#ifndef __wasm__
    if (p->process != getpid()) start_members(p, p->threads);
#endif
    p->caller = core();
    p->active = threads < 1 ? 1 : threads > p->threads ? p->threads : threads;
    p->work = work, p->what = what;
    long long round = atomic_load_explicit(&p->round, memory_order_relaxed);
    if (p->active > 1) tell_change(p, &p->round, (round / 128 + 1) * 128 + p->active);
    work(what, 0);
    meet(p);
}

#endif

/* memory for a call, or NULL */
static char *space_of_pool(Pool *p, int64_t bytes) {
    if (bytes <= p->space_bytes) return p->space;
    free(p->space);
    p->space = aligned_alloc(64, (bytes + 63) / 64 * 64);
    p->space_bytes = p->space ? bytes : 0;
    return p->space;
}

static void close_pool(Pool *p) {
    if (!p) return;
    end_members(p);
    free(p->space);
    free(p);
}

/* NULL when there was no memory */
static Pool *open_pool(int threads) {
    Pool *p = aligned_alloc(64, (sizeof(Pool) + 63) / 64 * 64);
    if (!p) return NULL;
    p->space = NULL, p->space_bytes = 0;
    start_members(p, threads < 1 ? 1 : threads);
    return p;
}

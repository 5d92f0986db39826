/* Work space of a thread. */

#pragma once
#include "numbers.h"
#include <stdlib.h>

#ifdef __wasm__ /* the space is never freed */
static int in_turn; /* a lock: malloc is not thread-safe there, and while threads work only this function calls it */
static void *space_of_thread_with(i64 bytes) {
    static _Thread_local void *space;
    static _Thread_local i64 size;
    if (bytes > size) {
        while (__atomic_exchange_n(&in_turn, 1, __ATOMIC_ACQUIRE)) {}
        free(space);
        space = aligned_alloc(64, round_up(bytes, 64));
        size = space ? bytes : 0;
        __atomic_store_n(&in_turn, 0, __ATOMIC_RELEASE);
    }
    return space;
}
#else
#include <pthread.h>

/* kept between calls, since fresh pages cost more than the work of a short call; freed when its thread ends */
static pthread_key_t space_key;
static int have_key;
__attribute__((constructor)) static void make_space_key(void) { have_key = !pthread_key_create(&space_key, free); }

static void *space_of_thread_with(i64 bytes) {
    static _Thread_local void *space;
    static _Thread_local i64 size;
    if (bytes > size) {
        free(space);
        space = aligned_alloc(64, round_up(bytes, 64));
        size = space ? bytes : 0;
        if (have_key) pthread_setspecific(space_key, space);
    }
    return space;
}
#endif

/* returns room for the next `floats` at *at, and moves *at on */
static float *take(char **at, i64 floats) {
    float *p = (float *)*at;
    *at += round_up(floats * 4, 64) + 64; /* the gap avoids cache conflicts between arrays of 2^n floats */
    return p;
}

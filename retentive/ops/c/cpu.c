/* Chunkwise retention and the decode step for CPUs, as one compilation unit. The formulas are those of blocked.py.

Built by cpu.py with the machine's compiler at first use. One task is one head of one sequence: it processes its chunks
in order, with its state in the cache. Tasks share nothing, so results do not depend on the threads. Everything that is
no operand of a product is float32: S, dS, decays.
*/

#include "forward.c"
#include "backward.c"
#include "step.c"
#include "pages.h"

/* returns 0, or 1 if memory ran out */
static int for_each_head(const Call *c, int backward) {
    int failed = 0;
    i64 elements = c->begin[c->N] * c->H, size = size_of(c->dtype), span = c->C * c->group, last = c->N - 1;
    i64 checkpoints = c->first_checkpoint[last] + (c->begin[c->N] - c->begin[last] + span - 1) / span;
    in_large_pages(c->o, elements * c->V * size), in_large_pages(c->dv, elements * c->V * size);
    in_large_pages(c->dq, elements * c->K * size), in_large_pages(c->dk, elements * c->K * size);
    if (!backward) in_large_pages(c->checkpoints, checkpoints * c->H * c->K * c->V * 4);
#pragma omp parallel for schedule(dynamic, 1) num_threads(c->threads)
    for (i64 task = 0; task < c->N * c->H; task++) {
        Space s;
        if (!get_space(c, backward, &s)) {
#pragma omp atomic write
            failed = 1;
            continue;
        }
#ifdef TILES
        TileConfig before;
        if (PAIR(c) == 2) open_tiles(&before, 16);
#endif
        (backward ? backward_head : forward_head)(c, &s, task / c->H, task % c->H);
#ifdef TILES
        if (PAIR(c) == 2) close_tiles(&before);
#endif
    }
    return failed;
}

int retention_forward(const Call *c) { return for_each_head(c, 0); }
int retention_backward(const Call *c) { return for_each_head(c, 1); }

int has_half(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}

/* pairs_of bfloat16 */
int can_multiply_pairs(void) { return (int)pairs_of(1); }

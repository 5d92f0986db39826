/* Large pages for memory that is written, or read, as a whole. */

#pragma once
#include "numbers.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

enum { LARGE_PAGE = 1 << 21 };

/* The kernel provides fresh memory page by page at the first write: with 4 KB pages that took as long as the arithmetic.
   Weights, read as a whole for every token, come faster from large pages (both in docs/LOG.md). madvise is a hint,
   harmless where the kernel ignores it. */
static void in_large_pages(const void *p, i64 bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    uintptr_t first = round_up((uintptr_t)p, LARGE_PAGE), end = ((uintptr_t)p + bytes) / LARGE_PAGE * LARGE_PAGE;
    if (p && end > first) madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

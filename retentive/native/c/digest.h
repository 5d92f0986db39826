/* BLAKE2b with 16 bytes of digest (RFC 7693), as Python's hashlib has it: files of memories tell damage by it. */

#pragma once
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { DIGEST_BYTES = 16, DIGEST_BLOCK = 128 };

typedef struct {
    uint64_t h[8], length; /* of what was hashed, in bytes */
    uint8_t block[DIGEST_BLOCK];
    int held; /* bytes in it */
} Digest;

static const uint64_t digest_start[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                         0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};

static void begin_digest(Digest *d) {
    memset(d, 0, sizeof *d);
    memcpy(d->h, digest_start, sizeof d->h);
    d->h[0] ^= 0x01010000 ^ DIGEST_BYTES;
}

static uint64_t turned(uint64_t x, int by) { return x >> by | x << (64 - by); }

static void mix(uint64_t *v, int a, int b, int c, int d, uint64_t x, uint64_t y) {
    v[a] += v[b] + x, v[d] = turned(v[d] ^ v[a], 32), v[c] += v[d], v[b] = turned(v[b] ^ v[c], 24);
    v[a] += v[b] + y, v[d] = turned(v[d] ^ v[a], 16), v[c] += v[d], v[b] = turned(v[b] ^ v[c], 63);
}

static void digest_block(Digest *d, int last) {
    static const uint8_t order[10][16] = {
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
        {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
        {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
        {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
        {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
    uint64_t v[16], m[16];
    memcpy(v, d->h, 64), memcpy(v + 8, digest_start, 64), memcpy(m, d->block, DIGEST_BLOCK); /* little-endian, as all here */
    v[12] ^= d->length, v[14] ^= last ? ~0ull : 0;
    for (int round = 0; round < 12; round++) {
        const uint8_t *s = order[round % 10];
        for (int i = 0; i < 4; i++) mix(v, i, i + 4, i + 8, i + 12, m[s[2 * i]], m[s[2 * i + 1]]);
        for (int i = 0; i < 4; i++)
            mix(v, i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12, m[s[8 + 2 * i]], m[s[9 + 2 * i]]);
    }
    for (int i = 0; i < 8; i++) d->h[i] ^= v[i] ^ v[i + 8];
    d->held = 0;
}

static void add_to_digest(Digest *d, const void *data, int64_t bytes) {
    const uint8_t *from = data;
    while (bytes > 0) {
        if (d->held == DIGEST_BLOCK) digest_block(d, 0); /* a full one waits, since it may be the last */
        int64_t some = DIGEST_BLOCK - d->held < bytes ? DIGEST_BLOCK - d->held : bytes;
        memcpy(d->block + d->held, from, some);
        d->held += (int)some, d->length += some, from += some, bytes -= some;
    }
}

/* as hexadecimal digits, ended by a 0 */
static void end_digest(Digest *d, char hex[2 * DIGEST_BYTES + 1]) {
    memset(d->block + d->held, 0, DIGEST_BLOCK - d->held);
    digest_block(d, 1);
    for (int i = 0; i < DIGEST_BYTES; i++) snprintf(hex + 2 * i, 3, "%02x", (unsigned)(d->h[i / 8] >> i % 8 * 8 & 255));
}

/* y = x W^T in the tiles of AMX, which multiply 16 rows of x by 16 of a matrix, 64 bytes of each, at once.

A tile of weights is 16 lines of a panel, just as they lie, and x is made ready in tiles as well. With bfloat16 sums are
made in another order than in vectors. Integers of x are two digits, of a sign and 8 bits each: what the tiles add up
is exact, and what follows is done as in vectors, so that the bits are the same.
*/

#pragma once
#include "products.h"
#include "weights.h"

enum { TILE = 16, TILE_BYTES = TILE * LINE, TILE_COLUMNS = 32 }; /* rows, units and lines of a tile; bfloat16 */
enum { DEPTH_BYTES = 16 * TILE_BYTES }; /* of a panel, multiplied by all rows of x: two of them stay in the first cache */

/* tiles of one digit of a group: in the last one x is padded with zeros, whatever weights these then meet */
INLINE i64 tiles_of_group(i64 group) { return (group + LINE - 1) / LINE; }

#ifdef TILES
/* Some tiles of y, [16 down][16 across], from sums of so many tiles of x and lines: four at once, so that each tile that
   is loaded is multiplied twice. Panels are `bytes` apart, rows of tiles of x `x_ld` bytes. */
INLINE void four_tiles(int down, int across, i64 tiles, const uint8_t *x, i64 x_ld, const uint8_t *at, i64 bytes,
                       int more, float *y, i64 ld) {
    if (more) {
        _tile_loadd(0, y, ld * 4);
        if (across == 2) _tile_loadd(1, y + TILE, ld * 4);
        if (down == 2) _tile_loadd(2, y + TILE * ld, ld * 4);
        if (down == 2 && across == 2) _tile_loadd(3, y + TILE * ld + TILE, ld * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (i64 t = 0; t < tiles; t++, x += TILE_BYTES, at += TILE_BYTES) {
        _tile_loadd(6, at, LINE);
        _tile_loadd(4, x, LINE);
        _tile_dpbf16ps(0, 4, 6);
        if (down == 2) {
            _tile_loadd(5, x + x_ld, LINE);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (across == 2) {
            _tile_loadd(7, at + bytes, LINE);
            _tile_dpbf16ps(1, 4, 7);
            if (down == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, y, ld * 4);
    if (across == 2) _tile_stored(1, y + TILE, ld * 4);
    if (down == 2) _tile_stored(2, y + TILE * ld, ld * 4);
    if (down == 2 && across == 2) _tile_stored(3, y + TILE * ld + TILE, ld * 4);
}

/* y [rows][16 a panel] of panels of bfloat16, x in tiles */
INLINE void pairs_in_tiles(int across, i64 lines, const uint8_t *at, i64 bytes, const int32_t *x, i64 rows, float *y,
                           i64 ld) {
    _Alignas(64) uint8_t last[2][TILE_BYTES] = {{0}}; /* the lines of a tile that is not full, and zeros */
    _Alignas(64) float spare[2 * TILE][2 * TILE];     /* for the rows of y that there are not */
    i64 tiles = (lines + TILE - 1) / TILE, x_ld = tiles * TILE_BYTES, step = DEPTH_BYTES / TILE_BYTES;
    for (int n = 0; n < across; n++)
        memcpy(last[n], at + n * bytes + lines / TILE * TILE_BYTES, lines % TILE * LINE);
    for (i64 t = 0; t < tiles; t += step) {
        i64 whole_tiles = smaller(step, lines / TILE - t), begun = t > 0;
        for (i64 r = 0; r < rows; r += 2 * TILE) {
            const uint8_t *from = (const uint8_t *)x + r / TILE * x_ld + t * TILE_BYTES;
            const uint8_t *panel = at + t * TILE_BYTES;
            i64 n = smaller(rows - r, 2 * TILE), spares = n % TILE, to_ld = spares ? 2 * TILE : ld;
            float *to = spares ? spare[0] : y + r * ld;
            for (i64 i = 0; spares && begun && i < n; i++) memcpy(spare[i], y + (r + i) * ld, across * LINE);
            if (n > TILE) four_tiles(2, across, whole_tiles, from, x_ld, panel, bytes, begun, to, to_ld);
            else four_tiles(1, across, whole_tiles, from, x_ld, panel, bytes, begun, to, to_ld);
            if (lines % TILE && t + step >= tiles) {
                from += whole_tiles * TILE_BYTES;
                if (n > TILE) four_tiles(2, across, 1, from, x_ld, last[0], TILE_BYTES, 1, to, to_ld);
                else four_tiles(1, across, 1, from, x_ld, last[0], TILE_BYTES, 1, to, to_ld);
            }
            for (i64 i = 0; spares && i < n; i++) memcpy(y + (r + i) * ld, spare[i], across * LINE);
        }
    }
}

/* int32 sums [digit][panel][16][16] of a group, from its tiles of two digits of x one after the other */
INLINE void group_in_tiles(int across, i64 tiles, const uint8_t *x, const uint8_t *at, i64 bytes, int32_t *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i64 t = 0; t < tiles; t++, x += TILE_BYTES, at += TILE_BYTES) {
        _tile_loadd(6, at, LINE);
        _tile_loadd(4, x, LINE);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(5, x + tiles * TILE_BYTES, LINE);
        _tile_dpbsud(2, 5, 6);
        if (across == 2) {
            _tile_loadd(7, at + bytes, LINE);
            _tile_dpbsud(1, 4, 7);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, sums, LINE);
    if (across == 2) _tile_stored(1, sums + TILE * TILE, LINE);
    _tile_stored(2, sums + 2 * TILE * TILE, LINE);
    if (across == 2) _tile_stored(3, sums + 3 * TILE * TILE, LINE);
}

typedef struct { /* what integers stand for, from a group on */
    i64 groups, zero;
    const uint16_t *scales; /* of the weights [panel][groups][16] */
    const float *scale;     /* of x [rows][groups] */
    const int32_t *sum;     /* of x [rows][groups] */
} Stands;

/* y [rows][16 a panel] += what the sums of group g stand for */
INLINE void add_group(int across, Stands s, i64 g, const int32_t *sums, i64 rows, float (*y)[2 * TILE]) {
    for (int n = 0; n < across; n++) {
        vf of_rows = scales_at(s.scales + (n * s.groups + g) * ROWS);
        const int32_t *high = sums + n * TILE * TILE, *low = high + 2 * TILE * TILE;
        for (i64 r = 0; r < rows; r++) {
            vi digits = (vi)load((const float *)(high + r * TILE)) << 8;
            vi exact = digits + (vi)load((const float *)(low + r * TILE)) - (int32_t)s.zero * s.sum[r * s.groups + g];
            vf scale = of_rows * splat(s.scale[r * s.groups + g]);
            store(y[r] + n * TILE, load(y[r] + n * TILE) + __builtin_convertvector(exact, vf) * scale);
        }
    }
}

/* y [rows][16 a panel] of panels of bytes, x in tiles of digits; a group is `lines` long */
INLINE void digits_in_tiles(int across, i64 lines, const uint8_t *at, i64 bytes, Stands s, const int32_t *x, i64 rows,
                            float *y, i64 ld) {
    _Alignas(64) int32_t sums[2][4 * TILE * TILE]; /* of two groups: one is multiplied while the other is added */
    _Alignas(64) float all[TILE][2 * TILE];
    i64 tiles = tiles_of_group(lines * 4), step = DEPTH_BYTES / (lines * LINE);
    for (i64 first = 0, last; first < s.groups; first = last) {
        last = smaller(first + step, s.groups);
        for (i64 r = 0; r < rows; r += TILE) {
            const uint8_t *from = (const uint8_t *)x + (r * s.groups + first * TILE) * tiles * 2 * LINE;
            i64 n = smaller(TILE, rows - r);
            Stands of_tile = {s.groups, s.zero, s.scales, s.scale + r * s.groups, s.sum + r * s.groups};
            for (i64 i = 0; i < n; i++)
                if (first) memcpy(all[i], y + (r + i) * ld, across * LINE);
                else memset(all[i], 0, across * LINE);
            for (i64 g = first; g < last; g++, from += tiles * 2 * TILE_BYTES) {
                group_in_tiles(across, tiles, from, at + g * lines * LINE, bytes, sums[g % 2]);
                if (g > first) add_group(across, of_tile, g - 1, sums[(g - 1) % 2], n, all);
            }
            add_group(across, of_tile, last - 1, sums[(last - 1) % 2], n, all);
            for (i64 i = 0; i < n; i++) memcpy(y + (r + i) * ld, all[i], across * LINE);
        }
    }
}
#endif

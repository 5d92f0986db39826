/* y = x W^T in the tiles of AMX, which multiply 16 rows of x by 16 of a matrix, 64 bytes of each, at once.

A tile of weights is 16 lines of a panel, just as they lie, and x is made ready in tiles as well. With bfloat16 sums are
made in another order than in vectors. Integers of x of 16 bits are two digits, of a sign and 8 bits each: what the tiles
add up is exact, and what follows is done as in vectors, so that the bits are the same.
*/

#pragma once
#include "products.h"
#include "weights.h"

enum { TILE = 16, TILE_BYTES = TILE * LINE, TILE_COLUMNS = 32 }; /* rows, units and lines of a tile; bfloat16 */
enum { TILES_DEEP = 16 }; /* of a panel, multiplied by all rows of x: those of two panels stay in the first cache */

/* tiles of one digit of a group: in the last one x is padded with zeros, whatever weights these then meet */
INLINE i64 tiles_of_group(i64 group) { return (group + LINE - 1) / LINE; }

typedef struct { /* rows of x in tiles of `width` rows: 16, or as many as there are */
    const uint8_t *at;
    i64 rows, width, ld; /* ld: bytes from tiles to those of the next rows */
} Tiled;

#ifdef TILES
INLINE void ask_ahead(const uint8_t *at, i64 ahead) {
    for (i64 i = 0; ahead && i < TILE_BYTES; i += LINE) __builtin_prefetch(at + ahead + i);
}

/* Some tiles of y, [16 down][16 across], += the products of so many tiles of x and lines: four at once, so that each tile
   that is loaded is multiplied twice. Panels are `bytes` apart; `begun`: y is there, else 0. */
INLINE void four_tiles(int down, int across, i64 tiles, const uint8_t *x, Tiled in, const uint8_t *at, i64 bytes,
                       i64 ahead, int begun, float *y, i64 ld) {
    if (begun) {
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
    for (i64 t = 0; t < tiles; t++, x += in.width * LINE, at += TILE_BYTES) {
        ask_ahead(at, ahead);
        _tile_loadd(6, at, LINE);
        _tile_loadd(4, x, LINE);
        _tile_dpbf16ps(0, 4, 6);
        if (down == 2) {
            _tile_loadd(5, x + in.ld, LINE);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (across == 2) {
            ask_ahead(at + bytes, ahead);
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

/* y [rows][16 a panel] of panels of bfloat16; what lies `ahead` is asked for */
INLINE void pairs_in_tiles(int across, i64 lines, const uint8_t *at, i64 bytes, i64 ahead, Tiled in, float *y, i64 ld) {
    _Alignas(64) uint8_t last[2][TILE_BYTES] = {{0}}; /* the lines of a tile that is not full, and zeros */
    _Alignas(64) float spare[2 * TILE][2 * TILE];     /* for the rows of y that there are not */
    i64 tiles = (lines + TILE - 1) / TILE, step = in.rows > 2 * TILE ? TILES_DEEP : tiles;
    for (int n = 0; n < across; n++)
        memcpy(last[n], at + n * bytes + lines / TILE * TILE_BYTES, lines % TILE * LINE);
    for (i64 t = 0; t < tiles; t += step) {
        i64 whole_tiles = smaller(step, lines / TILE - t), begun = t > 0;
        for (i64 r = 0; r < in.rows; r += 2 * TILE) {
            const uint8_t *x = in.at + r / TILE * in.ld + t * in.width * LINE, *panel = at + t * TILE_BYTES;
            i64 n = smaller(in.rows - r, 2 * TILE), spares = n % in.width, to_ld = spares ? 2 * TILE : ld;
            float *to = spares ? spare[0] : y + r * ld;
            for (i64 i = 2 * TILE; i < 4 * TILE && r + i < in.rows; i++) /* these, the next ones, are far apart */
                for (int k = 0; k < across; k++) __builtin_prefetch(y + (r + i) * ld + k * TILE, 1);
            for (i64 i = 0; spares && begun && i < n; i++) memcpy(spare[i], y + (r + i) * ld, across * LINE);
            if (n > TILE) four_tiles(2, across, whole_tiles, x, in, panel, bytes, r ? 0 : ahead, begun, to, to_ld);
            else four_tiles(1, across, whole_tiles, x, in, panel, bytes, r ? 0 : ahead, begun, to, to_ld);
            if (lines % TILE && t + step >= tiles) {
                x += whole_tiles * in.width * LINE;
                if (n > TILE) four_tiles(2, across, 1, x, in, last[0], TILE_BYTES, 0, 1, to, to_ld);
                else four_tiles(1, across, 1, x, in, last[0], TILE_BYTES, 0, 1, to, to_ld);
            }
            for (i64 i = 0; spares && i < n; i++) memcpy(y + (r + i) * ld, spare[i], across * LINE);
        }
    }
}

/* int32 sums [2][panel][16][16] of a group, from its tiles at x and, unless it is 0, `other` bytes further on: low digits,
   or other rows */
INLINE void group_in_tiles(int across, i64 tiles, const uint8_t *x, i64 other, i64 width, const uint8_t *at, i64 bytes,
                           i64 ahead, int32_t *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i64 t = 0; t < tiles; t++, x += width * LINE, at += TILE_BYTES) {
        ask_ahead(at, ahead);
        _tile_loadd(6, at, LINE);
        _tile_loadd(4, x, LINE);
        _tile_dpbsud(0, 4, 6);
        if (other) {
            _tile_loadd(5, x + other, LINE);
            _tile_dpbsud(2, 5, 6);
        }
        if (across == 2) {
            ask_ahead(at + bytes, ahead);
            _tile_loadd(7, at + bytes, LINE);
            _tile_dpbsud(1, 4, 7);
            if (other) _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, sums, LINE);
    if (across == 2) _tile_stored(1, sums + TILE * TILE, LINE);
    if (other) _tile_stored(2, sums + 2 * TILE * TILE, LINE);
    if (other && across == 2) _tile_stored(3, sums + 3 * TILE * TILE, LINE);
}

typedef struct { /* what integers stand for, from a row and a panel on */
    i64 groups, zero;
    const uint16_t *scales, *minimums; /* of the weights [panel][groups][16] */
    const float *scale;                /* of x [rows][groups] */
    const int32_t *sum;                /* of x [rows][groups] */
} Stands;

/* y [rows][16 a panel] += what the sums of group g stand for: of two digits of 16 rows, or of one of up to 32 */
INLINE void add_group(int across, int digits, Stands s, i64 g, const int32_t *sums, i64 rows, float (*y)[2 * TILE]) {
    vf of_rows[2], least[2];
    for (int n = 0; n < across; n++) {
        i64 of_group = (n * s.groups + g) * ROWS;
        of_rows[n] = scales_at(s.scales + of_group);
        least[n] = s.minimums ? scales_at(s.minimums + of_group) : splat(0);
    }
    for (i64 r = 0; r < rows; r++) {
        float scale = s.scale[r * s.groups + g];
        int32_t sum = s.sum[r * s.groups + g], less = (int32_t)s.zero * sum;
        for (int n = 0; n < across; n++) {
            const int32_t *of_row = sums + (r / TILE * 2 + n) * TILE * TILE + r % TILE * TILE;
            vi exact = (vi)load((const float *)of_row);
            if (digits == 2) exact = (exact << 8) + (vi)load((const float *)(of_row + 2 * TILE * TILE));
            vf more = load(y[r] + n * TILE) + __builtin_convertvector(exact - less, vf) * (of_rows[n] * splat(scale));
            if (s.minimums) more += least[n] * splat(sum * scale);
            store(y[r] + n * TILE, more);
        }
    }
}

/* y [rows][16 a panel] of panels of bytes, x in tiles of digits; a group is `lines` long */
INLINE void digits_in_tiles(int across, int digits, i64 lines, const uint8_t *at, i64 bytes, i64 ahead, Stands s, Tiled in,
                            float *y, i64 ld) {
    _Alignas(64) int32_t sums[2][4 * TILE * TILE]; /* of two groups: one is multiplied while the other is added */
    _Alignas(64) float all[2 * TILE][2 * TILE];
    i64 tiles = tiles_of_group(lines * 4), step = in.rows > TILE ? TILES_DEEP * TILE / lines : s.groups;
    i64 of_group = digits * tiles * in.width * LINE, down = digits == 1 ? 2 * TILE : TILE; /* bytes of x; rows at once */
    for (i64 first = 0, last; first < s.groups; first = last) {
        last = smaller(first + step, s.groups);
        for (i64 r = 0; r < in.rows; r += down) {
            const uint8_t *x = in.at + r / TILE * in.ld + first * of_group;
            i64 n = smaller(down, in.rows - r), other = digits == 2 ? of_group / 2 : n > TILE ? in.ld : 0;
            Stands of_tile = {s.groups, s.zero, s.scales, s.minimums, s.scale + r * s.groups, s.sum + r * s.groups};
            for (i64 i = 0; i < n; i++)
                if (first) memcpy(all[i], y + (r + i) * ld, across * LINE);
                else memset(all[i], 0, across * LINE);
            for (i64 g = first; g < last; g++, x += of_group) {
                const uint8_t *group = at + g * lines * LINE;
                group_in_tiles(across, tiles, x, other, in.width, group, bytes, r ? 0 : ahead, sums[g % 2]);
                if (g > first) add_group(across, digits, of_tile, g - 1, sums[(g - 1) % 2], n, all);
            }
            add_group(across, digits, of_tile, last - 1, sums[(last - 1) % 2], n, all);
            for (i64 i = 0; i < n; i++) memcpy(y + (r + i) * ld, all[i], across * LINE);
        }
    }
}
#endif

/* One row of RGB pixels as three rows of one channel, and back. */
#ifndef FEATHERWEIGHT_ROWS_H
#define FEATHERWEIGHT_ROWS_H

#include "views.h"

typedef struct {
    int16_t *r, *g, *b; /* one after the other in memory, `padded` values each */
    int padded;         /* a multiple of 16; loops over & ~15 say so to the compiler */
} Row;

INLINE Row row_at(int16_t *planes, int padded)
{
    return (Row){planes, planes + padded, planes + 2 * padded, padded};
}

/* Eight RGB pixels fill three vectors. Lane by lane, each channel is picked from the vector that holds it, and then put
 * in order: a blend costs less than a shuffle of two vectors, which is what the compiler makes of the plain loop. */
INLINE void split_pixels(const int16_t *pixels, Row row)
{
    for (ptrdiff_t i = 0; i < row.padded; i += 8, pixels += 24) {
        Eight u, v, w;
        memcpy(&u, pixels, sizeof u), memcpy(&v, pixels + 8, sizeof v), memcpy(&w, pixels + 16, sizeof w);
        Eight r = __builtin_shufflevector(u, v, 0, 9, 2, 3, 12, 5, 6, 15);
        Eight g = __builtin_shufflevector(u, v, 0, 1, 10, 3, 4, 13, 6, 7);
        Eight b = __builtin_shufflevector(u, v, 8, 1, 2, 11, 4, 5, 14, 7);
        r = __builtin_shufflevector(r, w, 0, 1, 10, 3, 4, 13, 6, 7);
        g = __builtin_shufflevector(g, w, 8, 1, 2, 11, 4, 5, 14, 7);
        b = __builtin_shufflevector(b, w, 0, 9, 2, 3, 12, 5, 6, 15);
        r = __builtin_shufflevector(r, r, 0, 3, 6, 1, 4, 7, 2, 5);
        g = __builtin_shufflevector(g, g, 1, 4, 7, 2, 5, 0, 3, 6);
        b = __builtin_shufflevector(b, b, 2, 5, 0, 3, 6, 1, 4, 7);
        memcpy(row.r + i, &r, sizeof r), memcpy(row.g + i, &g, sizeof g), memcpy(row.b + i, &b, sizeof b);
    }
}

/* split_pixels backwards */
INLINE void join_pixels(Row row, int16_t *pixels)
{
    for (ptrdiff_t i = 0; i < row.padded; i += 8, pixels += 24) {
        Eight r, g, b;
        memcpy(&r, row.r + i, sizeof r), memcpy(&g, row.g + i, sizeof g), memcpy(&b, row.b + i, sizeof b);
        r = __builtin_shufflevector(r, r, 0, 3, 6, 1, 4, 7, 2, 5);
        g = __builtin_shufflevector(g, g, 5, 0, 3, 6, 1, 4, 7, 2);
        b = __builtin_shufflevector(b, b, 2, 5, 0, 3, 6, 1, 4, 7);
        Eight u = __builtin_shufflevector(r, g, 0, 9, 2, 3, 12, 5, 6, 15);
        Eight v = __builtin_shufflevector(r, g, 0, 1, 10, 3, 4, 13, 6, 7);
        Eight w = __builtin_shufflevector(r, g, 8, 1, 2, 11, 4, 5, 14, 7);
        u = __builtin_shufflevector(u, b, 0, 1, 10, 3, 4, 13, 6, 7);
        v = __builtin_shufflevector(v, b, 8, 1, 2, 11, 4, 5, 14, 7);
        w = __builtin_shufflevector(w, b, 0, 9, 2, 3, 12, 5, 6, 15);
        memcpy(pixels, &u, sizeof u), memcpy(pixels + 8, &v, sizeof v), memcpy(pixels + 16, &w, sizeof w);
    }
}

#endif

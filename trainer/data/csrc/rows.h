/* One row of a canvas as three rows of float, and back. */
#ifndef FEATHERWEIGHT_ROWS_H
#define FEATHERWEIGHT_ROWS_H

#include "views.h"

typedef struct {
    float *r, *g, *b; /* one after the other in memory */
    int16_t *shorts;  /* 3 * padded, for the way from and to the canvas */
    int padded;       /* a multiple of 16; the loops below say so to the compiler */
} Row;

/* Eight RGB pixels fill three vectors. Lane by lane, each channel is picked from the vector that holds it, and then put
 * in order: a blend costs less than a shuffle of two vectors, which is what the compiler makes of the plain loop. */
INLINE void split_pixels(const int16_t *pixels, int16_t *out, ptrdiff_t step)
{
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
    memcpy(out, &r, sizeof r), memcpy(out + step, &g, sizeof g), memcpy(out + 2 * step, &b, sizeof b);
}

/* split_pixels backwards */
INLINE void join_pixels(const int16_t *in, ptrdiff_t step, int16_t *pixels)
{
    Eight r, g, b, u, v, w;
    memcpy(&r, in, sizeof r), memcpy(&g, in + step, sizeof g), memcpy(&b, in + 2 * step, sizeof b);
    r = __builtin_shufflevector(r, r, 0, 3, 6, 1, 4, 7, 2, 5);
    g = __builtin_shufflevector(g, g, 5, 0, 3, 6, 1, 4, 7, 2);
    b = __builtin_shufflevector(b, b, 2, 5, 0, 3, 6, 1, 4, 7);
    u = __builtin_shufflevector(r, g, 0, 9, 2, 3, 12, 5, 6, 15);
    v = __builtin_shufflevector(r, g, 0, 1, 10, 3, 4, 13, 6, 7);
    w = __builtin_shufflevector(r, g, 8, 1, 2, 11, 4, 5, 14, 7);
    u = __builtin_shufflevector(u, b, 0, 1, 10, 3, 4, 13, 6, 7);
    v = __builtin_shufflevector(v, b, 8, 1, 2, 11, 4, 5, 14, 7);
    w = __builtin_shufflevector(w, b, 0, 9, 2, 3, 12, 5, 6, 15);
    memcpy(pixels, &u, sizeof u), memcpy(pixels + 8, &v, sizeof v), memcpy(pixels + 16, &w, sizeof w);
}

/* Between two sweeps over a canvas its rows may stay planar: three runs of `padded` values instead of pixels. */
INLINE void load_planar(const int16_t *restrict planes, Row row)
{
    float *restrict values = row.r; /* r, g and b follow one another */
    for (ptrdiff_t i = 0; i < (3 * row.padded & ~15); i++)
        values[i] = planes[i];
}

INLINE void store_planar(Row row, int16_t *restrict planes)
{
    const float *restrict values = row.r;
    for (ptrdiff_t i = 0; i < (3 * row.padded & ~15); i++)
        planes[i] = (int16_t)(values[i] + 0.5f);
}

INLINE void load_pixels(const int16_t *pixels, Row row)
{
    for (ptrdiff_t i = 0; i < row.padded; i += 8)
        split_pixels(pixels + 3 * i, row.shorts + i, row.padded);
    load_planar(row.shorts, row);
}

INLINE void store_pixels(Row row, int16_t *pixels)
{
    store_planar(row, row.shorts);
    for (ptrdiff_t i = 0; i < row.padded; i += 8)
        join_pixels(row.shorts + i, row.padded, pixels + 3 * i);
}

#endif

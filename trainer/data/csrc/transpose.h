/* Turning tiles: rows become columns. */
#ifndef FEATHERWEIGHT_TRANSPOSE_H
#define FEATHERWEIGHT_TRANSPOSE_H

#include "views.h"

typedef int16_t Eight __attribute__((vector_size(16)));

/* Turns an 8 x 8 tile. */
INLINE void transpose_tile(const int16_t *from, ptrdiff_t from_stride, int16_t *to, ptrdiff_t to_stride)
{
    Eight a[8], b[8];
    for (int i = 0; i < 8; i++)
        memcpy(a + i, from + i * from_stride, sizeof *a);
    for (int round = 0; round < 3; round++) { /* three perfect shuffles of rows i and i + 4 turn the tile */
        for (int i = 0; i < 4; i++) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < 8; i++)
        memcpy(to + i * to_stride, a + i, sizeof *a);
}

typedef uint8_t Sixteen __attribute__((vector_size(16)));

/* Turns 8 rows of 16 bytes. */
INLINE void turn_tile(const uint8_t *from, ptrdiff_t from_stride, uint8_t *to, ptrdiff_t to_stride)
{
    Sixteen a[8], b[8];
    for (int i = 0; i < 8; i++)
        memcpy(a + i, from + i * from_stride, sizeof *a);
    for (int round = 0; round < 3; round++) { /* as above; two columns end in each vector */
        for (int i = 0; i < 4; i++) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] =
                __builtin_shufflevector(a[i], a[i + 4], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < 16; i++)
        memcpy(to + i * to_stride, (uint8_t *)a + 8 * i, 8);
}

/* Turns bytes; whole tiles, of which the last ones reach over the edges. */
static CLONES void turn(const uint8_t *from, ptrdiff_t from_stride, int width, int height, uint8_t *to,
                        ptrdiff_t to_stride)
{
    for (int x = 0; x < width; x += 16)
        for (int y = 0; y < height; y += 8)
            turn_tile(from + y * from_stride + x, from_stride, to + x * to_stride + y, to_stride);
}

#endif

/* Turning tiles of 16-bit values. */
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

#endif

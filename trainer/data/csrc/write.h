/* The end of every view: columns of 16-bit values to rows of interleaved bytes, with or without solarisation. */
#ifndef FEATHERWEIGHT_WRITE_H
#define FEATHERWEIGHT_WRITE_H

#include "transpose.h"

enum { SOLARIZE_THRESHOLD = 128, TILE_WIDTH = 16, TILE_HEIGHT = 32, TILE_BYTES = 3 * TILE_WIDTH };

typedef uint8_t Sixteen __attribute__((vector_size(16)));

INLINE int16_t to_byte(int16_t value, int solarize)
{
    uint16_t raised = (uint16_t)(clamp_short(value, 0, Q6_WHITE) + Q6_ONE / 2);
    int16_t byte = (int16_t)(raised / Q6_ONE);
    return solarize && byte >= SOLARIZE_THRESHOLD ? (int16_t)(255 - byte) : byte;
}

/* Two bytes in each lane: those of eight columns from `low`, and of eight from `high`. In whole columns of the tile, for
 * they fill wide vectors, which what is turned cannot. */
INLINE void pair_bytes(const int16_t *low, const int16_t *high, ptrdiff_t pitch, int solarize,
                       int16_t pairs[8][TILE_HEIGHT])
{
    for (int x = 0; x < 8; x++)
        for (int y = 0; y < TILE_HEIGHT; y++)
            pairs[x][y] = (int16_t)(to_byte(low[x * pitch + y], solarize) | to_byte(high[x * pitch + y], solarize) << 8);
}

/* 16 pixels from the red and green of eight, of eight more, and the blue of both; a vector is picked from two or three. */
INLINE void join_pixels(const int16_t *left, const int16_t *right, const int16_t *blues, uint8_t *out)
{
    Sixteen first, second, blue;
    memcpy(&first, left, sizeof first), memcpy(&second, right, sizeof second), memcpy(&blue, blues, sizeof blue);
    Sixteen u = __builtin_shufflevector(first, blue, 0, 1, 16, 2, 3, 18, 4, 5, 20, 6, 7, 22, 8, 9, 24, 10);
    Sixteen v = __builtin_shufflevector(first, blue, 11, 26, 12, 13, 28, 14, 15, 30, 0, 0, 17, 0, 0, 19, 0, 0);
    v = __builtin_shufflevector(v, second, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 10, 18, 19, 13, 20, 21);
    Sixteen w = __builtin_shufflevector(second, blue, 21, 6, 7, 23, 8, 9, 25, 10, 11, 27, 12, 13, 29, 14, 15, 31);
    memcpy(out, &u, sizeof u), memcpy(out + 16, &v, sizeof v), memcpy(out + 32, &w, sizeof w);
}

/* Columns [x, x + TILE_WIDTH) of rows [y, y + TILE_HEIGHT); `out` rows are `stride` bytes apart. */
INLINE void turn_tile(const Canvas *canvas, int x, int y, int solarize, uint8_t *out, ptrdiff_t stride)
{
    int16_t pairs[3][8][TILE_HEIGHT], turned[3][8][8];
    int green = canvas->num_planes == 1 ? 0 : 1, blue = 2 * green; /* grey is its own green and blue */
    const int16_t *r = column_of(canvas, 0, x) + y, *g = column_of(canvas, green, x) + y;
    const int16_t *b = column_of(canvas, blue, x) + y;
    ptrdiff_t pitch = canvas->padded;
    pair_bytes(r, g, pitch, solarize, pairs[0]);
    pair_bytes(r + 8 * pitch, g + 8 * pitch, pitch, solarize, pairs[1]);
    pair_bytes(b, b + 8 * pitch, pitch, solarize, pairs[2]);
    for (int top = 0; top < TILE_HEIGHT; top += 8) {
        for (int i = 0; i < 3; i++)
            transpose_tile(pairs[i][0] + top, TILE_HEIGHT, turned[i][0], 8);
        for (int i = 0; i < 8; i++) {
            join_pixels(turned[0][i], turned[1][i], turned[2][i], out + (top + i) * stride);
            __builtin_prefetch(out + (top + i + TILE_HEIGHT) * stride, 1, 2); /* the tile below, into the second cache */
        }
    }
}

/* A tile that reaches over the view's edge. */
INLINE void turn_edge(const Canvas *canvas, int x, int y, int solarize, uint8_t *out)
{
    uint8_t tile[TILE_HEIGHT * TILE_BYTES];
    int size = canvas->size, width = size - x < TILE_WIDTH ? size - x : TILE_WIDTH;
    turn_tile(canvas, x, y, solarize, tile, TILE_BYTES);
    for (int i = 0; i < TILE_HEIGHT && y + i < size; i++)
        memcpy(out + 3 * (ptrdiff_t)size * (y + i) + 3 * x, tile + i * TILE_BYTES, 3 * (size_t)width);
}

/* Whole rows of tiles: their bytes leave the cache as full lines, and the batch they go to is too large to be in one. */
INLINE void turn_all(const Canvas *canvas, int solarize, uint8_t *out)
{
    int size = canvas->size;
    for (int y = 0; y < size; y += TILE_HEIGHT)
        for (int x = 0; x < size; x += TILE_WIDTH)
            if (x + TILE_WIDTH <= size && y + TILE_HEIGHT <= size)
                turn_tile(canvas, x, y, solarize, out + 3 * ((ptrdiff_t)size * y + x), 3 * (ptrdiff_t)size);
            else
                turn_edge(canvas, x, y, solarize, out);
}

/* out: size x size x 3 bytes */
static CLONES void write_bytes(const Canvas *canvas, int solarize, uint8_t *out)
{
    if (solarize)
        turn_all(canvas, 1, out);
    else
        turn_all(canvas, 0, out);
}

#endif

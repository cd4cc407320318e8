/* The end of every view: planes of 16-bit values to interleaved bytes, with or without solarisation. */
#ifndef FEATHERWEIGHT_WRITE_H
#define FEATHERWEIGHT_WRITE_H

#include "transpose.h"

enum { SOLARIZE_THRESHOLD = 128, RUN = 32 }; /* RUN: pixels at a time */

INLINE int16_t to_byte(int16_t value, int solarize)
{
    uint16_t raised = (uint16_t)(clamp_short(value, 0, Q6_WHITE) + Q6_ONE / 2);
    int16_t byte = (int16_t)(raised / Q6_ONE);
    return solarize && byte >= SOLARIZE_THRESHOLD ? (int16_t)(255 - byte) : byte;
}

INLINE void to_bytes(const int16_t *restrict values, int solarize, uint8_t *restrict bytes)
{
    for (int i = 0; i < RUN; i++)
        bytes[i] = (uint8_t)to_byte(values[i], solarize);
}

/* Bytes of three vectors in turn. */
INLINE void pick(Sixteen a, Sixteen b, Sixteen c, uint8_t *out)
{
    Sixteen ab = __builtin_shufflevector(a, b, 0, 17, 2, 3, 20, 5, 6, 23, 8, 9, 26, 11, 12, 29, 14, 15);
    Sixteen abc = __builtin_shufflevector(ab, c, 0, 1, 18, 3, 4, 21, 6, 7, 24, 9, 10, 27, 12, 13, 30, 15);
    memcpy(out, &abc, sizeof abc);
}

/* 16 pixels. Each channel is spread over the bytes of three vectors at once, for its places there do not overlap; then
 * every byte is picked from the channel that it belongs to. */
INLINE void join_pixels(const uint8_t *reds, const uint8_t *greens, const uint8_t *blues, uint8_t *out)
{
    Sixteen r, g, b;
    memcpy(&r, reds, sizeof r), memcpy(&g, greens, sizeof g), memcpy(&b, blues, sizeof b);
    r = __builtin_shufflevector(r, r, 0, 11, 6, 1, 12, 7, 2, 13, 8, 3, 14, 9, 4, 15, 10, 5);
    g = __builtin_shufflevector(g, g, 5, 0, 11, 6, 1, 12, 7, 2, 13, 8, 3, 14, 9, 4, 15, 10);
    b = __builtin_shufflevector(b, b, 10, 5, 0, 11, 6, 1, 12, 7, 2, 13, 8, 3, 14, 9, 4, 15);
    pick(r, g, b, out), pick(g, b, r, out + 16), pick(b, r, g, out + 32);
}

INLINE void write_rows(const Canvas *canvas, int solarize, uint8_t *out)
{
    int size = canvas->size, is_gray = canvas->num_planes == 1;
    for (int y = 0; y < size; y++)
        for (int x = 0; x < size; x += RUN) {
            uint8_t bytes[3][RUN], joined[3 * RUN];
            for (int c = 0; c < 3; c++)
                to_bytes(row_of(canvas, is_gray ? 0 : c, y) + x, solarize, bytes[c]);
            int whole = x + RUN <= size;
            uint8_t *to = whole ? out + 3 * ((ptrdiff_t)size * y + x) : joined;
            for (int i = 0; i < RUN; i += 16)
                join_pixels(bytes[0] + i, bytes[1] + i, bytes[2] + i, to + 3 * i);
            if (!whole)
                memcpy(out + 3 * ((ptrdiff_t)size * y + x), joined, 3 * (size_t)(size - x));
        }
}

/* out: size x size x 3 bytes */
static CLONES void write_bytes(const Canvas *canvas, int solarize, uint8_t *out)
{
    if (solarize)
        write_rows(canvas, 1, out);
    else
        write_rows(canvas, 0, out);
}

#endif

/* Gaussian blur.
 *
 * A true Gaussian, sampled and cut at three sigma, with mirrored borders (the edge pixel is not repeated), as
 * torchvision's gaussian_blur. PIL's GaussianBlur, which the published recipes used, approximates it by box filters.
 */
#ifndef FEATHERWEIGHT_BLUR_H
#define FEATHERWEIGHT_BLUR_H

#include "views.h"

enum { MAX_RADIUS = 64 };

/* Q15 weights of the middle and of one side, which sum to one exactly over both; returns the radius, 0 where a kernel so
 * narrow changes nothing. */
static int gaussian(float sigma, int16_t weight[MAX_RADIUS + 1])
{
    int radius = (int)ceilf(3 * sigma), rest = 1 << 15;
    radius = radius > MAX_RADIUS ? MAX_RADIUS : radius;
    double sum = 1, value[MAX_RADIUS + 1];
    for (int k = 1; k <= radius; k++)
        sum += 2 * (value[k] = exp(-0.5 * k * k / ((double)sigma * sigma)));
    for (int k = 1; k <= radius; k++) {
        weight[k] = (int16_t)lrint(value[k] / sum * (1 << 15));
        rest -= 2 * weight[k];
    }
    if (rest > INT16_MAX)
        return 0;
    weight[0] = (int16_t)rest;
    return radius;
}

/* ... c b | a b c d | c b a ... */
INLINE int mirror(int i, int size)
{
    while (size > 1 && (i < 0 || i >= size))
        i = i < 0 ? -i : 2 * (size - 1) - i;
    return size > 1 ? i : 0;
}

enum { BLOCK = 32 }; /* values at a time: two vectors, so that finding a tap's row pays twice */

/* The values that lie `k` taps away: rows[k], or the same line shifted where there are no rows. */
INLINE const int16_t *tap(const int16_t *const *rows, const int16_t *line, int k)
{
    return rows ? rows[k] : line + k;
}

/* out (+)= the sum over k of weight[k] * (tap -k + tap k), from k = `from` on; two white values just fit 16 bits. `from`,
 * `radius` and whether there are rows are constants where this is inlined. */
INLINE void sum_taps(const int16_t *const *rows, const int16_t *line, const int16_t *weight, int from, int radius,
                     int length, int16_t *restrict out)
{
    for (ptrdiff_t i = 0; i < length; i += BLOCK) {
        int16_t sum[BLOCK];
        const int16_t *middle = tap(rows, line, 0) + i;
        for (int j = 0; j < BLOCK; j++)
            sum[j] = from ? out[i + j] : mul_q15(middle[j], weight[0]);
#pragma GCC unroll 8
        for (int k = from ? from : 1; k <= radius; k++) {
            const int16_t *a = tap(rows, line, -k) + i, *b = tap(rows, line, k) + i;
            for (int j = 0; j < BLOCK; j++)
                sum[j] = (int16_t)(sum[j] + mul_q15((int16_t)(a[j] + b[j]), weight[k]));
        }
        for (int j = 0; j < BLOCK; j++)
            out[i + j] = sum[j];
    }
}

/* The whole kernel, unrolled up to a radius of 6 (sigma 2, the largest that is published), then tap by tap. */
INLINE void weigh_taps(const int16_t *const *rows, const int16_t *line, const int16_t *weight, int radius, int length,
                       int16_t *out)
{
    switch (radius) {
        case 1: sum_taps(rows, line, weight, 0, 1, length, out); break;
        case 2: sum_taps(rows, line, weight, 0, 2, length, out); break;
        case 3: sum_taps(rows, line, weight, 0, 3, length, out); break;
        case 4: sum_taps(rows, line, weight, 0, 4, length, out); break;
        case 5: sum_taps(rows, line, weight, 0, 5, length, out); break;
        default:
            sum_taps(rows, line, weight, 0, 6, length, out);
            for (int k = 7; k <= radius; k++)
                sum_taps(rows, line, weight, k, k, length, out);
    }
}

static CLONES void blur_across(const Canvas *canvas, int plane, const int16_t *weight, int radius, int16_t *out)
{
    const int16_t *columns[canvas->size + 2 * radius];
    for (int i = 0; i < canvas->size + 2 * radius; i++)
        columns[i] = column_of(canvas, plane, mirror(i - radius, canvas->size));
    for (int x = 0; x < canvas->size; x++, out += canvas->padded)
        weigh_taps(columns + radius + x, NULL, weight, radius, canvas->padded, out);
}

/* Each column is copied between mirrored margins; a tap is then the same column, shifted. */
static CLONES void blur_down(const int16_t *in, const int16_t *weight, int radius, int16_t *line, const Canvas *canvas,
                             int plane)
{
    int size = canvas->size;
    for (int x = 0; x < size; x++, in += canvas->padded) {
        memcpy(line + radius, in, size * sizeof *in);
        for (int k = 1; k <= radius; k++) {
            line[radius - k] = in[mirror(-k, size)];
            line[radius + size - 1 + k] = in[mirror(size - 1 + k, size)];
        }
        weigh_taps(NULL, line + radius, weight, radius, canvas->padded, column_of(canvas, plane, x));
    }
}

static enum Status blur(Canvas *canvas, float sigma, Buffer *buffer)
{
    int16_t weight[MAX_RADIUS + 1];
    int radius = gaussian(sigma, weight);
    if (radius == 0)
        return STATUS_OK;
    size_t plane = (size_t)canvas->padded * canvas->size, line = (size_t)canvas->padded + 2 * radius;
    int16_t *half = reserve(buffer, (plane + line) * sizeof *half);
    if (!half)
        return STATUS_MEMORY;
    for (int i = 0; i < canvas->num_planes; i++) {
        blur_across(canvas, i, weight, radius, half);
        blur_down(half, weight, radius, half + plane, canvas, i);
    }
    return STATUS_OK;
}

#endif

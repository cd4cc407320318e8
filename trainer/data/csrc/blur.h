/* Gaussian blur, and the end of every view: rounding to bytes with or without solarisation.
 *
 * A true Gaussian, sampled and cut at three sigma, with mirrored borders (the edge pixel is not repeated), as
 * torchvision's gaussian_blur. PIL's GaussianBlur, which the published recipes used, approximates it by box filters.
 */
#ifndef FEATHERWEIGHT_BLUR_H
#define FEATHERWEIGHT_BLUR_H

#include "views.h"

enum { MAX_RADIUS = 64, SOLARIZE_THRESHOLD = 128 };

/* Q15 weights [-radius, radius] that sum to one exactly; 0 where a kernel so narrow changes nothing. */
static int gaussian(float sigma, int16_t weight[2 * MAX_RADIUS + 1])
{
    int radius = (int)ceilf(3 * sigma), rest = 1 << 15;
    radius = radius > MAX_RADIUS ? MAX_RADIUS : radius;
    double sum = 1, value[MAX_RADIUS + 1];
    for (int k = 1; k <= radius; k++)
        sum += 2 * (value[k] = exp(-0.5 * k * k / ((double)sigma * sigma)));
    for (int k = 1; k <= radius; k++) {
        weight[radius - k] = weight[radius + k] = (int16_t)lrint(value[k] / sum * (1 << 15));
        rest -= 2 * weight[radius + k];
    }
    if (rest > INT16_MAX)
        return 0;
    weight[radius] = (int16_t)rest;
    return radius;
}

/* ... c b | a b c d | c b a ... */
INLINE int mirror(int i, int size)
{
    int period = size > 1 ? 2 * (size - 1) : 1;
    i = (i < 0 ? -i : i) % period;
    return i < size ? i : period - i;
}

/* out = sum over taps of weight * rows[k]; `taps` is a constant where this is inlined. */
INLINE void sum_rows(const int16_t *const *rows, const int16_t *weight, int taps, int add, int length,
                     int16_t *restrict out)
{
#pragma GCC ivdep
    for (int i = 0; i < (length & ~15); i++) {
        int16_t sum = add ? out[i] : 0;
        for (int k = 0; k < taps; k++)
            sum = (int16_t)(sum + mul_q15(rows[k][i], weight[k]));
        out[i] = sum;
    }
}

/* The whole kernel, unrolled up to a radius of 6 (sigma 2, the largest that is published), then tap by tap. */
INLINE void weigh_rows(const int16_t *const *rows, const int16_t *weight, int radius, int length, int16_t *out)
{
    switch (radius) {
        case 1: sum_rows(rows, weight, 3, 0, length, out); break;
        case 2: sum_rows(rows, weight, 5, 0, length, out); break;
        case 3: sum_rows(rows, weight, 7, 0, length, out); break;
        case 4: sum_rows(rows, weight, 9, 0, length, out); break;
        case 5: sum_rows(rows, weight, 11, 0, length, out); break;
        case 6: sum_rows(rows, weight, 13, 0, length, out); break;
        default:
            sum_rows(rows, weight, 13, 0, length, out);
            for (int k = 13; k < 2 * radius + 1; k++)
                sum_rows(rows + k, weight + k, 1, 1, length, out);
    }
}

static CLONES void blur_vertically(const Canvas *canvas, const int16_t *weight, int radius, int16_t *out)
{
    const int16_t *rows[2 * MAX_RADIUS + 1];
    for (int y = 0; y < canvas->size; y++) {
        for (int k = -radius; k <= radius; k++)
            rows[k + radius] = canvas->pixels + mirror(y + k, canvas->size) * canvas->stride;
        weigh_rows(rows, weight, radius, (int)canvas->stride, out + y * canvas->stride);
    }
}

/* Each row is copied between mirrored margins; a tap is then the same row, shifted by whole pixels. */
static CLONES void blur_horizontally(const int16_t *in, const int16_t *weight, int radius, int16_t *line, Canvas *canvas)
{
    const int16_t *rows[2 * MAX_RADIUS + 1];
    for (int k = 0; k <= 2 * radius; k++)
        rows[k] = line + 3 * k;
    for (int y = 0; y < canvas->size; y++, in += canvas->stride) {
        memcpy(line + 3 * radius, in, 3 * (size_t)canvas->size * sizeof *in);
        for (int k = 1; k <= radius; k++)
            for (int c = 0; c < 3; c++) {
                line[3 * (radius - k) + c] = in[3 * mirror(-k, canvas->size) + c];
                line[3 * (radius + canvas->size - 1 + k) + c] = in[3 * mirror(canvas->size - 1 + k, canvas->size) + c];
            }
        weigh_rows(rows, weight, radius, (int)canvas->stride, canvas->pixels + y * canvas->stride);
    }
}

static enum Status blur(Canvas *canvas, float sigma, Buffer *buffer)
{
    int16_t weight[2 * MAX_RADIUS + 1];
    int radius = gaussian(sigma, weight);
    if (radius == 0)
        return STATUS_OK;
    size_t plane = (size_t)canvas->stride * canvas->size, line = (size_t)canvas->stride + 6 * radius;
    int16_t *half = reserve(buffer, (plane + line) * sizeof *half);
    if (!half)
        return STATUS_MEMORY;
    blur_vertically(canvas, weight, radius, half);
    blur_horizontally(half, weight, radius, half + plane, canvas);
    return STATUS_OK;
}

INLINE void round_row(const int16_t *restrict in, int length, int solarize, uint8_t *restrict out)
{
    for (int i = 0; i < length; i++) {
        uint16_t value = (uint16_t)(clamp_short(in[i], 0, Q6_WHITE) + Q6_ONE / 2);
        uint8_t byte = (uint8_t)(value / Q6_ONE);
        out[i] = solarize && byte >= SOLARIZE_THRESHOLD ? (uint8_t)(255 - byte) : byte;
    }
}

/* out: size x size x 3 bytes */
static CLONES void write_bytes(const Canvas *canvas, int solarize, uint8_t *out)
{
    int length = 3 * canvas->size;
    for (int y = 0; y < canvas->size; y++, out += length)
        if (solarize)
            round_row(canvas->pixels + y * canvas->stride, length, 1, out);
        else
            round_row(canvas->pixels + y * canvas->stride, length, 0, out);
}

#endif

/* Colour jitter and greyscale as in torchvision.transforms.functional: every operation clamps, hue turns in HSV.
 *
 * All in 16 bits, sixteen pixels an instruction; against torchvision on float tensors the error stays near a tenth of a
 * level, far below the final rounding to bytes.
 */
#ifndef FEATHERWEIGHT_COLOUR_H
#define FEATHERWEIGHT_COLOUR_H

#include "rows.h"

/* ITU-R 601-2 luma, PIL's "L". (torchvision writes 0.2989, so that its white is 254.97.) */
static const float LUMA[3] = {0.299f, 0.587f, 0.114f};

/* How far products with factors of up to `largest` must be shifted left in the end. */
static int shift_for(float largest)
{
    int shift = 0;
    while (largest * (float)(1 << 14) > (float)(INT16_MAX << shift))
        shift++;
    return shift;
}

/* A factor as a number that `times` can take. Its value is hidden from the compiler, which does not recognise mul_q15
 * where a factor is a known constant (greyscale's). */
INLINE int16_t fixed(float factor, int shift)
{
    int value = (int)lrintf(factor * (float)(1 << (14 - shift)));
    __asm__("" : "+r"(value));
    return (int16_t)value;
}

/* value * factor, still to be shifted left; value is Q6, so that its double fills 16 bits. */
INLINE int16_t times(int16_t value, int16_t factor)
{
    return mul_q15((int16_t)(2 * value), factor);
}

/* Clamps, then shifts left: white is divisible by every power of two that a factor may need. As a product, for the
 * compiler does not know that a shift by a variable stays within 16 bits. */
INLINE int16_t finish(int16_t value, int16_t white, int16_t power)
{
    return (int16_t)(clamp_short(value, 0, white) * power);
}

INLINE int16_t smaller(int16_t a, int16_t b)
{
    return a < b ? a : b;
}

INLINE int16_t larger(int16_t a, int16_t b)
{
    return a > b ? a : b;
}

INLINE int16_t distance(int16_t a, int16_t b)
{
    return (int16_t)(larger(a, b) - smaller(a, b));
}

/* From Q6 to Q4. */
INLINE int16_t quarter(int16_t value)
{
    return (int16_t)((int16_t)(value + 2) >> 2);
}

/* Brightness and contrast: blends with one grey for the whole view, black or its mean. */
INLINE void scale_row(Row row, float factor, float mean)
{
    int16_t *restrict values = row.r;
    int shift = shift_for(factor);
    int16_t white = (int16_t)(Q6_WHITE >> shift), power = (int16_t)(1 << shift);
    int16_t scale = fixed(factor, shift), offset = (int16_t)lrintf((1 - factor) * mean / (float)(1 << shift));
    for (ptrdiff_t i = 0; i < (3 * row.padded & ~15); i++)
        values[i] = finish((int16_t)(times(values[i], scale) + offset), white, power);
}

/* Blends with the grey of the same pixel; factor 0 is greyscale. */
INLINE void saturate_row(Row row, float factor)
{
    int16_t *restrict r = row.r, *restrict g = row.g, *restrict b = row.b;
    int shift = shift_for(factor);
    int16_t white = (int16_t)(Q6_WHITE >> shift), power = (int16_t)(1 << shift);
    int16_t scale = fixed(factor, shift), from_r = fixed((1 - factor) * LUMA[0], shift),
            from_g = fixed((1 - factor) * LUMA[1], shift), from_b = fixed((1 - factor) * LUMA[2], shift);
    for (ptrdiff_t i = 0; i < (row.padded & ~15); i++) {
        int16_t gray = (int16_t)(times(r[i], from_r) + times(g[i], from_g) + times(b[i], from_b));
        r[i] = finish((int16_t)(times(r[i], scale) + gray), white, power);
        g[i] = finish((int16_t)(times(g[i], scale) + gray), white, power);
        b[i] = finish((int16_t)(times(b[i], scale) + gray), white, power);
    }
}

/* RGB -> HSV -> RGB with the hue turned: saturation and value survive, so only minimum, chroma and hue are needed. The
 * hue, in sixths of a turn, is kept multiplied by the chroma, which spares the division; a channel is the minimum plus a
 * trapezium of the hue. In Q4, for the hue may be 8 chromas wide. Casts keep the compiler in 16 bits. */
INLINE void turn_hue_row(Row row, float turns)
{
    int16_t *restrict r = row.r, *restrict g = row.g, *restrict b = row.b;
    const int16_t sixths = (int16_t)lrintf(6 * turns * (1 << 12)); /* [-3, 3] */
    for (ptrdiff_t i = 0; i < (row.padded & ~15); i++) {
        int16_t high = larger(larger(r[i], g[i]), b[i]), low = smaller(smaller(r[i], g[i]), b[i]);
        int16_t one = quarter((int16_t)(high - low)), two = (int16_t)(2 * one), four = (int16_t)(4 * one);
        int16_t three = (int16_t)(one + two), six = (int16_t)(two + four), red = quarter((int16_t)(g[i] - b[i]));
        int16_t green = (int16_t)(two + quarter((int16_t)(b[i] - r[i])));
        int16_t blue = (int16_t)(four + quarter((int16_t)(r[i] - g[i])));
        int16_t hue = high == g[i] ? green : blue;
        hue = high == r[i] ? red : hue;
        hue = (int16_t)(hue + mul_q15((int16_t)(2 * four), sixths)); /* [-1, 5] + [-3, 3] chromas */
        hue = hue < 0 ? (int16_t)(hue + six) : hue;
        hue = hue >= six ? (int16_t)(hue - six) : hue;
        r[i] = (int16_t)(low + 4 * clamp_short((int16_t)(distance(hue, three) - one), 0, one));
        g[i] = (int16_t)(low + 4 * clamp_short((int16_t)(two - distance(hue, two)), 0, one));
        b[i] = (int16_t)(low + 4 * clamp_short((int16_t)(two - distance(hue, four)), 0, one));
    }
}

/* Adds up each channel of a row; luma being linear, its mean follows from theirs. */
INLINE void add_channels(Row row, int size, int64_t sum[3])
{
    int32_t r = 0, g = 0, b = 0; /* 131,000 white pixels fit; a row has 4,096 at most */
    for (ptrdiff_t i = 0; i < size; i++)
        r += row.r[i], g += row.g[i], b += row.b[i];
    sum[0] += r, sum[1] += g, sum[2] += b;
}

/* Runs order[from .. to) on one row. */
INLINE void apply_ops(Row row, const Params *p, int from, int to, float mean)
{
    for (int i = from; i < to; i++) {
        int op = p->order[i];
        float factor = p->factor[op];
        if (op == OP_HUE && factor != 0)
            turn_hue_row(row, factor);
        else if (op == OP_SATURATION && factor != 1)
            saturate_row(row, factor);
        else if ((op == OP_BRIGHTNESS || op == OP_CONTRAST) && factor != 1)
            scale_row(row, factor, op == OP_CONTRAST ? mean : 0);
    }
}

/* Mean of each channel, in Q6. Columns are added up first: that needs no shuffling of channels. */
static CLONES void channel_means(const Canvas *canvas, int32_t *restrict column, float mean[3])
{
    int64_t sum[3] = {0};
    memset(column, 0, (size_t)canvas->stride * sizeof *column);
    for (int y = 0; y < canvas->size; y++) { /* 131,000 white pixels fit; a column has 4,096 at most */
        const int16_t *pixels = canvas->pixels + y * canvas->stride;
        for (ptrdiff_t i = 0; i < (canvas->stride & ~15); i++)
            column[i] += pixels[i];
    }
    for (ptrdiff_t i = 0; i < 3 * canvas->size; i++)
        sum[i % 3] += column[i];
    for (int i = 0; i < 3; i++)
        mean[i] = (float)sum[i] / ((float)canvas->size * (float)canvas->size);
}

static float luma(const float rgb[3])
{
    return LUMA[0] * rgb[0] + LUMA[1] * rgb[1] + LUMA[2] * rgb[2];
}

/* Splits the canvas into planes, runs the operations before contrast there, and returns the mean luma, in Q6. */
static CLONES float colour_until_contrast(const Canvas *canvas, const Params *p, int contrast, int16_t *planes)
{
    int64_t sum[3] = {0};
    for (int y = 0; y < canvas->size; y++) {
        Row row = row_at(planes + y * canvas->stride, canvas->padded);
        split_pixels(canvas->pixels + y * canvas->stride, row);
        apply_ops(row, p, 0, contrast, 0);
        add_channels(row, canvas->size, sum);
    }
    float total[3] = {(float)sum[0], (float)sum[1], (float)sum[2]};
    return luma(total) / ((float)canvas->size * (float)canvas->size);
}

/* The operations from `first` on, from planes (where `is_split`) or from the canvas, and back to the canvas. */
static CLONES void colour_from(Canvas *canvas, const Params *p, int first, float mean, int is_split, int16_t *planes)
{
    for (int y = 0; y < canvas->size; y++) {
        Row row = row_at(planes + (is_split ? y * canvas->stride : 0), canvas->padded);
        if (!is_split)
            split_pixels(canvas->pixels + y * canvas->stride, row);
        apply_ops(row, p, first, p->jitter ? NUM_OPS : 0, mean);
        if (p->gray)
            saturate_row(row, 0);
        join_pixels(row, canvas->pixels + y * canvas->stride);
    }
}

/* Contrast needs the mean of what came before it, hence two sweeps; where nothing came before, the channels' means tell. */
static void colour_exact(Canvas *canvas, const Params *p, int16_t *planes)
{
    int contrast = 0;
    float mean = 0, channels[3];
    if (p->jitter && p->factor[OP_CONTRAST] != 1) {
        while (p->order[contrast] != OP_CONTRAST)
            contrast++;
        if (contrast > 0)
            mean = colour_until_contrast(canvas, p, contrast, planes);
        else
            channel_means(canvas, (int32_t *)planes, channels), mean = luma(channels);
    }
    colour_from(canvas, p, contrast, mean, contrast > 0, planes);
}

#endif

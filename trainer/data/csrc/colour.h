/* Colour jitter and greyscale as in torchvision.transforms.functional: every operation clamps, hue turns in HSV.
 *
 * All in 16 bits, sixteen pixels an instruction; against torchvision on float tensors the error stays near a tenth of a
 * level, far below the final rounding to bytes.
 */
#ifndef FEATHERWEIGHT_COLOUR_H
#define FEATHERWEIGHT_COLOUR_H

#include "views.h"

/* One row of values of each channel, a column of the view. */
typedef struct {
    int16_t *r, *g, *b;
    int padded; /* a multiple of 16; loops over & ~15 say so to the compiler */
} Row;

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
    int shift = shift_for(factor);
    int16_t white = (int16_t)(Q6_WHITE >> shift), power = (int16_t)(1 << shift);
    int16_t scale = fixed(factor, shift), offset = (int16_t)lrintf((1 - factor) * mean / (float)(1 << shift));
    int16_t *channels[] = {row.r, row.g, row.b};
    for (int c = 0; c < 3; c++) {
        int16_t *restrict values = channels[c];
        for (ptrdiff_t i = 0; i < (row.padded & ~15); i++)
            values[i] = finish((int16_t)(times(values[i], scale) + offset), white, power);
    }
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

static float luma(const float rgb[3])
{
    return LUMA[0] * rgb[0] + LUMA[1] * rgb[1] + LUMA[2] * rgb[2];
}

/* Mean of each plane, in Q6. Luma being linear, its mean follows from theirs. */
static CLONES void plane_means(const Canvas *canvas, float mean[3])
{
    int16_t one = 1;
    __asm__("" : "+r"(one)); /* hidden from the compiler, which then adds pairs by its multiply-and-add instruction */
    for (int c = 0; c < 3; c++) {
        int64_t sum = 0;
        for (int x = 0; x < canvas->size; x++) {
            const int16_t *column = column_of(canvas, c, x);
            int32_t of_column = 0; /* 131,000 white pixels fit; a column has 4,096 at most */
            for (int y = 0; y < canvas->size; y++)
                of_column += column[y] * one;
            sum += of_column;
        }
        mean[c] = (float)sum / ((float)canvas->size * (float)canvas->size);
    }
}

/* Operations [from, to) of the order, and greyscale after the last one. */
static CLONES void apply_colour(Canvas *canvas, const Params *p, int from, int to, float mean)
{
    for (int x = 0; x < canvas->size; x++) {
        Row row = {column_of(canvas, 0, x), column_of(canvas, 1, x), column_of(canvas, 2, x), canvas->padded};
        apply_ops(row, p, from, p->jitter ? to : from, mean);
        if (p->gray && to == NUM_OPS)
            saturate_row(row, 0);
    }
}

/* Contrast needs the mean of what came before it, hence two sweeps. */
static void colour_exact(Canvas *canvas, const Params *p)
{
    int contrast = 0;
    float mean = 0, channels[3];
    if (p->jitter && p->factor[OP_CONTRAST] != 1) {
        while (p->order[contrast] != OP_CONTRAST)
            contrast++;
        if (contrast > 0)
            apply_colour(canvas, p, 0, contrast, 0);
        plane_means(canvas, channels);
        mean = luma(channels);
    }
    apply_colour(canvas, p, contrast, NUM_OPS, mean);
    if (p->gray)
        canvas->num_planes = 1;
}

#endif

/* Colour jitter and greyscale, one row of float pixels (still in Q6) at a time so that it stays in the nearest cache.
 *
 * `exact` follows torchvision.transforms.functional on float tensors: every operation clamps, hue turns in HSV.
 * `linear` composes all operations into one 3 x 4 matrix and clamps once; hue turns about the grey axis instead.
 * They agree wherever nothing is clamped and no hue is turned.
 */
#ifndef FEATHERWEIGHT_COLOUR_H
#define FEATHERWEIGHT_COLOUR_H

#include "rows.h"

/* ITU-R 601-2 luma, PIL's "L" (torchvision writes 0.2989, so that its white is 254.97). */
#define LUMA_R 0.299f
#define LUMA_G 0.587f
#define LUMA_B 0.114f

INLINE float clamp(float value)
{
    value = value < 0 ? 0 : value;
    return value > Q6_WHITE ? Q6_WHITE : value;
}

INLINE float luma(float r, float g, float b)
{
    return LUMA_R * r + LUMA_G * g + LUMA_B * b;
}

/* value * scale + shift on every channel: brightness and, with a grey shift, contrast. */
INLINE void scale_row(Row row, float scale, float shift)
{
    float *restrict r = row.r, *restrict g = row.g, *restrict b = row.b;
    for (ptrdiff_t i = 0; i < (row.padded & ~15); i++) {
        r[i] = clamp(r[i] * scale + shift);
        g[i] = clamp(g[i] * scale + shift);
        b[i] = clamp(b[i] * scale + shift);
    }
}

/* Blends with the grey of the same pixel; factor 0 is greyscale. */
INLINE void saturate_row(Row row, float factor)
{
    float *restrict r = row.r, *restrict g = row.g, *restrict b = row.b;
    for (ptrdiff_t i = 0; i < (row.padded & ~15); i++) {
        float gray = (1 - factor) * luma(r[i], g[i], b[i]);
        r[i] = clamp(r[i] * factor + gray);
        g[i] = clamp(g[i] * factor + gray);
        b[i] = clamp(b[i] * factor + gray);
    }
}

/* One channel of a fully saturated hue (in sixths of a turn), as a trapezium from 0 to 1. */
INLINE float trapezium(float value)
{
    value = value < 0 ? 0 : value;
    return value > 1 ? 1 : value;
}

/* RGB -> HSV -> RGB with the hue turned; saturation and value survive, so only min, max and hue are needed. */
INLINE void turn_hue_row(Row row, float sixths)
{
    float *restrict r = row.r, *restrict g = row.g, *restrict b = row.b;
    for (ptrdiff_t i = 0; i < (row.padded & ~15); i++) {
        float high = r[i] > g[i] ? r[i] : g[i], low = r[i] < g[i] ? r[i] : g[i];
        high = b[i] > high ? b[i] : high;
        low = b[i] < low ? b[i] : low;
        float chroma = high - low, inverse = 1 / (chroma > 0 ? chroma : 1);
        float hue = high == r[i]   ? (g[i] - b[i]) * inverse
                    : high == g[i] ? 2 + (b[i] - r[i]) * inverse
                                   : 4 + (r[i] - g[i]) * inverse;
        hue += sixths; /* sixths is in [0, 6], hue was in [-1, 5] */
        hue = hue < 0 ? hue + 6 : hue;
        hue = hue >= 6 ? hue - 6 : hue;
        r[i] = low + chroma * trapezium(fabsf(hue - 3) - 1);
        g[i] = low + chroma * trapezium(2 - fabsf(hue - 2));
        b[i] = low + chroma * trapezium(2 - fabsf(hue - 4));
    }
}

/* Of integers, so that the order of adding, which differs between vector widths, cannot matter. */
INLINE int32_t sum_luma(Row row, int size)
{
    int32_t sum = 0; /* 131,000 white pixels fit; a row has 4,096 at most */
    const float *restrict r = row.r, *restrict g = row.g, *restrict b = row.b;
    for (ptrdiff_t i = 0; i < size; i++)
        sum += (int32_t)(luma(r[i], g[i], b[i]) + 0.5f);
    return sum;
}

INLINE void apply_op(Row row, int op, float factor, float mean)
{
    if (op == OP_BRIGHTNESS)
        scale_row(row, factor, 0);
    else if (op == OP_CONTRAST)
        scale_row(row, factor, (1 - factor) * mean);
    else if (op == OP_SATURATION)
        saturate_row(row, factor);
    else
        turn_hue_row(row, 6 * (factor < 0 ? factor + 1 : factor));
}

/* Runs order[from .. to) on one row. */
INLINE void apply_ops(Row row, const Params *p, int from, int to, float mean)
{
    for (int i = from; i < to; i++) {
        int op = p->order[i];
        if (p->factor[op] != (op == OP_HUE ? 0 : 1))
            apply_op(row, op, p->factor[op], mean);
    }
}

static CLONES void channel_means(const Canvas *canvas, float mean[3])
{
    int64_t sum[3] = {0};
    for (int y = 0; y < canvas->size; y++) {
        const int16_t *pixels = canvas->pixels + y * canvas->stride;
        int32_t r = 0, g = 0, b = 0; /* 131,000 pixels fit */
        for (ptrdiff_t i = 0; i < canvas->size; i++)
            r += pixels[3 * i], g += pixels[3 * i + 1], b += pixels[3 * i + 2];
        sum[0] += r, sum[1] += g, sum[2] += b;
    }
    for (int i = 0; i < 3; i++)
        mean[i] = (float)((double)sum[i] / ((double)canvas->size * canvas->size));
}

static float mean_luma(const Canvas *canvas)
{
    float mean[3];
    channel_means(canvas, mean);
    return luma(mean[0], mean[1], mean[2]);
}

/* Runs the operations before contrast, leaves the rows planar, and returns the mean luma, which contrast needs. */
static CLONES float colour_until_contrast(Canvas *canvas, const Params *p, int contrast, Row row)
{
    int64_t sum = 0;
    for (int y = 0; y < canvas->size; y++) {
        int16_t *pixels = canvas->pixels + y * canvas->stride;
        load_pixels(pixels, row);
        apply_ops(row, p, 0, contrast, 0);
        sum += sum_luma(row, canvas->size);
        store_planar(row, pixels);
    }
    return (float)((double)sum / ((double)canvas->size * canvas->size));
}

static CLONES void colour_from(Canvas *canvas, const Params *p, int first, float mean, int planar, Row row)
{
    for (int y = 0; y < canvas->size; y++) {
        int16_t *pixels = canvas->pixels + y * canvas->stride;
        if (planar)
            load_planar(pixels, row);
        else
            load_pixels(pixels, row);
        apply_ops(row, p, first, p->jitter ? NUM_OPS : 0, mean);
        if (p->gray)
            saturate_row(row, 0);
        store_pixels(row, pixels);
    }
}

/* Contrast needs the mean of what came before it, hence two sweeps; but where nothing came before, the channels' means
 * tell. */
static void colour_exact(Canvas *canvas, const Params *p, Row row)
{
    int contrast = 0;
    float mean = 0;
    if (p->jitter && p->factor[OP_CONTRAST] != 1) {
        while (p->order[contrast] != OP_CONTRAST)
            contrast++;
        mean = contrast > 0 ? colour_until_contrast(canvas, p, contrast, row) : mean_luma(canvas);
    }
    colour_from(canvas, p, contrast, mean, contrast > 0, row);
}

typedef struct {
    float m[3][4];
} Matrix;

static Matrix compose(const Matrix *after, const Matrix *before)
{
    Matrix result;
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 4; j++) {
            float sum = j == 3 ? after->m[i][3] : 0;
            for (int k = 0; k < 3; k++)
                sum += after->m[i][k] * before->m[k][j];
            result.m[i][j] = sum;
        }
    return result;
}

/* factor * identity + (1 - factor) * (grey of the pixel) + shift */
static Matrix blend_matrix(float factor, float luma_share, float shift)
{
    const float weight[3] = {LUMA_R, LUMA_G, LUMA_B};
    Matrix result;
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < 3; j++)
            result.m[i][j] = luma_share * weight[j] + (i == j ? factor : 0);
        result.m[i][3] = shift;
    }
    return result;
}

/* Rodrigues' rotation about (1, 1, 1), the grey axis. */
static Matrix hue_matrix(float turns)
{
    float c = cosf(turns * 6.28318531f), s = sinf(turns * 6.28318531f) * 0.57735027f, t = (1 - c) / 3;
    return (Matrix){{{c + t, t - s, t + s, 0}, {t + s, c + t, t - s, 0}, {t - s, t + s, c + t, 0}}};
}

/* The mean luma after `m`, from the channel means before it. */
static float mean_after(const Matrix *m, const float mean[3])
{
    float out[3];
    for (int i = 0; i < 3; i++)
        out[i] = m->m[i][0] * mean[0] + m->m[i][1] * mean[1] + m->m[i][2] * mean[2] + m->m[i][3];
    return luma(out[0], out[1], out[2]);
}

static Matrix colour_matrix(const Params *p, const float mean[3])
{
    Matrix total = blend_matrix(1, 0, 0);
    for (int i = 0; p->jitter && i < NUM_OPS; i++) {
        int op = p->order[i];
        float factor = p->factor[op];
        Matrix next = op == OP_BRIGHTNESS   ? blend_matrix(factor, 0, 0)
                      : op == OP_CONTRAST   ? blend_matrix(factor, 0, (1 - factor) * mean_after(&total, mean))
                      : op == OP_SATURATION ? blend_matrix(factor, 1 - factor, 0)
                                            : hue_matrix(factor);
        total = compose(&next, &total);
    }
    if (p->gray) {
        Matrix gray = blend_matrix(0, 1, 0);
        total = compose(&gray, &total);
    }
    return total;
}

static CLONES void apply_matrix(Canvas *canvas, const Matrix *matrix, Row row)
{
    const Matrix k = *matrix;
    for (int y = 0; y < canvas->size; y++) {
        load_pixels(canvas->pixels + y * canvas->stride, row);
        float *restrict r = row.r, *restrict g = row.g, *restrict b = row.b;
        for (ptrdiff_t i = 0; i < (row.padded & ~15); i++) {
            float x = r[i], y_ = g[i], z = b[i];
            r[i] = clamp(k.m[0][0] * x + k.m[0][1] * y_ + k.m[0][2] * z + k.m[0][3]);
            g[i] = clamp(k.m[1][0] * x + k.m[1][1] * y_ + k.m[1][2] * z + k.m[1][3]);
            b[i] = clamp(k.m[2][0] * x + k.m[2][1] * y_ + k.m[2][2] * z + k.m[2][3]);
        }
        store_pixels(row, canvas->pixels + y * canvas->stride);
    }
}

static void colour_linear(Canvas *canvas, const Params *p, Row row)
{
    float mean[3];
    channel_means(canvas, mean);
    Matrix matrix = colour_matrix(p, mean);
    apply_matrix(canvas, &matrix, row);
}

static enum Status change_colour(Canvas *canvas, const Params *p, enum Colour colour, Buffer *buffer)
{
    ptrdiff_t padded = canvas->padded;
    float *values = reserve(buffer, 3 * (size_t)padded * (sizeof(float) + sizeof(int16_t)));
    if (!values)
        return STATUS_MEMORY;
    Row row = {values, values + padded, values + 2 * padded, (int16_t *)(values + 3 * padded), canvas->padded};
    if (colour == COLOUR_EXACT)
        colour_exact(canvas, p, row);
    else
        colour_linear(canvas, p, row);
    return STATUS_OK;
}

#endif

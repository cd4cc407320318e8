/* The fast form of colour jitter: all operations composed into one 3 x 4 matrix, applied once and clamped once. Where the
 * view is still Y, Cb and Cr, its turning into RGB is the first of them.
 *
 * Hue turns about the grey axis instead of in HSV. Equal to colour.h wherever nothing is clamped and no hue is turned.
 */
#ifndef FEATHERWEIGHT_LINEAR_H
#define FEATHERWEIGHT_LINEAR_H

#include "colour.h"

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

/* factor * identity + luma_share * (grey of the pixel) + offset */
static Matrix blend_matrix(float factor, float luma_share, float offset)
{
    Matrix result;
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < 3; j++)
            result.m[i][j] = luma_share * LUMA[j] + (i == j ? factor : 0);
        result.m[i][3] = offset;
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
    return luma(out);
}

/* JFIF's YCbCr, centred, to RGB; the inverse of LUMA. */
static const Matrix FROM_YCC = {{{1, 0, 1.402f, 0}, {1, -0.344136286f, -0.714136286f, 0}, {1, 1.772f, 0, 0}}};

/* From the planes as they are to the finished RGB. `mean`: of each plane. */
static Matrix colour_matrix(const Params *p, int is_ycc, const float mean[3])
{
    Matrix total = is_ycc ? FROM_YCC : blend_matrix(1, 0, 0);
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

/* The largest value that a row of the matrix may reach, in units of white: what the fixed point must hold. */
static float reach(const Matrix *m)
{
    float largest = 0;
    for (int i = 0; i < 3; i++) {
        float sum = fabsf(m->m[i][3]) / Q6_WHITE;
        for (int j = 0; j < 3; j++)
            sum += fabsf(m->m[i][j]);
        largest = sum > largest ? sum : largest;
    }
    return largest;
}

/* `rows` (a constant where this is inlined): 1 for grey, whose three rows are the same. */
INLINE void apply_matrix_to_column(const Canvas *canvas, int x, int16_t k[3][4], int shift, int rows)
{
    int16_t *restrict r = column_of(canvas, 0, x), *restrict g = column_of(canvas, 1, x),
                      *restrict b = column_of(canvas, 2, x);
    int16_t white = (int16_t)(Q6_WHITE >> shift), power = (int16_t)(1 << shift);
    for (ptrdiff_t i = 0; i < (canvas->padded & ~15); i++) {
        int16_t out[3];
        for (int c = 0; c < rows; c++)
            out[c] = finish((int16_t)(times(r[i], k[c][0]) + times(g[i], k[c][1]) + times(b[i], k[c][2]) + k[c][3]),
                            white, power);
        r[i] = out[0];
        if (rows == 3)
            g[i] = out[1], b[i] = out[2];
    }
}

static CLONES void apply_matrix(Canvas *canvas, const Matrix *matrix)
{
    int16_t k[3][4];
    int shift = shift_for(reach(matrix));
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < 3; j++)
            k[i][j] = fixed(matrix->m[i][j], shift);
        k[i][3] = (int16_t)lrintf(matrix->m[i][3] / (float)(1 << shift));
    }
    for (int x = 0; x < canvas->size; x++)
        if (canvas->num_planes == 1)
            apply_matrix_to_column(canvas, x, k, shift, 1);
        else
            apply_matrix_to_column(canvas, x, k, shift, 3);
}

static void colour_linear(Canvas *canvas, const Params *p)
{
    float mean[3] = {0};
    if (p->jitter && p->factor[OP_CONTRAST] != 1)
        plane_means(canvas, mean);
    Matrix matrix = colour_matrix(p, canvas->is_ycc, mean);
    canvas->num_planes = p->gray ? 1 : 3;
    apply_matrix(canvas, &matrix);
}

#endif

/* Antialiased resize of a box, separable; the weights are in axis.h.
 *
 * PIL rounds to 8 bits between its two passes; we keep Q7. Rows are blended first, a strip of output rows at a time;
 * the strip is then transposed, so that the second pass, too, blends long contiguous rows: there one "row" is a column
 * of the strip's pixels. No gather, no horizontal add.
 */
#ifndef FEATHERWEIGHT_RESIZE_H
#define FEATHERWEIGHT_RESIZE_H

#include "axis.h"
#include "decode.h"
#include "transpose.h"

/* Rows that are resized together: fewer of interleaved RGB, so that a strip stays in the nearest cache. */
enum { RGB_STRIP = 16, PLANE_STRIP = 32, MAX_UNROLL = 12, CENTRE = 128 * Q6_ONE };

typedef struct {
    Buffer axes[4], blended, turned;
} ResizeScratch;

/* Across and down, of the image and of planes that have half of its pixels. */
typedef struct {
    Axis whole[2], half[2];
} Axes;

/* One strip's way through the two passes. */
typedef struct {
    int channels, rows; /* of a strip */
    int columns;        /* source values of a row, whole vectors of them */
    int16_t centre;     /* added to every result */
    int16_t *blended, *turned;
} Strip;

typedef uint16_t __attribute__((aligned(1), may_alias)) BytePair;
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "blend_bytes takes the low byte of a pair for the first");

/* out[i] (+)= sum over taps of weight * row[i], the even bytes into the first half of `out` and the odd ones into the
 * second: a pair of bytes taken as 16 bits parts by a shift and a mask, which is cheaper than widening every byte. Each
 * becomes (byte - 128) * 256, so that all 16 bits are used and a Q14 weight makes the result Q7. `taps` and `add` are
 * constants where this is inlined, so the sums live in registers. */
INLINE void blend_bytes(const uint8_t *row, ptrdiff_t stride, int length, const int16_t *weight, int pitch, int taps,
                        int add, int16_t *restrict out)
{
    int half = length / 2 & ~15;
    int16_t *restrict odd = out + half;
    for (ptrdiff_t i = 0; i < half; i++) {
        int16_t sum_even = add ? out[i] : 0, sum_odd = add ? odd[i] : 0;
        for (int k = 0; k < taps; k++) {
            uint16_t pair = ((const BytePair *)(row + k * stride))[i] ^ 0x8080;
            sum_even = (int16_t)(sum_even + mul_q15((int16_t)(pair << 8), weight[k * pitch]));
            sum_odd = (int16_t)(sum_odd + mul_q15((int16_t)(pair & 0xFF00), weight[k * pitch]));
        }
        out[i] = sum_even, odd[i] = sum_odd;
    }
}

/* The same for one output column of one channel, from a start value of `centre`; source columns lie `step` apart. */
INLINE void blend_shorts(const int16_t *column, int step, const int16_t *weight, int pitch, int taps, int rows,
                         int16_t centre, int16_t *restrict out)
{
    for (int i = 0; i < rows; i++) {
        int16_t sum = centre;
        for (int k = 0; k < taps; k++)
            sum = (int16_t)(sum + mul_q15(column[k * step + i], weight[k * pitch]));
        out[i] = sum;
    }
}

/* Calls with `taps` a constant from 1 to MAX_UNROLL, which a resize to half the size needs at most. */
#define CASE(n, call) case n: { enum { taps = n }; call; break; }
#define UNROLLED(number, call, otherwise)                                                                   \
    switch (number) {                                                                                       \
        CASE(1, call) CASE(2, call) CASE(3, call) CASE(4, call) CASE(5, call) CASE(6, call)                 \
        CASE(7, call) CASE(8, call) CASE(9, call) CASE(10, call) CASE(11, call) CASE(12, call)              \
        default: otherwise;                                                                                 \
    }

INLINE void blend_bytes_by_tap(const uint8_t *row, ptrdiff_t stride, int length, const int16_t *weight, int pitch,
                               int taps, int16_t *out)
{
    blend_bytes(row, stride, length, weight, pitch, MAX_UNROLL, 0, out);
    for (int k = MAX_UNROLL; k < taps; k++)
        blend_bytes(row + k * stride, stride, length, weight + k * pitch, pitch, 1, 1, out);
}

/* Output rows [first, first + strip->rows), fewer at the bottom edge, even bytes before odd ones. */
static CLONES void blend_rows(const Plane *plane, const Axis *x, const Axis *y, int first, const Strip *strip)
{
    const uint8_t *origin = plane->pixels + x->first * plane->channels;
    ptrdiff_t stride = plane->stride;
    int columns = strip->columns;
    int16_t *out = strip->blended;
    for (int i = first; i < y->size && i < first + strip->rows; i++, out += columns) {
        const uint8_t *row = origin + y->start[i] * stride;
        const int16_t *weight = y->weight + i;
        UNROLLED(y->taps, blend_bytes(row, stride, columns, weight, y->pitch, taps, 0, out),
                 blend_bytes_by_tap(row, stride, columns, weight, y->pitch, y->taps, out))
    }
}

/* All output columns, `taps` source columns each: zeros are blended too, so the loop has no branch. */
INLINE void blend_columns_by(const Strip *s, const Axis *x, int taps, int channels, int rows, ptrdiff_t plane,
                             ptrdiff_t pitch, int16_t *out)
{
    for (int i = 0; i < x->size; i++, out += pitch) {
        const int16_t *column = s->turned + (ptrdiff_t)(x->start[i] - x->first) * channels * rows;
        for (int c = 0; c < channels; c++)
            blend_shorts(column + c * rows, channels * rows, x->weight + i, x->pitch, taps, rows, s->centre, out + c * plane);
    }
}

INLINE void blend_columns_of(const Strip *s, const Axis *x, int channels, int rows, const Canvas *canvas, int16_t *out)
{
    UNROLLED(x->taps, blend_columns_by(s, x, taps, channels, rows, canvas->plane, canvas->padded, out),
             blend_columns_by(s, x, x->taps, channels, rows, canvas->plane, canvas->padded, out))
}

/* Rows [first, first + strip->rows) of planes [plane, plane + channels). */
static CLONES void blend_columns(const Strip *s, const Axis *x, int first, int plane, const Canvas *canvas)
{
    int16_t *out = column_of(canvas, plane, 0) + first;
    if (s->channels == 3)
        blend_columns_of(s, x, 3, RGB_STRIP, canvas, out);
    else
        blend_columns_of(s, x, 1, PLANE_STRIP, canvas, out);
}

/* Bicubic weights, some of which are negative, overshoot. */
static CLONES void clamp_planes(const Canvas *canvas)
{
    for (int plane = 0; plane < 3; plane++) {
        int16_t *values = column_of(canvas, plane, 0), low = canvas->is_ycc && plane > 0 ? -CENTRE : 0;
        for (int i = 0; i < (canvas->size * canvas->padded & ~15); i++)
            values[i] = clamp_short(values[i], low, (int16_t)(low + Q6_WHITE));
    }
}

/* The strip's rows as blend_bytes leaves them to columns, even and odd ones in turn again. */
static CLONES void rows_to_columns(const Strip *s)
{
    int half = s->columns / 2;
    for (int i = 0; i < half; i += 8)
        for (int odd = 0; odd < 2; odd++)
            for (int row = 0; row < s->rows; row += 8)
                transpose_tile(s->blended + (ptrdiff_t)row * s->columns + odd * half + i, s->columns,
                               s->turned + (ptrdiff_t)(2 * i + odd) * s->rows + row, 2 * s->rows);
}

static int reserve_strip(ResizeScratch *scratch, const Plane *plane, const Axis *x, Strip *strip)
{
    int rows = plane->channels == 3 ? RGB_STRIP : PLANE_STRIP;
    int columns = ((x->last - x->first) * plane->channels + 31) & ~31;
    size_t bytes = (size_t)columns * rows * sizeof(int16_t);
    *strip = (Strip){plane->channels, rows, columns, 0, reserve(&scratch->blended, bytes),
                     reserve(&scratch->turned, bytes)};
    return strip->blended && strip->turned;
}

/* The axes of all planes; 0 if memory is short. */
static int make_axes(const Image *image, const Params *p, enum Filter filter, int size, ResizeScratch *scratch, Axes *axes)
{
    const Plane *last = image->plane + image->num_planes - 1;
    int length[2] = {last->width, last->height};
    for (int i = 0; i < 2; i++) {
        Resampling r = {filter, size, i == 0 && p->flip, p->box[i], p->box[2 + i], p->limit[i], p->limit[2 + i]};
        if (!make_axis(scratch->axes + i, &r, 0, axes->whole + i))
            return 0;
        if (last->halved[i] && !make_axis(scratch->axes + 2 + i, &r, length[i], axes->half + i))
            return 0;
    }
    return 1;
}

/* Fills planes [first, first + plane->channels) of the canvas. */
static enum Status resize_plane(const Plane *plane, const Axes *axes, int first, ResizeScratch *scratch,
                                const Canvas *canvas)
{
    const Axis *x = plane->halved[0] ? axes->half : axes->whole, *y = (plane->halved[1] ? axes->half : axes->whole) + 1;
    Strip strip;
    if (!reserve_strip(scratch, plane, x, &strip))
        return STATUS_MEMORY;
    strip.centre = first > 0 ? 0 : CENTRE; /* Cb and Cr stay centred */
    for (int row = 0; row < canvas->size; row += strip.rows) {
        blend_rows(plane, x, y, row, &strip);
        rows_to_columns(&strip);
        blend_columns(&strip, x, row, first, canvas);
    }
    return STATUS_OK;
}

/* Fills the canvas from the box of the image. */
static enum Status resize(const Image *image, const Params *p, enum Filter filter, ResizeScratch *scratch, Canvas *canvas)
{
    Axes axes;
    if (!make_axes(image, p, filter, canvas->size, scratch, &axes))
        return STATUS_MEMORY;
    canvas->num_planes = 3;
    canvas->is_ycc = image->num_planes == 3;
    enum Status status = STATUS_OK;
    for (int i = 0; i < image->num_planes && status == STATUS_OK; i++)
        status = resize_plane(image->plane + i, &axes, i, scratch, canvas);
    if (filter == FILTER_BICUBIC)
        clamp_planes(canvas);
    return status;
}

#endif

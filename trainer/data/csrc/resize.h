/* Antialiased resize of a box, separable; the weights are in axis.h.
 *
 * PIL rounds to 8 bits between its two passes; we keep Q7. The source lies on its side, so columns are long contiguous
 * lines: they are blended first, a strip of output columns at a time. The strip is then turned, so that the second pass,
 * too, blends contiguous values and leaves the view upright. No gather, no horizontal add.
 */
#ifndef FEATHERWEIGHT_RESIZE_H
#define FEATHERWEIGHT_RESIZE_H

#include "axis.h"
#include "decode.h"

/* STRIP: columns that are resized together, one or more whole vectors. */
enum { STRIP = 32, MAX_UNROLL = 12, CENTRE = 128 * Q6_ONE };

typedef struct {
    Buffer axes[4], blended, turned;
} ResizeScratch;

/* Across and down, of the image and of planes that have half of its pixels. */
typedef struct {
    Axis whole[2], half[2];
} Axes;

/* One strip's way through the two passes. */
typedef struct {
    int length;     /* of a source column, to whole vectors */
    int16_t centre; /* added to every result */
    int16_t *blended, *turned;
} Strip;

typedef uint16_t __attribute__((aligned(1), may_alias)) BytePair;
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "blend_bytes takes the low byte of a pair for the first");

/* out[i] (+)= sum over taps of weight * column[i], the even bytes into the first half of `out` and the odd ones into the
 * second: a pair of bytes taken as 16 bits parts by a shift and a mask, which is cheaper than widening every byte. Each
 * becomes (byte - 128) * 256, so that all 16 bits are used and a Q14 weight makes the result Q7. `taps` and `add` are
 * constants where this is inlined, so the sums live in registers. */
INLINE void blend_bytes(const uint8_t *column, ptrdiff_t stride, int length, const int16_t *weight, int pitch, int taps,
                        int add, int16_t *restrict out)
{
    int half = length / 2 & ~15;
    int16_t *restrict odd = out + half;
    for (ptrdiff_t i = 0; i < half; i++) {
        int16_t sum_even = add ? out[i] : 0, sum_odd = add ? odd[i] : 0;
        for (int k = 0; k < taps; k++) {
            uint16_t pair = ((const BytePair *)(column + k * stride))[i] ^ 0x8080;
            sum_even = (int16_t)(sum_even + mul_q15((int16_t)(pair << 8), weight[k * pitch]));
            sum_odd = (int16_t)(sum_odd + mul_q15((int16_t)(pair & 0xFF00), weight[k * pitch]));
        }
        out[i] = sum_even, odd[i] = sum_odd;
    }
}

/* The same for a strip's part of one output row, from a start value of `centre`. */
INLINE void blend_shorts(const int16_t *row, const int16_t *weight, int pitch, int taps, int16_t centre,
                         int16_t *restrict out)
{
    for (int i = 0; i < STRIP; i++) {
        int16_t sum = centre;
        for (int k = 0; k < taps; k++)
            sum = (int16_t)(sum + mul_q15(row[k * STRIP + i], weight[k * pitch]));
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

INLINE void blend_bytes_by_tap(const uint8_t *column, ptrdiff_t stride, int length, const int16_t *weight, int pitch,
                               int taps, int16_t *out)
{
    blend_bytes(column, stride, length, weight, pitch, MAX_UNROLL, 0, out);
    for (int k = MAX_UNROLL; k < taps; k++)
        blend_bytes(column + k * stride, stride, length, weight + k * pitch, pitch, 1, 1, out);
}

/* Output columns [first, first + STRIP), fewer at the right edge, even bytes before odd ones. */
static CLONES void blend_columns(const Plane *plane, const Axis *x, const Axis *y, int first, const Strip *strip)
{
    const uint8_t *origin = plane->pixels + y->first;
    ptrdiff_t stride = plane->stride;
    int length = strip->length, pitch = x->pitch;
    int16_t *out = strip->blended;
    for (int i = first; i < x->size && i < first + STRIP; i++, out += length) {
        const uint8_t *column = origin + x->start[i] * stride;
        const int16_t *weight = x->weight + i;
        UNROLLED(x->taps, blend_bytes(column, stride, length, weight, pitch, taps, 0, out),
                 blend_bytes_by_tap(column, stride, length, weight, pitch, x->taps, out))
    }
}

/* All output rows, `taps` source rows each: zeros are blended too, so the loop has no branch. */
INLINE void blend_rows_by(const Strip *s, const Axis *y, int taps, ptrdiff_t out_pitch, int16_t *out)
{
    int size = y->size, pitch = y->pitch;
    for (int i = 0; i < size; i++, out += out_pitch)
        blend_shorts(s->turned + (ptrdiff_t)(y->start[i] - y->first) * STRIP, y->weight + i, pitch, taps, s->centre, out);
}

static CLONES void blend_rows(const Strip *s, const Axis *y, ptrdiff_t pitch, int16_t *out)
{
    UNROLLED(y->taps, blend_rows_by(s, y, taps, pitch, out), blend_rows_by(s, y, y->taps, pitch, out))
}

/* Bicubic weights, some of which are negative, overshoot. */
static CLONES void clamp_planes(const Canvas *canvas)
{
    for (int plane = 0; plane < 3; plane++) {
        int16_t *values = row_of(canvas, plane, 0), low = canvas->is_ycc && plane > 0 ? -CENTRE : 0;
        for (int i = 0; i < (canvas->size * canvas->padded & ~15); i++)
            values[i] = clamp_short(values[i], low, (int16_t)(low + Q6_WHITE));
    }
}

/* The strip's columns as blend_bytes leaves them to rows, even and odd ones in turn again. */
static CLONES void columns_to_rows(const Strip *s)
{
    int half = s->length / 2;
    for (int i = 0; i < half; i += 8)
        for (int odd = 0; odd < 2; odd++)
            for (int column = 0; column < STRIP; column += 8)
                transpose_tile(s->blended + (ptrdiff_t)column * s->length + odd * half + i, s->length,
                               s->turned + (ptrdiff_t)(2 * i + odd) * STRIP + column, 2 * STRIP);
}

static int reserve_strip(ResizeScratch *scratch, const Axis *y, Strip *strip)
{
    int length = (y->last - y->first + 31) & ~31;
    size_t bytes = (size_t)length * STRIP * sizeof(int16_t);
    *strip = (Strip){length, 0, reserve(&scratch->blended, bytes), reserve(&scratch->turned, bytes)};
    return strip->blended && strip->turned;
}

/* The axes of all planes; 0 if memory is short. */
static int make_axes(const Image *image, const Params *p, enum Filter filter, int size, ResizeScratch *scratch, Axes *axes)
{
    const Plane *last = image->plane + 2;
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

/* Fills plane `number` of the canvas. */
static enum Status resize_plane(const Image *image, int number, const Axes *axes, ResizeScratch *scratch,
                                const Canvas *canvas)
{
    const Plane *plane = image->plane + number;
    const Axis *x = plane->halved[0] ? axes->half : axes->whole, *y = (plane->halved[1] ? axes->half : axes->whole) + 1;
    Strip strip;
    if (!reserve_strip(scratch, y, &strip))
        return STATUS_MEMORY;
    strip.centre = image->is_ycc && number > 0 ? 0 : CENTRE; /* Cb and Cr stay centred */
    for (int first = 0; first < canvas->size; first += STRIP) {
        blend_columns(plane, x, y, first, &strip);
        columns_to_rows(&strip);
        blend_rows(&strip, y, canvas->padded, row_of(canvas, number, 0) + first);
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
    canvas->is_ycc = image->is_ycc;
    enum Status status = STATUS_OK;
    for (int i = 0; i < 3 && status == STATUS_OK; i++)
        status = resize_plane(image, i, &axes, scratch, canvas);
    if (filter == FILTER_BICUBIC)
        clamp_planes(canvas);
    return status;
}

#endif

/* Antialiased resize of a box, separable, with PIL's kernels, tap positions and normalisation.
 *
 * PIL (Resample.c, precompute_coeffs) is the reference. It rounds to 8 bits between its two passes; we keep Q7.
 * Rows are blended first, STRIP output rows at a time; the strip is then transposed, so that the second pass, too,
 * blends long contiguous rows: there one "row" is a column of STRIP pixels. No gather, no horizontal add.
 */
#ifndef FEATHERWEIGHT_RESIZE_H
#define FEATHERWEIGHT_RESIZE_H

#include "decode.h"

enum { STRIP = 16, LANES = 3 * STRIP, WEIGHT_ONE = 1 << 14, MAX_UNROLL = 12, CENTRE = 128 * Q6_ONE };

/* The weighted sum of which source pixels makes each output pixel; weights are Q14 and sum to one. */
typedef struct {
    int *start, *count;
    int16_t *weight; /* size rows of `most` */
    int most;
} Axis;

typedef struct {
    Buffer axes[2], values, blended, turned, resized;
} ResizeScratch;

static double bicubic(double x)
{
    x = fabs(x);
    if (x < 1)
        return (1.5 * x - 2.5) * x * x + 1; /* a = -0.5 */
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

static double triangle(double x)
{
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

/* Rounds weights to Q14 as differences of their rounded running sum: they add up to one exactly, so that a flat area
 * stays exactly flat, and hundreds of small weights err no more than a few large ones. */
static void quantise(const double *value, double sum, int count, int16_t *weight)
{
    double running = 0, unit = WEIGHT_ONE / sum;
    int before = 0;
    for (int i = 0; i < count; i++) {
        running += value[i] * unit;
        int now = (int)lrint(running);
        weight[i] = (int16_t)(now - before);
        before = now;
    }
}

/* One output pixel. `centre` and `length` are relative to the first readable pixel. */
static void weigh(enum Filter filter, double centre, double stretch, int length, double *value, int *start, int *count,
                  int16_t *weight)
{
    double support = (filter == FILTER_BICUBIC ? 2.0 : 1.0) * stretch, sum = 0;
    int first = (int)(centre - support + 0.5), last = (int)(centre + support + 0.5);
    first = first < 0 ? 0 : first;
    last = last > length ? length : last;
    for (int i = first; i < last; i++) {
        double x = (i - centre + 0.5) / stretch;
        value[i - first] = filter == FILTER_BICUBIC ? bicubic(x) : triangle(x);
        sum += value[i - first];
    }
    quantise(value, sum, last - first, weight);
    *start = first, *count = last - first;
}

/* size outputs from the box [low, high) of an axis whose pixels [0, length) may be read; 0 if memory is short. */
static int make_axis(ResizeScratch *scratch, int which, enum Filter filter, int size, double low, double high,
                     int length, Axis *axis)
{
    double scale = (high - low) / size, stretch = scale < 1 ? 1 : scale;
    double taps = 2 * ceil((filter == FILTER_BICUBIC ? 2.0 : 1.0) * stretch) + 1;
    axis->most = taps > length ? length : (int)taps;
    size_t bytes = (size_t)size * (2 * sizeof(int) + axis->most * sizeof(int16_t));
    axis->start = reserve(&scratch->axes[which], bytes);
    double *value = reserve(&scratch->values, ((size_t)axis->most + 1) * sizeof(double));
    if (!axis->start || !value)
        return 0;
    axis->count = axis->start + size;
    axis->weight = (int16_t *)(axis->count + size);
    for (int i = 0; i < size; i++)
        weigh(filter, low + (i + 0.5) * scale, stretch, length, value, axis->start + i, axis->count + i,
              axis->weight + (size_t)i * axis->most);
    return 1;
}

/* Mirrors the output: pixel i is made from what pixel size - 1 - i was made from. */
static void flip_axis(Axis *axis, int size)
{
    for (int i = 0, j = size - 1; i < j; i++, j--) {
        int start = axis->start[i], count = axis->count[i];
        axis->start[i] = axis->start[j], axis->count[i] = axis->count[j];
        axis->start[j] = start, axis->count[j] = count;
        for (int k = 0; k < axis->most; k++) {
            int16_t *a = axis->weight + (size_t)i * axis->most + k, *b = axis->weight + (size_t)j * axis->most + k;
            int16_t weight = *a;
            *a = *b, *b = weight;
        }
    }
}

typedef uint16_t __attribute__((aligned(1), may_alias)) BytePair;
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "blend_bytes takes the low byte of a pair for the first");

/* out[i] (+)= sum over taps of weight * row[i], the even bytes into the first half of `out` and the odd ones into the
 * second: a pair of bytes taken as 16 bits parts by a shift and a mask, which is cheaper than widening every byte. Each
 * becomes (byte - 128) * 256, so that all 16 bits are used and a Q14 weight makes the result Q7. `taps` and `add` are
 * constants where this is inlined, so the sums live in registers. */
INLINE void blend_bytes(const uint8_t *row, ptrdiff_t stride, int length, const int16_t *weight, int taps, int add,
                        int16_t *restrict out)
{
    int half = length / 2 & ~15;
    int16_t *restrict odd = out + half;
    for (ptrdiff_t i = 0; i < half; i++) {
        int16_t sum_even = add ? out[i] : 0, sum_odd = add ? odd[i] : 0;
        for (int k = 0; k < taps; k++) {
            uint16_t pair = ((const BytePair *)(row + k * stride))[i] ^ 0x8080;
            sum_even = (int16_t)(sum_even + mul_q15((int16_t)(pair << 8), weight[k]));
            sum_odd = (int16_t)(sum_odd + mul_q15((int16_t)(pair & 0xFF00), weight[k]));
        }
        out[i] = sum_even, odd[i] = sum_odd;
    }
}

INLINE void blend_shorts(const int16_t *row, ptrdiff_t stride, int length, const int16_t *weight, int taps, int add,
                         int16_t *restrict out)
{
    for (int i = 0; i < (length & ~15); i++) {
        int16_t sum = add ? out[i] : 0;
        for (int k = 0; k < taps; k++)
            sum = (int16_t)(sum + mul_q15(row[k * stride + i], weight[k]));
        out[i] = sum;
    }
}

/* Any number of taps: up to MAX_UNROLL unrolled, which a resize to half the size needs at most, then one by one. */
#define CASE(blend, n) case n: blend(row, stride, length, weight, n, 0, out); break;
#define BLEND(blend, row_, stride_, length_, weight_, taps_, out_)                                               \
    do {                                                                                                         \
        __typeof__(row_) row = (row_);                                                                           \
        ptrdiff_t stride = (stride_);                                                                            \
        int length = (length_), taps = (taps_);                                                                  \
        const int16_t *weight = (weight_);                                                                       \
        int16_t *out = (out_);                                                                                   \
        switch (taps < MAX_UNROLL ? taps : MAX_UNROLL) {                                                         \
            CASE(blend, 1) CASE(blend, 2) CASE(blend, 3) CASE(blend, 4) CASE(blend, 5) CASE(blend, 6)            \
            CASE(blend, 7) CASE(blend, 8) CASE(blend, 9) CASE(blend, 10) CASE(blend, 11) CASE(blend, 12)         \
        }                                                                                                        \
        for (int done = MAX_UNROLL; done < taps; done++)                                                         \
            blend(row + done * stride, stride, length, weight + done, 1, 1, out);                                \
    } while (0)

/* Turns an 8 x 8 tile. */
INLINE void transpose_tile(const int16_t *from, ptrdiff_t from_stride, int16_t *to, ptrdiff_t to_stride)
{
    Eight a[8], b[8];
    for (int i = 0; i < 8; i++)
        memcpy(a + i, from + i * from_stride, sizeof *a);
    for (int round = 0; round < 3; round++) { /* three perfect shuffles of rows i and i + 4 turn the tile */
        for (int i = 0; i < 4; i++) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < 8; i++)
        memcpy(to + i * to_stride, a + i, sizeof *a);
}

/* STRIP rows as blend_bytes leaves them to columns of STRIP values, even and odd ones in turn again. */
static CLONES void rows_to_columns(const int16_t *rows, int length, int16_t *columns)
{
    int half = length / 2;
    for (int i = 0; i < half; i += 8)
        for (int odd = 0; odd < 2; odd++)
            for (int row = 0; row < STRIP; row += 8)
                transpose_tile(rows + (ptrdiff_t)row * length + odd * half + i, length,
                               columns + (2 * i + odd) * STRIP + row, 2 * STRIP);
}

static CLONES void columns_to_rows(const int16_t *columns, ptrdiff_t length, int16_t *rows)
{
    for (ptrdiff_t i = 0; i < length; i += 8)
        for (int row = 0; row < STRIP; row += 8)
            transpose_tile(columns + i * STRIP + row, STRIP, rows + row * length + i, length);
}

/* Output rows [first, first + STRIP), fewer at the bottom edge, each of `columns` values, even bytes before odd ones. */
static CLONES void blend_rows(const uint8_t *origin, ptrdiff_t source_stride, int columns, const Axis *y, int first,
                              int size, int16_t *blended)
{
    for (int i = first; i < size && i < first + STRIP; i++, blended += columns)
        BLEND(blend_bytes, origin + y->start[i] * source_stride, source_stride, columns,
              y->weight + (size_t)i * y->most, y->count[i], blended);
}

/* Output columns, LANES values each. */
static CLONES void blend_columns(const int16_t *turned, const Axis *x, int size, int16_t *resized)
{
    for (int i = 0; i < size; i++)
        BLEND(blend_shorts, turned + (size_t)x->start[i] * LANES, LANES, LANES, x->weight + (size_t)i * x->most,
              x->count[i], resized + (size_t)i * LANES);
    for (int i = 0; i < size * LANES; i++)
        resized[i] = (int16_t)(clamp_short(resized[i], -CENTRE, Q6_WHITE - CENTRE) + CENTRE); /* bicubic overshoots */
}

static void resize_strip(const uint8_t *origin, ptrdiff_t source_stride, int columns, const Axis *x, const Axis *y,
                         int first, ResizeScratch *scratch, Canvas *canvas)
{
    int16_t *blended = scratch->blended.data, *turned = scratch->turned.data, *resized = scratch->resized.data;
    blend_rows(origin, source_stride, columns, y, first, canvas->size, blended);
    rows_to_columns(blended, columns, turned);
    blend_columns(turned, x, canvas->size, resized);
    columns_to_rows(resized, canvas->stride, canvas->pixels + first * canvas->stride);
}

/* Fills the canvas from the box of the image. The canvas must have room for whole strips. */
static enum Status resize(const Image *image, const Params *p, enum Filter filter, ResizeScratch *scratch, Canvas *canvas)
{
    const int32_t *limit = p->limit;
    int width = limit[2] - limit[0], height = limit[3] - limit[1], columns = (3 * width + 31) & ~31;
    Axis x, y;
    if (!make_axis(scratch, 0, filter, canvas->size, p->box[0] - limit[0], p->box[2] - limit[0], width, &x) ||
        !make_axis(scratch, 1, filter, canvas->size, p->box[1] - limit[1], p->box[3] - limit[1], height, &y) ||
        !reserve(&scratch->blended, (size_t)columns * STRIP * sizeof(int16_t)) ||
        !reserve(&scratch->turned, (size_t)columns * STRIP * sizeof(int16_t)) ||
        !reserve(&scratch->resized, (size_t)canvas->stride * STRIP * sizeof(int16_t)))
        return STATUS_MEMORY;
    if (p->flip)
        flip_axis(&x, canvas->size);
    const uint8_t *origin = image->pixels + limit[1] * image->stride + 3 * (ptrdiff_t)limit[0];
    for (int row = 0; row < canvas->size; row += STRIP)
        resize_strip(origin, image->stride, columns, &x, &y, row, scratch, canvas);
    return STATUS_OK;
}

#endif

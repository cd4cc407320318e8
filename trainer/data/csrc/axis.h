/* The weights of an antialiased resize along one axis, with PIL's kernels, tap positions and normalisation.
 *
 * PIL (Resample.c, precompute_coeffs) is the reference.
 */
#ifndef FEATHERWEIGHT_AXIS_H
#define FEATHERWEIGHT_AXIS_H

#include "views.h"

enum { WEIGHT_ONE = 1 << 14 };

/* What is resized to what: `size` outputs from the box [low, high) of an image whose pixels [from, to) may be read. */
typedef struct {
    enum Filter filter;
    int size, flip;
    double low, high;
    int from, to;
} Resampling;

/* The weighted sum of which source pixels makes each output pixel; weights are Q14 and sum to one. */
typedef struct {
    int *start, *count;
    int16_t *weight; /* size rows of `pitch`, zeros after the first `count` */
    int size, pitch;
    int taps;        /* the largest count */
    int first, last; /* the pixels [first, last) are all that is read */
} Axis;

INLINE double bicubic(double x)
{
    x = fabs(x);
    if (x < 1)
        return (1.5 * x - 2.5) * x * x + 1; /* a = -0.5 */
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

INLINE double triangle(double x)
{
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

static int reserve_axis(Buffer *buffer, int size, int pitch, Axis *axis)
{
    size_t bytes = (size_t)size * (2 * sizeof(int) + pitch * sizeof(int16_t));
    *axis = (Axis){.size = size, .pitch = pitch, .start = reserve(buffer, bytes)};
    if (!axis->start)
        return 0;
    memset(axis->start, 0, bytes);
    axis->count = axis->start + size;
    axis->weight = (int16_t *)(axis->count + size);
    return 1;
}

INLINE int16_t *weights_of(const Axis *axis, int i)
{
    return axis->weight + (size_t)i * axis->pitch;
}

/* Finds what is read; then lets all outputs have `taps` taps inside it, some of them zero. */
static void finish_axis(Axis *axis)
{
    int taps = 0, first = INT32_MAX, last = 0;
    for (int i = 0; i < axis->size; i++) {
        int start = axis->start[i], count = axis->count[i];
        taps = count > taps ? count : taps;
        first = start < first ? start : first;
        last = start + count > last ? start + count : last;
    }
    for (int i = 0; i < axis->size; i++) {
        int excess = axis->start[i] + taps - last;
        if (excess <= 0)
            continue;
        memmove(weights_of(axis, i) + excess, weights_of(axis, i), (taps - excess) * sizeof(int16_t));
        memset(weights_of(axis, i), 0, excess * sizeof(int16_t));
        axis->start[i] -= excess, axis->count[i] = taps;
    }
    axis->taps = taps, axis->first = first, axis->last = last;
}

/* Rounds weights to Q14 as differences of their rounded running sum: they add up to one exactly, so that a flat area
 * stays exactly flat, and hundreds of small weights err no more than a few large ones. */
INLINE void quantise(const double *value, double sum, int count, int16_t *weight)
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

/* One output, at `centre`, which is relative to the first of `length` readable pixels. */
INLINE void weigh(enum Filter filter, double centre, double stretch, int length, double *value, int *start, int *count,
                  int16_t *weight)
{
    double support = (filter == FILTER_BICUBIC ? 2.0 : 1.0) * stretch, unit = 1 / stretch, sum = 0;
    int first = (int)(centre - support + 0.5), last = (int)(centre + support + 0.5);
    first = first < 0 ? 0 : first;
    last = last > length ? length : last;
    for (int i = first; i < last; i++) {
        double x = (i - centre + 0.5) * unit;
        value[i - first] = filter == FILTER_BICUBIC ? bicubic(x) : triangle(x);
        sum += value[i - first];
    }
    quantise(value, sum, last - first, weight);
    *start = first, *count = last - first;
}

/* 0 if memory is short. */
static int make_axis(Buffer *buffer, Buffer *values, const Resampling *r, Axis *axis)
{
    double scale = (r->high - r->low) / r->size, stretch = scale < 1 ? 1 : scale;
    int pitch = 2 * (int)ceil((r->filter == FILTER_BICUBIC ? 2.0 : 1.0) * stretch) + 1, length = r->to - r->from;
    double *value = reserve(values, pitch * sizeof *value);
    if (!value || !reserve_axis(buffer, r->size, pitch, axis))
        return 0;
    for (int i = 0; i < r->size; i++) {
        int to = r->flip ? r->size - 1 - i : i;
        double centre = r->low - r->from + (i + 0.5) * scale;
        if (r->filter == FILTER_BICUBIC)
            weigh(FILTER_BICUBIC, centre, stretch, length, value, axis->start + to, axis->count + to, weights_of(axis, to));
        else
            weigh(FILTER_TRIANGLE, centre, stretch, length, value, axis->start + to, axis->count + to, weights_of(axis, to));
        axis->start[to] += r->from;
    }
    finish_axis(axis);
    return 1;
}

INLINE int weight_at(const int16_t *weight, int count, int i)
{
    return i >= 0 && i < count ? weight[i] : 0;
}

/* Weights [*start, *start + count) of an image's pixels as weights of a plane's that has half of them, `length`; returns
 * their number. libjpeg's smooth upsampling makes a pixel of 3/4 of the plane's pixel under it and 1/4 of the nearer
 * neighbour, or of the same one where there is none. So the plane's pixels up to j hold all of pixels up to 2 j, 3/4 of
 * the next, and 1/4 of the one after that; they are the differences of these sums, rounded as in quantise. */
INLINE int halve(const int16_t *weight, int *start, int count, int length, int16_t *half)
{
    int first = *start > 0 ? (*start - 1) >> 1 : 0, last = (*start + count) >> 1, sum = 0, before = 0;
    last = last < length ? last : length - 1;
    for (int j = first; j <= last; j++) {
        int i = 2 * j - *start;
        sum += weight_at(weight, count, i - 1) + weight_at(weight, count, i);
        int now = sum + ((3 * weight_at(weight, count, i + 1) + weight_at(weight, count, i + 2) + 2) >> 2);
        now = j == last ? WEIGHT_ONE : now;
        half[j - first] = (int16_t)(now - before);
        before = now;
    }
    *start = first;
    return last - first + 1;
}

/* The axis of a plane that has half of the image's pixels, `length`; 0 if memory is short. */
static int halve_axis(Buffer *buffer, const Axis *full, int length, Axis *axis)
{
    if (!reserve_axis(buffer, full->size, full->taps / 2 + 2, axis))
        return 0;
    for (int i = 0; i < full->size; i++) {
        axis->start[i] = full->start[i];
        axis->count[i] = halve(weights_of(full, i), axis->start + i, full->count[i], length, weights_of(axis, i));
    }
    finish_axis(axis);
    return 1;
}

#endif

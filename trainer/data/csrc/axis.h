/* The weights of an antialiased resize along one axis, with PIL's kernels, tap positions and normalisation.
 *
 * PIL (Resample.c, precompute_coeffs) is the reference. All outputs get as many taps as the one with most, some of them
 * zero, and a tap of all outputs lies together: so LANES outputs are weighed at a time.
 */
#ifndef FEATHERWEIGHT_AXIS_H
#define FEATHERWEIGHT_AXIS_H

#include "views.h"

enum { WEIGHT_ONE = 1 << 14, LANES = 16 };

/* What is resized to what: `size` outputs from the box [low, high) of an image whose pixels [from, to) may be read. */
typedef struct {
    enum Filter filter;
    int size, flip;
    double low, high;
    int from, to;
} Resampling;

/* The weighted sum of which source pixels makes each output pixel; weights are Q14 and sum to one. */
typedef struct {
    int *start;      /* of each output: its first source pixel */
    int16_t *weight; /* `taps` rows of `pitch`, one value an output */
    int size, pitch, taps;
    int first, last; /* the pixels [first, last) are all that is read */
} Axis;

INLINE float bicubic(float x)
{
    x = fabsf(x);
    x = x < 2 ? x : 2;
    float near = (1.5f * x - 2.5f) * x * x + 1, far = ((-0.5f * x + 2.5f) * x - 4) * x + 2; /* a = -0.5 */
    return x < 1 ? near : far;
}

INLINE float triangle(float x)
{
    x = 1 - fabsf(x);
    return x > 0 ? x : 0;
}

INLINE float filtered(enum Filter filter, float x)
{
    return filter == FILTER_BICUBIC ? bicubic(x) : triangle(x);
}

INLINE int within(int value, int low, int high)
{
    value = value > high ? high : value;
    return value < low ? low : value;
}

/* To the nearest, in the form of which every compiler makes one instruction a vector; the sums that come here are >= -1. */
INLINE int to_q14(float value)
{
    return (int)(value * WEIGHT_ONE + (WEIGHT_ONE + 0.5f)) - WEIGHT_ONE;
}

/* Where the filter lies on the pixels of LANES outputs. */
typedef struct {
    float unit;         /* from one pixel to the next, as the filter's argument */
    float at[LANES];    /* the argument at `start` */
    float share[LANES]; /* what a pixel's value is multiplied with, so that all sum to one */
    int start[LANES], taps; /* pixels [start, start + taps) */
} Window;

INLINE double stretch_of(const Resampling *r)
{
    double scale = (r->high - r->low) / r->size;
    return scale < 1 ? 1 : scale;
}

INLINE void place_window(const Resampling *r, enum Filter filter, int output, Window *w)
{
    double scale = (r->high - r->low) / r->size, unit = 1 / stretch_of(r);
    double support = (filter == FILTER_BICUBIC ? 2.0 : 1.0) * stretch_of(r);
    float sum[LANES] = {0};
    w->unit = (float)unit;
    for (int i = 0; i < LANES; i++) {
        int n = output + i < r->size ? output + i : r->size - 1;
        n = r->flip ? r->size - 1 - n : n;
        double centre = r->low + (n + 0.5) * scale;
        w->start[i] = within((int)(centre - support + 0.5), r->from, r->to - w->taps);
        w->at[i] = (float)((w->start[i] + 0.5 - centre) * unit);
    }
    for (int k = 0; k < w->taps; k++)
        for (int i = 0; i < LANES; i++)
            sum[i] += filtered(filter, w->at[i] + (float)k * w->unit);
    for (int i = 0; i < LANES; i++)
        w->share[i] = 1 / sum[i];
}

/* The share of an output's pixel number k, counted from its start. */
INLINE float share_of(const Window *w, enum Filter filter, int i, int k)
{
    float value = filtered(filter, w->at[i] + (float)k * w->unit) * w->share[i];
    return (unsigned)k < (unsigned)w->taps ? value : 0;
}

/* Rounds weights to Q14 as differences of their rounded running sum: they add up to one exactly, so that a flat area
 * stays exactly flat, and hundreds of small weights err no more than a few large ones. */
INLINE void round_weights(const float *restrict running, int16_t *restrict before, int16_t *restrict weight)
{
    for (int i = 0; i < LANES; i++) {
        int16_t now = (int16_t)to_q14(running[i]);
        weight[i] = (int16_t)(now - before[i]);
        before[i] = now;
    }
}

INLINE void weigh_whole(const Window *w, enum Filter filter, int output, const Axis *axis)
{
    float running[LANES] = {0};
    int16_t before[LANES] = {0};
    for (int k = 0; k < axis->taps; k++) {
        for (int i = 0; i < LANES; i++)
            running[i] += filtered(filter, w->at[i] + (float)k * w->unit) * w->share[i];
        round_weights(running, before, axis->weight + k * axis->pitch + output);
    }
    memcpy(axis->start + output, w->start, sizeof w->start);
}

/* The same for a plane that has half of the image's pixels, `length`. libjpeg's smooth upsampling makes a pixel of 3/4 of
 * the plane's pixel under it and 1/4 of the nearer neighbour, or of the same one where there is none. So the plane's
 * pixels up to j hold all of pixels up to 2 j, 3/4 of the next, and 1/4 of the one after that. */
INLINE void weigh_half(const Window *w, enum Filter filter, int length, int output, const Axis *axis)
{
    float whole[LANES], running[LANES];
    int16_t before[LANES] = {0};
    int pixel[LANES]; /* 2 j, counted from the window's start */
    for (int i = 0; i < LANES; i++) {
        int j = within((w->start[i] - 1) >> 1, 0, length - axis->taps);
        axis->start[output + i] = j;
        pixel[i] = 2 * j - w->start[i];
        whole[i] = share_of(w, filter, i, pixel[i]);
    }
    for (int k = 0, last = axis->taps - 1; k <= last; k++) {
        for (int i = 0; i < LANES; i++) {
            float next = share_of(w, filter, i, pixel[i] + 2 * k + 1);
            float one_after = share_of(w, filter, i, pixel[i] + 2 * k + 2);
            running[i] = k == last ? 1 : whole[i] + 0.75f * next + 0.25f * one_after;
            whole[i] += next + one_after;
        }
        round_weights(running, before, axis->weight + k * axis->pitch + output);
    }
}

/* length: 0, or that of a plane that has half of the pixels. */
INLINE void weigh(const Resampling *r, enum Filter filter, int taps, int length, const Axis *axis)
{
    Window w = {.taps = taps};
    for (int output = 0; output < axis->pitch; output += LANES) {
        place_window(r, filter, output, &w);
        if (length)
            weigh_half(&w, filter, length, output, axis);
        else
            weigh_whole(&w, filter, output, axis);
    }
}

static CLONES void weigh_axis(const Resampling *r, int taps, int length, const Axis *axis)
{
    if (r->filter == FILTER_BICUBIC)
        weigh(r, FILTER_BICUBIC, taps, length, axis);
    else
        weigh(r, FILTER_TRIANGLE, taps, length, axis);
}

/* length: 0, or that of a plane that has half of the image's pixels. Returns 0 if memory is short. */
static int make_axis(Buffer *buffer, const Resampling *r, int length, Axis *axis)
{
    int window = (int)ceil((r->filter == FILTER_BICUBIC ? 4.0 : 2.0) * stretch_of(r));
    int whole = within(window, 1, r->to - r->from), half = within(whole / 2 + 2, 1, length);
    int taps = length ? half : whole, pitch = (r->size + LANES - 1) / LANES * LANES;
    *axis = (Axis){.size = r->size, .pitch = pitch, .taps = taps};
    axis->start = reserve(buffer, pitch * (sizeof(int) + taps * sizeof(int16_t)));
    if (!axis->start)
        return 0;
    axis->weight = (int16_t *)(axis->start + pitch);
    weigh_axis(r, whole, length, axis);
    int a = axis->start[0], b = axis->start[r->size - 1];
    axis->first = a < b ? a : b, axis->last = (a < b ? b : a) + taps;
    return 1;
}

#endif

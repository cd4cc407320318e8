/* Shared by the parts of the view kernel: what a recipe is, what is drawn for one view, and growing scratch memory.
 *
 * Pixels between two steps are int16 in units of 1/64 grey level ("Q6"), one plane a channel: half the memory of float,
 * twice the lanes of a vector register, and rounding far below the final rounding to 8 bits. The code uses no
 * floating-point shortcut that depends on the vector width, so every build gives the same bytes.
 */
#ifndef FEATHERWEIGHT_VIEWS_H
#define FEATHERWEIGHT_VIEWS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Three machine-code versions of a hot function, chosen once at load time; elsewhere the one portable version. */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(VIEWS_PORTABLE)
#define CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

enum { Q6_ONE = 64, Q6_WHITE = 255 * Q6_ONE };

/* Why a sample could not be viewed; the texts are in kernel.py. */
enum Status { STATUS_OK, STATUS_UNREADABLE, STATUS_DAMAGED, STATUS_COLOUR_SPACE, STATUS_SIZE, STATUS_MEMORY, STATUS_AGAIN };

enum Filter { FILTER_TRIANGLE, FILTER_BICUBIC };
enum Colour { COLOUR_EXACT, COLOUR_LINEAR };
enum ColourOp { OP_BRIGHTNESS, OP_CONTRAST, OP_SATURATION, OP_HUE, NUM_OPS };

/* How one view is cut and changed; kernel.py mirrors it as VIEW. */
typedef struct {
    int32_t size;   /* pixels, square */
    int32_t resize; /* > 0: no random numbers; shorter side to `resize`, then the centre `size` x `size` */
    int64_t offset; /* bytes that one sample takes in the earlier runs of equal-size views */
    int64_t index;  /* position inside its run */
    double scale[2], ratio[2];
    double flip_prob, jitter_prob;
    double strength[NUM_OPS];
    double gray_prob, blur_prob, blur_sigma[2], solarize_prob;
} View;

/* What was drawn for one view of one sample; kernel.py mirrors it as PARAMS. */
typedef struct {
    double box[4];    /* left, top, right, bottom in source pixels */
    int32_t limit[4]; /* the same for the pixels that the resize may read */
    int32_t flip, jitter, gray, solarize;
    int32_t order[NUM_OPS];
    float factor[NUM_OPS]; /* brightness, contrast, saturation: factors; hue: turns */
    float sigma;           /* 0: no blur */
    int32_t reserved;
} Params;

typedef struct {
    uint64_t seed;
    int64_t epoch;
    int32_t num_views, filter, colour;
    int32_t geometry_only; /* crop, resize and flip; the photometric part runs elsewhere */
} Recipe;

typedef struct {
    void *data;
    size_t size;
} Buffer;

/* At least `size` bytes, zeroed when they are new, or NULL; earlier content is lost. */
static inline void *reserve(Buffer *buffer, size_t size)
{
    if (buffer->size >= size)
        return buffer->data;
    free(buffer->data);
    buffer->size = 0;
    size_t rounded = (size + 63) / 64 * 64;
    buffer->data = aligned_alloc(64, rounded);
    if (!buffer->data)
        return NULL;
    memset(buffer->data, 0, rounded);
    buffer->size = rounded;
    return buffer->data;
}

/* One view in the making: planes of R, G and B, or of Y, Cb and Cr, of which the last two are centred on 0. It lies on
 * its side, for so the resize leaves it: a column of the view is contiguous. Only the last step turns it. */
typedef struct {
    int size, padded; /* pixels; padded: of a column, to whole vectors, and columns to as many */
    int num_planes;   /* 1: grey */
    int is_ycc;
    ptrdiff_t plane; /* int16 elements from one plane to the next */
    int16_t *pixels;
} Canvas;

INLINE int16_t *column_of(const Canvas *canvas, int plane, int x)
{
    return canvas->pixels + plane * canvas->plane + (ptrdiff_t)x * canvas->padded;
}

/* In 16 bits from end to end, or the compiler would widen the whole loop. */
INLINE int16_t clamp_short(int16_t value, int16_t low, int16_t high)
{
    value = value < low ? low : value;
    return value > high ? high : value;
}

/* a * b / 2^15, rounded; written in the form that GCC turns into one instruction (pmulhrsw, sqrdmulh). */
INLINE int16_t mul_q15(int16_t a, int16_t b)
{
    return (int16_t)(((((int32_t)a * b) >> 14) + 1) >> 1);
}

#endif

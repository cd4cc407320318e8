/* What happens to one view: a pure function of (seed, epoch, sample id, view index) and the image's size.
 *
 * Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter into four
 * random words, so there is no state to carry, to share or to save. Each parameter has its own place in the counter:
 * changing one probability never shifts the numbers that another parameter sees.
 */
#ifndef FEATHERWEIGHT_PARAMS_H
#define FEATHERWEIGHT_PARAMS_H

#include "views.h"

enum { CROP_TRIES = 10, BLOCK_GATES = CROP_TRIES, BLOCK_FACTORS, BLOCK_OTHER };

static void philox(const uint32_t counter[4], uint64_t key, uint32_t out[4])
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

typedef struct {
    uint64_t seed;
    uint32_t epoch, view;
    uint64_t sample_id;
} Draw;

/* Four numbers, uniform in [0, 1). */
static void uniforms(const Draw *draw, uint32_t block, double u[4])
{
    uint32_t words[4], counter[4] = {block | draw->view << 8, (uint32_t)draw->sample_id,
                                     (uint32_t)(draw->sample_id >> 32), draw->epoch};
    philox(counter, draw->seed, words);
    for (int i = 0; i < 4; i++)
        u[i] = words[i] * 0x1p-32;
}

INLINE double between(double low, double high, double u)
{
    return low + (high - low) * u;
}

static void set_crop(Params *p, int left, int top, int width, int height)
{
    p->limit[0] = left, p->limit[1] = top, p->limit[2] = left + width, p->limit[3] = top + height;
    for (int i = 0; i < 4; i++)
        p->box[i] = p->limit[i];
}

/* The largest centred crop whose aspect ratio is allowed: what torchvision does after ten failures. */
static void fallback_crop(const View *view, int width, int height, Params *p)
{
    double ratio = (double)width / height;
    int w = width, h = height;
    if (ratio < view->ratio[0])
        h = (int)lrint(width / view->ratio[0]);
    else if (ratio > view->ratio[1])
        w = (int)lrint(height * view->ratio[1]);
    w = w < 1 ? 1 : w > width ? width : w;
    h = h < 1 ? 1 : h > height ? height : h;
    set_crop(p, (width - w) / 2, (height - h) / 2, w, h);
}

/* torchvision's RandomResizedCrop.get_params: area uniform in scale, aspect ratio log-uniform, position uniform. */
static void random_crop(const Draw *draw, const View *view, int width, int height, Params *p)
{
    double area = (double)width * height, low = log(view->ratio[0]), high = log(view->ratio[1]), u[4];
    for (uint32_t try = 0; try < CROP_TRIES; try++) {
        uniforms(draw, try, u);
        double target = area * between(view->scale[0], view->scale[1], u[0]);
        double ratio = exp(between(low, high, u[1]));
        double w = rint(sqrt(target * ratio)), h = rint(sqrt(target / ratio)); /* halves to even, as Python's round */
        if (w >= 1 && w <= width && h >= 1 && h <= height) {
            set_crop(p, (int)(u[3] * (width - w + 1)), (int)(u[2] * (height - h + 1)), (int)w, (int)h);
            return;
        }
    }
    fallback_crop(view, width, height, p);
}

/* The order of the four colour operations: permutation number `rank` of 24. */
static void permutation(int rank, int32_t order[NUM_OPS])
{
    int left[NUM_OPS] = {OP_BRIGHTNESS, OP_CONTRAST, OP_SATURATION, OP_HUE};
    for (int i = 0; i < NUM_OPS; i++) {
        int remaining = NUM_OPS - i, pick = rank % remaining;
        rank /= remaining;
        order[i] = left[pick];
        for (int j = pick; j < remaining - 1; j++)
            left[j] = left[j + 1];
    }
}

/* torchvision's ColorJitter.get_params: factors in [max(0, 1 - b), 1 + b], hue in [-h, h] turns. */
static void random_colour(const Draw *draw, const View *view, Params *p)
{
    double u[4];
    uniforms(draw, BLOCK_FACTORS, u);
    for (int op = 0; op < OP_HUE; op++) {
        double strength = view->strength[op], low = strength > 1 ? 0 : 1 - strength;
        p->factor[op] = (float)between(low, 1 + strength, u[op]);
    }
    p->factor[OP_HUE] = (float)between(-view->strength[OP_HUE], view->strength[OP_HUE], u[OP_HUE]);
}

static void draw_random(const Draw *draw, const View *view, int width, int height, Params *p)
{
    double u[4];
    random_crop(draw, view, width, height, p);
    random_colour(draw, view, p);
    uniforms(draw, BLOCK_GATES, u);
    p->flip = u[0] < view->flip_prob;
    p->jitter = u[1] < view->jitter_prob;
    p->gray = u[2] < view->gray_prob;
    int blur = u[3] < view->blur_prob;
    uniforms(draw, BLOCK_OTHER, u);
    permutation((int)(u[0] * 24), p->order);
    p->sigma = blur ? (float)between(view->blur_sigma[0], view->blur_sigma[1], u[1]) : 0;
    p->solarize = u[2] < view->solarize_prob;
}

/* Resize(resize) then CenterCrop(size) of torchvision, as one box in source pixels. */
static void draw_centre(const View *view, int width, int height, Params *p)
{
    int shorter = width < height ? width : height, longer = width < height ? height : width;
    int resized = (int)((double)view->resize * longer / shorter); /* int(), as torchvision */
    double out_w = width <= height ? view->resize : resized, out_h = width <= height ? resized : view->resize;
    double left = rint((out_w - view->size) / 2), top = rint((out_h - view->size) / 2);
    p->box[0] = left * width / out_w, p->box[2] = (left + view->size) * width / out_w;
    p->box[1] = top * height / out_h, p->box[3] = (top + view->size) * height / out_h;
    p->limit[2] = width, p->limit[3] = height;
    permutation(0, p->order);
    for (int op = 0; op < OP_HUE; op++)
        p->factor[op] = 1;
}

static void draw_params(const Recipe *recipe, const View *view, int index, int64_t sample_id, int width, int height,
                        Params *p)
{
    Draw draw = {recipe->seed, (uint32_t)recipe->epoch, (uint32_t)index, (uint64_t)sample_id};
    memset(p, 0, sizeof *p);
    if (view->resize > 0)
        draw_centre(view, width, height, p);
    else
        draw_random(&draw, view, width, height, p);
}

#endif

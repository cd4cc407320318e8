/* Decodes a JPEG once and cuts every augmented view of it. Python calls the functions at the end through ctypes, and
 * FFCV's iterator thread calls views_batch: nothing here raises, prints or exits; each sample gets a status.
 */
#include <pthread.h>
#include <stdatomic.h>

#include "blur.h"
#include "decode.h"
#include "linear.h"
#include "params.h"
#include "resize.h"
#include "views.h"
#include "write.h"

/* Everything one thread needs; it grows to the largest image seen and is kept for the next one. */
typedef struct {
    Decoder decoder;
    ResizeScratch resize;
    Buffer canvas, blurred;
} Scratch;

typedef struct {
    Recipe recipe;
    View *views;
    int num_threads;
    Scratch *scratch; /* one a thread */
} Context;

/* One sample of a batch; kernel.py mirrors it as JOB. */
typedef struct {
    uint64_t address, size;
    int64_t mode, width, height, sample_id, status;
} Job;

typedef struct {
    Context *context;
    Job *jobs;
    int64_t count;
    uint8_t *out;
    atomic_llong next;
} Batch;

typedef struct {
    Batch *batch;
    Scratch *scratch;
} Worker;

enum { MODE_JPEG, MODE_RAW }; /* FFCV's IMAGE_MODES */

static void scratch_free(Scratch *s)
{
    ResizeScratch *r = &s->resize;
    Buffer *buffers[] = {r->axes,     r->axes + 1, r->axes + 2, r->axes + 3,
                         &r->blended, &r->turned,  &s->canvas,  &s->blurred};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        free(buffers[i]->data);
    decoder_free(&s->decoder);
}

/* Y, Cb and Cr serve where a matrix ends the colour changes anyway. */
static enum Status load_image(const Recipe *recipe, const Job *job, Decoder *decoder, Image *image)
{
    const uint8_t *data = (const uint8_t *)(uintptr_t)job->address;
    if (job->width < 1 || job->height < 1 || job->width > JPEG_MAX_DIMENSION || job->height > JPEG_MAX_DIMENSION)
        return STATUS_SIZE;
    *image = (Image){.width = (int)job->width, .height = (int)job->height};
    if (job->mode == MODE_RAW)
        return copy_raw(decoder, data, job->size, image);
    return decode_jpeg(decoder, data, job->size, recipe->colour == COLOUR_LINEAR, image);
}

static int prepare_canvas(int size, Buffer *buffer, Canvas *canvas)
{
    int padded = (size + PLANE_STRIP - 1) / PLANE_STRIP * PLANE_STRIP;
    /* 64: planes a multiple of a page apart would share the sets of a cache */
    *canvas = (Canvas){.size = size, .padded = padded, .plane = (ptrdiff_t)padded * padded + 64};
    canvas->pixels = reserve(buffer, 3 * (size_t)canvas->plane * sizeof(int16_t));
    return canvas->pixels != NULL;
}

/* crop, resize, flip -> colour -> greyscale -> blur -> solarise, in the order of the published pipelines */
static enum Status make_view(const Recipe *recipe, const Image *image, int size, const Params *drawn, Scratch *scratch,
                             uint8_t *out)
{
    Params p = *drawn;
    Canvas canvas;
    if (recipe->geometry_only)
        p.jitter = p.gray = p.solarize = 0, p.sigma = 0;
    if (!prepare_canvas(size, &scratch->canvas, &canvas))
        return STATUS_MEMORY;
    enum Status status = resize(image, &p, recipe->filter, &scratch->resize, &canvas);
    if (status != STATUS_OK)
        return status;
    if (recipe->colour == COLOUR_EXACT && (p.jitter || p.gray))
        colour_exact(&canvas, &p);
    if (recipe->colour == COLOUR_LINEAR && (p.jitter || p.gray || canvas.is_ycc))
        colour_linear(&canvas, &p);
    if (p.sigma > 0)
        status = blur(&canvas, p.sigma, &scratch->blurred);
    write_bytes(&canvas, p.solarize, out);
    return status;
}

/* Where view `v` of the sample in `slot` lies: runs of equal-size views one after the other, each (V, B, S, S, 3). */
static uint8_t *place(const View *v, int64_t count, int64_t slot, uint8_t *out)
{
    return out + count * v->offset + (v->index * count + slot) * 3 * v->size * v->size;
}

static enum Status make_sample(const Batch *batch, int64_t slot, Scratch *scratch)
{
    const Context *context = batch->context;
    const Job *job = batch->jobs + slot;
    Image image;
    enum Status status = load_image(&context->recipe, job, &scratch->decoder, &image);
    for (int i = 0; i < context->recipe.num_views && status == STATUS_OK; i++) {
        Params p;
        const View *view = context->views + i;
        draw_params(&context->recipe, view, i, job->sample_id, image.width, image.height, &p);
        status = make_view(&context->recipe, &image, view->size, &p, scratch, place(view, batch->count, slot, batch->out));
    }
    return status;
}

/* Takes the next sample until none is left: images differ in size, so shares fixed beforehand would leave cores idle. */
static void *work(void *argument)
{
    Worker *worker = argument;
    Batch *batch = worker->batch;
    for (int64_t slot; (slot = atomic_fetch_add(&batch->next, 1)) < batch->count;)
        batch->jobs[slot].status = make_sample(batch, slot, worker->scratch);
    return NULL;
}

/* Fills `out` and each job's status. Threads live for one batch, which costs some 20 us each: nothing idles, leaks or
 * breaks a fork between batches. A thread that cannot start is done without. */
void views_batch(Context *context, Job *jobs, int64_t count, uint8_t *out)
{
    Batch batch = {context, jobs, count, out, 0};
    int64_t wanted = context->num_threads < count ? context->num_threads : count;
    pthread_t thread[wanted + 1];
    Worker worker[wanted + 1];
    int started = 0;
    for (int i = 1; i < wanted; i++) {
        worker[i] = (Worker){&batch, context->scratch + i};
        if (pthread_create(thread + started, NULL, work, worker + i))
            break;
        started++;
    }
    worker[0] = (Worker){&batch, context->scratch};
    work(worker);
    for (int i = 0; i < started; i++)
        pthread_join(thread[i], NULL);
}

void views_close(Context *context)
{
    if (!context)
        return;
    for (int i = 0; context->scratch && i < context->num_threads; i++)
        scratch_free(context->scratch + i);
    free(context->scratch);
    free(context->views);
    free(context);
}

Context *views_open(const Recipe *recipe, const View *views, int num_threads)
{
    Context *context = calloc(1, sizeof *context);
    if (!context)
        return NULL;
    *context = (Context){*recipe, calloc(recipe->num_views, sizeof *views), num_threads,
                         calloc(num_threads, sizeof(Scratch))};
    if (!context->views || !context->scratch) {
        views_close(context);
        return NULL;
    }
    memcpy(context->views, views, recipe->num_views * sizeof *views);
    return context;
}

/* Only between batches. */
void views_set_epoch(Context *context, int64_t epoch)
{
    context->recipe.epoch = epoch;
}

/* params: (num_views, count), view-major */
void views_draw(const Context *context, const Job *jobs, int64_t count, Params *params)
{
    for (int i = 0; i < context->recipe.num_views; i++)
        for (int64_t j = 0; j < count; j++)
            draw_params(&context->recipe, context->views + i, i, jobs[j].sample_id, (int)jobs[j].width,
                        (int)jobs[j].height, params + i * count + j);
}

/* One sample with given parameters instead of drawn ones; out as views_batch writes it for count 1. */
int views_render(Context *context, const Job *job, const Params *params, uint8_t *out)
{
    Image image;
    enum Status status = load_image(&context->recipe, job, &context->scratch->decoder, &image);
    for (int i = 0; i < context->recipe.num_views && status == STATUS_OK; i++) {
        const View *view = context->views + i;
        status = make_view(&context->recipe, &image, view->size, params + i, context->scratch,
                           place(view, 1, 0, out));
    }
    return status;
}

/* For the tests: known answers of the generator, and sizes that kernel.py must agree with. */
void views_philox(const uint32_t *counter, uint64_t key, uint32_t *out)
{
    philox(counter, key, out);
}

void views_sizes(int64_t sizes[4])
{
    sizes[0] = sizeof(Recipe), sizes[1] = sizeof(View), sizes[2] = sizeof(Params), sizes[3] = sizeof(Job);
}

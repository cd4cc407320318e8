/* One JPEG to bytes: accurate integer DCT, smooth chroma upsampling, and no error that goes unnoticed.
 *
 * The bytes are RGB or, where the caller can use them, the file's own planes of Y, Cb and Cr: most files store a quarter
 * as many Cb and Cr, and a resize can take its pixels from those as well as from the upsampled ones.
 *
 * libjpeg repairs what it can and only warns; training on the repaired half-grey picture would hide the fault, so
 * every warning that means lost data makes the sample damaged.
 */
#ifndef FEATHERWEIGHT_DECODE_H
#define FEATHERWEIGHT_DECODE_H

#include <setjmp.h>

#include "huffman.h"
#include "views.h"

#include <jpeglib.h>
#include <jerror.h>

enum { MAX_SCANS = 500, ROWS_PER_CALL = 8, IMAGE_PADDING = 64 };

/* Where a decoding comes back to that was left. */
enum { BY_LIBJPEG = 1, BY_HUFFMAN };

typedef struct {
    struct jpeg_error_mgr manager; /* first: libjpeg hands back a pointer to it */
    jmp_buf escape;
    int damaged;
} ErrorTrap;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_progress_mgr progress;
    ErrorTrap trap;
    int ready;
    Buffer buffer;
    Huffman huffman;
} Decoder;

/* Rows of `channels` interleaved bytes; at least IMAGE_PADDING readable bytes follow the last one. */
typedef struct {
    uint8_t *pixels;
    ptrdiff_t stride;
    int channels, width, height; /* pixels: half as many as the image's where it is `halved` */
    int halved[2];
} Plane;

/* One plane of RGB, or three of Y, Cb and Cr. */
typedef struct {
    int width, height, num_planes;
    Plane plane[3];
} Image;

static void on_error(j_common_ptr jpeg)
{
    longjmp(((ErrorTrap *)jpeg->err)->escape, BY_LIBJPEG);
}

/* level < 0 is a warning. Three of them lose no pixel: odd version numbers and odd but unambiguous headers. */
static void on_message(j_common_ptr jpeg, int level)
{
    int code = jpeg->err->msg_code;
    if (level < 0 && code != JWRN_JFIF_MAJOR && code != JWRN_ADOBE_XFORM && code != JWRN_NOT_SEQUENTIAL)
        ((ErrorTrap *)jpeg->err)->damaged = 1;
}

static void no_output(j_common_ptr jpeg)
{
    (void)jpeg;
}

/* A progressive file of thousands of empty scans would keep a worker busy for minutes. */
static void on_progress(j_common_ptr jpeg)
{
    if (((j_decompress_ptr)jpeg)->input_scan_number > MAX_SCANS)
        on_error(jpeg);
}

static int decoder_init(Decoder *d)
{
    if (d->ready)
        return 1;
    d->jpeg.err = jpeg_std_error(&d->trap.manager);
    d->trap.manager.error_exit = on_error;
    d->trap.manager.emit_message = on_message;
    d->trap.manager.output_message = no_output;
    if (setjmp(d->trap.escape))
        return 0;
    jpeg_create_decompress(&d->jpeg);
    d->progress.progress_monitor = on_progress;
    d->jpeg.client_data = d;
    d->jpeg.progress = &d->progress;
    return d->ready = 1;
}

static void decoder_free(Decoder *d)
{
    if (d->ready)
        jpeg_destroy_decompress(&d->jpeg);
    free(d->buffer.data);
}

#ifdef HAS_HUFFMAN
static boolean decode_mcu(j_decompress_ptr jpeg, JBLOCKROW *blocks)
{
    Decoder *d = jpeg->client_data;
    if (!decode_blocks(&d->huffman, jpeg, blocks) || (!--d->huffman.mcus_left && !end_scan(&d->huffman, jpeg->src)))
        longjmp(d->trap.escape, BY_HUFFMAN);
    return TRUE;
}
#endif

/* libjpeg, with our decoder of its entropy code where that fits. */
static void start_decompress(Decoder *d, int by_libjpeg)
{
    jpeg_start_decompress(&d->jpeg);
#ifdef HAS_HUFFMAN
    if (!by_libjpeg && huffman_fits(&d->jpeg)) {
        huffman_start(&d->huffman, &d->jpeg);
        d->jpeg.entropy->decode_mcu = decode_mcu;
    }
#else
    (void)by_libjpeg;
#endif
}

/* Whether the planes can be used as they are: no chroma, or chroma of full or half the width and height. Chroma so
 * narrow as not to be upsampled smoothly is left to libjpeg. */
static int has_planes(const struct jpeg_decompress_struct *jpeg)
{
    const jpeg_component_info *c = jpeg->comp_info;
    if (jpeg->jpeg_color_space == JCS_GRAYSCALE)
        return 1;
    if (jpeg->jpeg_color_space != JCS_YCbCr || jpeg->image_width <= 4)
        return 0;
    int h = jpeg->max_h_samp_factor, v = jpeg->max_v_samp_factor, same = 1;
    for (int i = 1; i < 3; i++)
        same &= (h == c[i].h_samp_factor || h == 2 * c[i].h_samp_factor) &&
                (v == c[i].v_samp_factor || v == 2 * c[i].v_samp_factor);
    return same && h == c[0].h_samp_factor && v == c[0].v_samp_factor;
}

/* Reads the header; the image must be as large as the file's index says. */
static enum Status read_header(struct jpeg_decompress_struct *jpeg, const uint8_t *data, size_t size,
                               const Image *image)
{
    jpeg_mem_src(jpeg, data, size);
    jpeg_read_header(jpeg, TRUE);
    if ((int)jpeg->image_width != image->width || (int)jpeg->image_height != image->height)
        return STATUS_SIZE;
    if (jpeg->jpeg_color_space == JCS_CMYK || jpeg->jpeg_color_space == JCS_YCCK)
        return STATUS_COLOUR_SPACE;
    jpeg->dct_method = JDCT_ISLOW;
    return STATUS_OK;
}

static enum Status set_rgb(Buffer *buffer, Image *image)
{
    ptrdiff_t stride = 3 * (ptrdiff_t)image->width;
    uint8_t *pixels = reserve(buffer, (size_t)stride * image->height + IMAGE_PADDING);
    image->num_planes = 1;
    image->plane[0] = (Plane){pixels, stride, 3, image->width, image->height, {0, 0}};
    return pixels ? STATUS_OK : STATUS_MEMORY;
}

static enum Status read_rgb(Decoder *d, int by_libjpeg, Image *image)
{
    struct jpeg_decompress_struct *jpeg = &d->jpeg;
    if (set_rgb(&d->buffer, image) != STATUS_OK)
        return STATUS_MEMORY;
    jpeg->out_color_space = JCS_RGB;
    jpeg->do_fancy_upsampling = TRUE;
    start_decompress(d, by_libjpeg);
    while (jpeg->output_scanline < jpeg->output_height) {
        JSAMPROW rows[ROWS_PER_CALL];
        for (int i = 0; i < ROWS_PER_CALL; i++) /* libjpeg stops at the last row by itself */
            rows[i] = image->plane[0].pixels + (jpeg->output_scanline + i) * image->plane[0].stride;
        jpeg_read_scanlines(jpeg, rows, ROWS_PER_CALL);
    }
    return STATUS_OK;
}

/* Room for whole blocks, which is what libjpeg writes. A grey image gets two planes of Cb and Cr all 128. */
static enum Status set_planes(Decoder *d, Image *image)
{
    struct jpeg_decompress_struct *jpeg = &d->jpeg;
    size_t offset[4] = {0};
    image->num_planes = 3;
    for (int i = 0; i < 3; i++) {
        const jpeg_component_info *c = jpeg->comp_info + (i < jpeg->num_components ? i : 0);
        int halved[2] = {2 * c->h_samp_factor == jpeg->max_h_samp_factor,
                         2 * c->v_samp_factor == jpeg->max_v_samp_factor};
        image->plane[i] = (Plane){NULL, DCTSIZE * (ptrdiff_t)c->width_in_blocks, 1, (image->width + halved[0]) >> halved[0],
                                  (image->height + halved[1]) >> halved[1], {halved[0], halved[1]}};
        size_t rows = (size_t)DCTSIZE * (c->height_in_blocks + c->v_samp_factor);
        offset[i + 1] = offset[i] + image->plane[i].stride * rows + IMAGE_PADDING;
    }
    uint8_t *pixels = reserve(&d->buffer, offset[3]);
    for (int i = 0; pixels && i < 3; i++)
        image->plane[i].pixels = pixels + offset[i];
    if (pixels && jpeg->num_components == 1)
        memset(pixels + offset[1], 128, offset[3] - offset[1]);
    return pixels ? STATUS_OK : STATUS_MEMORY;
}

static enum Status read_planes(Decoder *d, int by_libjpeg, Image *image)
{
    struct jpeg_decompress_struct *jpeg = &d->jpeg;
    if (set_planes(d, image) != STATUS_OK)
        return STATUS_MEMORY;
    jpeg->raw_data_out = TRUE;
    jpeg->do_fancy_upsampling = FALSE;
    start_decompress(d, by_libjpeg);
    JSAMPROW rows[3][MAX_SAMP_FACTOR * DCTSIZE];
    JSAMPARRAY planes[3] = {rows[0], rows[1], rows[2]};
    for (int strip = 0; jpeg->output_scanline < jpeg->output_height; strip++) {
        for (int i = 0; i < jpeg->num_components; i++)
            for (int y = 0, count = jpeg->comp_info[i].v_samp_factor * DCTSIZE; y < count; y++)
                rows[i][y] = image->plane[i].pixels + (strip * count + y) * image->plane[i].stride;
        jpeg_read_raw_data(jpeg, planes, jpeg->max_v_samp_factor * DCTSIZE);
    }
    return STATUS_OK;
}

/* The part that libjpeg may leave by longjmp; it changes no local variable after setjmp that is read again there. */
static enum Status decode_trapped(Decoder *d, const uint8_t *data, size_t size, int planes, int by_libjpeg, Image *image)
{
    d->trap.damaged = 0;
    switch (setjmp(d->trap.escape)) {
    case BY_LIBJPEG:
        jpeg_abort_decompress(&d->jpeg);
        return STATUS_UNREADABLE;
    case BY_HUFFMAN:
        jpeg_abort_decompress(&d->jpeg);
        return STATUS_AGAIN;
    }
    enum Status status = read_header(&d->jpeg, data, size, image);
    if (status == STATUS_OK)
        status = planes && has_planes(&d->jpeg) ? read_planes(d, by_libjpeg, image) : read_rgb(d, by_libjpeg, image);
    if (status == STATUS_OK)
        jpeg_finish_decompress(&d->jpeg);
    else
        jpeg_abort_decompress(&d->jpeg);
    return status == STATUS_OK && d->trap.damaged ? STATUS_DAMAGED : status;
}

/* `planes`: whether the caller can use Y, Cb and Cr. */
static enum Status decode_jpeg(Decoder *d, const uint8_t *data, size_t size, int planes, Image *image)
{
    if (!decoder_init(d))
        return STATUS_MEMORY;
    enum Status status = decode_trapped(d, data, size, planes, 0, image);
    return status == STATUS_AGAIN ? decode_trapped(d, data, size, planes, 1, image) : status;
}

/* FFCV's raw mode: the pixels themselves. They are copied, for the bytes after them are not ours to read. */
static enum Status copy_raw(Decoder *d, const uint8_t *data, size_t size, Image *image)
{
    if (size != 3 * (size_t)image->width * image->height)
        return STATUS_SIZE;
    if (set_rgb(&d->buffer, image) != STATUS_OK)
        return STATUS_MEMORY;
    memcpy(image->plane[0].pixels, data, size);
    return STATUS_OK;
}

#endif

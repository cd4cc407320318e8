/* One JPEG to RGB bytes: accurate integer DCT, smooth chroma upsampling, and no error that goes unnoticed.
 *
 * libjpeg repairs what it can and only warns; training on the repaired half-grey picture would hide the fault, so
 * every warning that means lost data makes the sample damaged.
 */
#ifndef FEATHERWEIGHT_DECODE_H
#define FEATHERWEIGHT_DECODE_H

#include <setjmp.h>

#include "views.h"

#include <jpeglib.h>
#include <jerror.h>

enum { MAX_SCANS = 500, ROWS_PER_CALL = 8, IMAGE_PADDING = 64 };

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
} Decoder;

typedef struct {
    const uint8_t *pixels; /* rows of RGB; at least IMAGE_PADDING readable bytes follow the last one */
    ptrdiff_t stride;
    int width, height;
} Image;

static void on_error(j_common_ptr jpeg)
{
    longjmp(((ErrorTrap *)jpeg->err)->escape, 1);
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
    d->jpeg.progress = &d->progress;
    return d->ready = 1;
}

static void decoder_free(Decoder *d)
{
    if (d->ready)
        jpeg_destroy_decompress(&d->jpeg);
    free(d->buffer.data);
}

/* Reads the header and asks for RGB; the image must be as large as the file's index says. */
static enum Status begin_jpeg(struct jpeg_decompress_struct *jpeg, const uint8_t *data, size_t size, int width,
                              int height)
{
    jpeg_mem_src(jpeg, data, size);
    jpeg_read_header(jpeg, TRUE);
    if ((int)jpeg->image_width != width || (int)jpeg->image_height != height)
        return STATUS_SIZE;
    if (jpeg->jpeg_color_space == JCS_CMYK || jpeg->jpeg_color_space == JCS_YCCK)
        return STATUS_COLOUR_SPACE;
    jpeg->out_color_space = JCS_RGB;
    jpeg->dct_method = JDCT_ISLOW;
    jpeg->do_fancy_upsampling = TRUE;
    jpeg_start_decompress(jpeg);
    return STATUS_OK;
}

static void read_rows(struct jpeg_decompress_struct *jpeg, uint8_t *pixels, ptrdiff_t stride)
{
    while (jpeg->output_scanline < jpeg->output_height) {
        JSAMPROW rows[ROWS_PER_CALL];
        for (int i = 0; i < ROWS_PER_CALL; i++)
            rows[i] = pixels + (jpeg->output_scanline + i) * stride; /* libjpeg stops at the last row by itself */
        jpeg_read_scanlines(jpeg, rows, ROWS_PER_CALL);
    }
    jpeg_finish_decompress(jpeg);
}

/* The part that libjpeg may leave by longjmp; it changes no local variable after setjmp. */
static enum Status decode_trapped(Decoder *d, const uint8_t *data, size_t size, const Image *image, uint8_t *pixels)
{
    d->trap.damaged = 0;
    if (setjmp(d->trap.escape)) {
        jpeg_abort_decompress(&d->jpeg);
        return STATUS_UNREADABLE;
    }
    enum Status status = begin_jpeg(&d->jpeg, data, size, image->width, image->height);
    if (status == STATUS_OK)
        read_rows(&d->jpeg, pixels, image->stride);
    else
        jpeg_abort_decompress(&d->jpeg);
    return status == STATUS_OK && d->trap.damaged ? STATUS_DAMAGED : status;
}

static enum Status decode_jpeg(Decoder *d, const uint8_t *data, size_t size, int width, int height, Image *image)
{
    ptrdiff_t stride = 3 * (ptrdiff_t)width;
    uint8_t *pixels = reserve(&d->buffer, (size_t)stride * height + IMAGE_PADDING);
    if (!pixels || !decoder_init(d))
        return STATUS_MEMORY;
    *image = (Image){pixels, stride, width, height};
    return decode_trapped(d, data, size, image, pixels);
}

/* FFCV's raw mode: the pixels themselves. They are copied, for the bytes after them are not ours to read. */
static enum Status copy_raw(Decoder *d, const uint8_t *data, size_t size, int width, int height, Image *image)
{
    size_t wanted = 3 * (size_t)width * height;
    if (size != wanted)
        return STATUS_SIZE;
    uint8_t *pixels = reserve(&d->buffer, wanted + IMAGE_PADDING);
    if (!pixels)
        return STATUS_MEMORY;
    memcpy(pixels, data, wanted);
    *image = (Image){pixels, 3 * (ptrdiff_t)width, width, height};
    return STATUS_OK;
}

#endif

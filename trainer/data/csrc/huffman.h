/* The entropy decoder of most JPEGs, in place of libjpeg's, which takes half of a sample's time: one look into a table
 * yields up to two coefficients, their places and length at once, and up to seven bytes are read together.
 *
 * It knows sound data only. Whatever it did not expect, such as a code that does not exist or a marker too early, makes
 * libjpeg decode the image from its start: what is damaged, and what can be made of it, is libjpeg's to say.
 */
#ifndef FEATHERWEIGHT_HUFFMAN_H
#define FEATHERWEIGHT_HUFFMAN_H

#include "views.h"

#include <jpeglib.h>

/* libjpeg's inner interfaces; where they are not installed, or bytes lie the other way round, libjpeg decodes. */
#if defined(__has_include) && !defined(VIEWS_PORTABLE) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#if __has_include(<jpegint.h>)
#include <jpegint.h>
#define HAS_HUFFMAN
#endif
#endif

enum { LOOK = 10 };

/* The code that the next LOOK bits begin with. bits: its length; 0: it is longer, or none. */
typedef struct {
    uint8_t symbol, bits;
} Code;

/* Up to two coefficients that the next LOOK bits begin with: their values, 0 for none, and how far behind the place where
 * the block stands they lie; how far it then moves, and how many bits those were. bits 0: the first is not whole. */
typedef struct {
    int16_t value[2];
    uint8_t place[2], step, bits;
} Pair;

typedef struct {
    UINT8 counts[17], symbols[256]; /* what it was made of: most files share their tables */
    Code code[1 << LOOK];
    Pair pair[1 << LOOK];
    int32_t end[17], first[17]; /* of codes so long: one behind the largest, moved to 16 bits; place of the symbol of 0 */
} Table;

/* The data, of which the next bit is the highest in `word`. */
typedef struct {
    const uint8_t *next, *end;
    uint64_t word;
    int count;   /* bits in the word, made up ones included */
    int made_up; /* zeros behind the last bit of the data */
} Bits;

typedef struct {
    Table dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
    Bits bits;
    int last_dc[MAX_COMPS_IN_SCAN];
    int64_t mcus_left;
} Huffman;

#ifdef HAS_HUFFMAN

#define LIKELY(condition) __builtin_expect(!!(condition), 1)

enum { TO_THE_END = 2 * DCTSIZE2 };

/* Where the coefficients of a file belong; those of data that are not sound may lie behind the block's end. */
static const uint8_t NATURAL_ORDER[DCTSIZE2 + 32] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34,
    27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
    58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63,
    63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

/* The value that `size` bits stand for: those without the highest bit are negative. */
INLINE int extend(int bits, int size)
{
    return bits < (1 << size) >> 1 ? bits - (1 << size) + 1 : bits;
}

/* What the first `known` of LOOK bits hold whole of one symbol, as a Pair of one. */
static Pair make_single(const Table *table, int bits, int known)
{
    Code code = table->code[bits];
    int run = code.symbol >> 4, size = code.symbol & 15, length = code.bits + size;
    if (!code.bits || length > known)
        return (Pair){{0, 0}, {0, 0}, 0, 0};
    if (!size && run < 15)
        return (Pair){{0, 0}, {0, 0}, TO_THE_END, (uint8_t)length};
    int value = size ? extend(bits >> (LOOK - length) & ((1 << size) - 1), size) : 0;
    return (Pair){{(int16_t)value, 0}, {(uint8_t)run, (uint8_t)run}, (uint8_t)(run + 1), (uint8_t)length};
}

static Pair make_pair(const Table *table, int bits)
{
    Pair pair = make_single(table, bits, LOOK);
    if (!pair.bits || pair.step == TO_THE_END)
        return pair;
    Pair next = make_single(table, bits << pair.bits & ((1 << LOOK) - 1), LOOK - pair.bits);
    pair.value[1] = next.value[0];
    pair.place[1] = (uint8_t)(pair.step + next.place[0]);
    pair.step = (uint8_t)(pair.step + next.step);
    pair.bits = (uint8_t)(pair.bits + next.bits);
    return pair;
}

/* source: ITU-T T.81, annex C; libjpeg has checked what it is made of */
static void make_table(Table *table, const JHUFF_TBL *source, int is_dc)
{
    if (!memcmp(table->counts, source->bits, sizeof table->counts) &&
        !memcmp(table->symbols, source->huffval, sizeof table->symbols))
        return;
    memcpy(table->counts, source->bits, sizeof table->counts);
    memcpy(table->symbols, source->huffval, sizeof table->symbols);
    memset(table->code, 0, sizeof table->code);
    for (int length = 1, code = 0, place = 0; length <= 16; length++, code <<= 1) {
        table->first[length] = place - code;
        for (int i = 0; i < source->bits[length]; i++, code++, place++)
            for (int rest = 0; rest < (1 << LOOK) >> length; rest++)
                table->code[(code << (LOOK - length)) + rest] = (Code){source->huffval[place], (uint8_t)length};
        table->end[length] = code << (16 - length);
    }
    for (int bits = 0; !is_dc && bits < 1 << LOOK; bits++)
        table->pair[bits] = make_pair(table, bits);
}

/* Byte by byte. A 255 is followed by a 0, or begins a marker, which ends the data. */
static __attribute__((noinline)) void refill_bytes(Bits *b)
{
    for (; b->count <= 56; b->count += 8) {
        uint64_t byte = 0;
        if (b->end > b->next && (b->next[0] != 255 || (b->end - b->next > 1 && b->next[1] == 0))) {
            byte = b->next[0];
            b->next += 1 + (byte == 255);
        } else {
            b->made_up += 8;
        }
        b->word |= byte << (56 - b->count);
    }
}

/* At least 32 bits, enough for any code and its value. */
INLINE void refill(Bits *b)
{
    if (b->count >= 32)
        return;
    uint64_t word = 0xff;
    if (b->end - b->next >= 8)
        memcpy(&word, b->next, 8);
    if ((!((~word - 0x0101010101010101u) & word & 0x8080808080808080u))) { /* no byte is 255 */
        b->word |= __builtin_bswap64(word) >> b->count; /* bits beyond the count come next, and then the same again */
        b->next += (63 - b->count) >> 3;
        b->count |= 56;
    } else {
        Bits copy = *b; /* so that those in use stay in registers */
        refill_bytes(&copy);
        *b = copy;
    }
}

INLINE void drop(Bits *b, int count)
{
    b->word <<= count;
    b->count -= count;
}

INLINE int take_value(Bits *b, int size)
{
    if (!size)
        return 0;
    int bits = (int)(b->word >> (64 - size));
    drop(b, size);
    return extend(bits, size);
}

/* A code's symbol, or -1 if there is no such code. */
INLINE int take_symbol(Bits *b, const Table *table)
{
    Code code = table->code[b->word >> (64 - LOOK)];
    if (code.bits) {
        drop(b, code.bits);
        return code.symbol;
    }
    int32_t next = (int32_t)(b->word >> 48);
    for (int length = LOOK + 1; length <= 16; length++)
        if (next < table->end[length]) {
            drop(b, length);
            return table->symbols[(next >> (16 - length)) + table->first[length]];
        }
    return -1;
}

/* One symbol and its coefficient; where the block then stands: behind its end if the data are not sound. */
INLINE int take_one(Bits *b, const Table *ac, JCOEF *block, int k)
{
    int symbol = take_symbol(b, ac), size = symbol & 15;
    if (symbol < 0)
        return DCTSIZE2 + 1;
    if (!size)
        return k + (symbol == 0xf0 ? 16 : TO_THE_END);
    k += symbol >> 4;
    block[NATURAL_ORDER[k]] = (JCOEF)take_value(b, size);
    return k + 1;
}

/* One block's coefficients in their places; 0 if the data are not sound. It comes zeroed. */
INLINE int decode_block(Bits *b, const Table *dc, const Table *ac, int *last_dc, JCOEF *block)
{
    refill(b);
    int size = take_symbol(b, dc);
    if (size < 0 || size > 15)
        return 0;
    *last_dc += take_value(b, size);
    block[0] = (JCOEF)*last_dc;
    int k = 1;
    while (k < DCTSIZE2 - 16) { /* nearer to its end, the second of two might belong to the next block */
        refill(b);
        const Pair *pair = &ac->pair[b->word >> (64 - LOOK)];
        if (LIKELY(pair->bits)) {
            drop(b, pair->bits);
            block[NATURAL_ORDER[k + pair->place[0]]] += pair->value[0]; /* adding 0 is cheaper than a branch */
            block[NATURAL_ORDER[k + pair->place[1]]] += pair->value[1];
            k += pair->step;
        } else {
            k = take_one(b, ac, block, k);
        }
    }
    while (k < DCTSIZE2) {
        refill(b);
        k = take_one(b, ac, block, k);
    }
    return k == DCTSIZE2 || k > TO_THE_END;
}

/* The blocks of one MCU, which come zeroed; 0 if the data are not sound or have ended. */
CLONES static int decode_blocks(Huffman *h, const struct jpeg_decompress_struct *jpeg, JBLOCKROW *blocks)
{
    Bits bits = h->bits;
    for (int i = 0; i < jpeg->blocks_in_MCU; i++) {
        int c = jpeg->MCU_membership[i];
        const jpeg_component_info *component = jpeg->cur_comp_info[c];
        const Table *dc = &h->dc[component->dc_tbl_no], *ac = &h->ac[component->ac_tbl_no];
        if (!decode_block(&bits, dc, ac, &h->last_dc[c], blocks[i][0]))
            return 0;
    }
    h->bits = bits;
    return bits.count >= bits.made_up;
}

/* Hands what follows the scan back to libjpeg: at once a marker, or else the data are not sound, and 0. */
static int end_scan(Huffman *h, struct jpeg_source_mgr *source)
{
    const Bits *b = &h->bits;
    if (b->count - b->made_up >= 8 || b->end - b->next < 2 || b->next[0] != 255 || b->next[1] == 0)
        return 0;
    source->next_input_byte = b->next;
    source->bytes_in_buffer = (size_t)(b->end - b->next);
    return 1;
}

/* Whether all of the image lies in one scan without restarts, its coefficients whole; most do. */
static int huffman_fits(const struct jpeg_decompress_struct *jpeg)
{
    return !jpeg->progressive_mode && !jpeg->arith_code && !jpeg->restart_interval && jpeg->data_precision == 8 &&
           !jpeg->inputctl->has_multiple_scans;
}

/* After jpeg_start_decompress, before the first row. */
static void huffman_start(Huffman *h, const struct jpeg_decompress_struct *jpeg)
{
    for (int i = 0; i < jpeg->comps_in_scan; i++) {
        const jpeg_component_info *component = jpeg->cur_comp_info[i];
        make_table(&h->dc[component->dc_tbl_no], jpeg->dc_huff_tbl_ptrs[component->dc_tbl_no], 1);
        make_table(&h->ac[component->ac_tbl_no], jpeg->ac_huff_tbl_ptrs[component->ac_tbl_no], 0);
    }
    const uint8_t *data = jpeg->src->next_input_byte;
    h->bits = (Bits){data, data + jpeg->src->bytes_in_buffer, 0, 0, 0};
    memset(h->last_dc, 0, sizeof h->last_dc);
    h->mcus_left = (int64_t)jpeg->MCUs_per_row * jpeg->MCU_rows_in_scan;
}

#endif
#endif

/* Files: whole ones, and tensors in the safetensors format, with the checksum that the package writes beside them. */

#pragma once
#include "json.h"
#include <stdarg.h>
#include <stdio.h>

enum { ERROR_BYTES = 256 };

static int fail(char *error, const char *format, ...) { /* 0, so that it can be returned */
    va_list args;
    va_start(args, format);
    if (error) vsnprintf(error, ERROR_BYTES, format, args);
    va_end(args);
    return 0;
}

/* a whole file, ended by a 0 that does not count; NULL if it cannot be read */
static char *read_file(const char *folder, const char *name, int64_t *length) {
    char path[4096];
    snprintf(path, sizeof path, "%s%s%s", folder, *folder ? "/" : "", name);
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    char *data = NULL;
    if (!fseek(file, 0, SEEK_END) && (*length = ftell(file)) >= 0 && !fseek(file, 0, SEEK_SET))
        data = malloc(*length + 1);
    if (data && (int64_t)fread(data, 1, *length, file) != *length) free(data), data = NULL;
    fclose(file);
    if (data) data[*length] = 0;
    return data;
}

typedef struct {
    char *data;     /* the file */
    Json *head;     /* its tensors by name */
    int64_t length; /* of the file */
    char *at;       /* where the tensors' bytes begin */
} Tensors;

static void close_tensors(Tensors *t) {
    if (t->head) free(t->head->text);
    free_json(t->head), free(t->data);
    memset(t, 0, sizeof *t);
}

static int open_tensors(Tensors *t, const char *folder, const char *name, char *error) {
    memset(t, 0, sizeof *t);
    t->data = read_file(folder, name, &t->length);
    if (!t->data) return fail(error, "%s%s%s cannot be read", folder, *folder ? "/" : "", name);
    uint64_t head = 0;
    if (t->length >= 8) memcpy(&head, t->data, 8);
    if (t->length < 8 || head > (uint64_t)t->length - 8)
        return fail(error, "%s is not a complete safetensors file", name);
    t->at = t->data + 8 + head;
    /* a copy: the byte after the text is the first tensor's, and reading numbers needs a 0 there */
    char *copy = malloc(head + 1);
    if (!copy) return fail(error, "no memory for the head of %s", name);
    memcpy(copy, t->data + 8, head), copy[head] = 0;
    t->head = parse_json(copy, (int64_t)head);
    if (!t->head || t->head->type != OBJECT)
        return free(copy), fail(error, "%s is not a complete safetensors file", name);
    t->head->text = copy; /* where its strings lie */
    return 1;
}

/* where a tensor's bytes lie; NULL where that is not in the file */
static const char *bytes_of(const Tensors *t, const Json *tensor, int64_t *count) {
    const Json *at = item(tensor, "data_offsets");
    if (!at || !at->child || !at->child->next) return NULL;
    double begin = at->child->number, end = at->child->next->number;
    if (!(begin >= 0 && end >= begin && end <= t->length - (t->at - t->data))) return NULL;
    return *count = (int64_t)end - (int64_t)begin, t->at + (int64_t)begin;
}

/* The bytes of a tensor of the sizes [rows] or [rows][columns] (columns 0), its dtype's name in *dtype; NULL if it is
   not there. A tensor of other sizes, or not whole, is an error, and *bad is set. */
static const char *tensor(const Tensors *t, const char *name, int64_t rows, int64_t columns, const char **dtype,
                          int *bad, char *error) {
    static const struct {
        const char *name;
        int size;
    } sizes[] = {{"F32", 4}, {"BF16", 2}, {"F16", 2}, {"I8", 1}, {"U8", 1}, {"I64", 8}};
    const Json *found = item(t->head, name), *type = item(found, "dtype"), *shape = item(found, "shape");
    const Json *first = shape ? shape->child : NULL;
    if (!found) return NULL;
    int size = 0, dims = 0;
    double count = 1;
    int64_t bytes = 0;
    for (int i = 0; i < 6; i++)
        if (is_text(type, sizes[i].name)) size = sizes[i].size, *dtype = sizes[i].name;
    for (const Json *d = first; d; d = d->next) dims++, count *= d->number;
    int fits = columns ? dims == 2 && first->number == rows && first->next->number == columns : count == rows;
    const char *at = bytes_of(t, found, &bytes);
    if (at && size && fits && bytes == count * size) return at;
    *bad = 1;
    fail(error, "model.safetensors does not fit config.json: %s", name);
    return NULL;
}

/* the number of rows of a matrix; 0 where there is none of that name */
static int64_t rows_of_tensor(const Tensors *t, const char *name) {
    const Json *shape = item(item(t->head, name), "shape");
    return shape && shape->child && shape->child->number > 0 ? (int64_t)shape->child->number : 0;
}

/* ---- checksum ---- */

/* CRC-32 as zlib has it, eight bytes at a time: table[p][x] is what byte x does to the checksum p bytes later */
static uint32_t crc32_of(uint32_t crc, const uint8_t *data, int64_t bytes) {
    static uint32_t table[8][256];
    for (int x = 0; !table[7][255] && x < 256; x++) {
        uint32_t c = x;
        for (int bit = 0; bit < 8; bit++) c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
        table[0][x] = c;
    }
    for (int p = 1; !table[7][255] && p < 8; p++)
        for (int x = 0; x < 256; x++) table[p][x] = table[p - 1][x] >> 8 ^ table[0][table[p - 1][x] & 255];
    crc = ~crc;
    for (; bytes >= 8; bytes -= 8, data += 8) {
        uint32_t low, high;
        memcpy(&low, data, 4), memcpy(&high, data + 4, 4), low ^= crc; /* little-endian, as all here */
        crc = 0;
        for (int i = 0; i < 4; i++) crc ^= table[7 - i][low >> 8 * i & 255] ^ table[3 - i][high >> 8 * i & 255];
    }
    for (; bytes; bytes--, data++) crc = crc >> 8 ^ table[0][(crc ^ *data) & 255];
    return ~crc;
}

static int in_order(const void *a, const void *b) { return strcmp((*(Json **)a)->key, (*(Json **)b)->key); }

/* Whether the file has the checksum of its tensors' bytes, in the order of their names, that its metadata tell; older files
   tell none. */
static int check_sum(const Tensors *t, const char *name, char *error) {
    const Json *told = item(item(t->head, "__metadata__"), "crc32");
    if (!told) return 1;
    int64_t count = 0, i = 0, bytes = 0;
    for (const Json *j = t->head->child; j; j = j->next) count++;
    Json **tensors = malloc(count * sizeof *tensors);
    if (!tensors) return fail(error, "no memory for the head of %s", name);
    for (Json *j = t->head->child; j; j = j->next)
        if (strcmp(j->key, "__metadata__")) tensors[i++] = j;
    qsort(tensors, i, sizeof *tensors, in_order);
    uint32_t crc = 0;
    char hex[9];
    for (int64_t n = 0; n < i; n++) {
        const char *at = bytes_of(t, tensors[n], &bytes);
        if (at) crc = crc32_of(crc, (const uint8_t *)at, bytes);
    }
    free(tensors);
    snprintf(hex, sizeof hex, "%08x", (unsigned)crc);
    return is_text(told, hex) || fail(error, "%s is damaged: its bytes are not those that were written, copy it again", name);
}

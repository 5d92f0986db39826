/* The file of a sequence's state, as retentive/models/state.py has it, and of a memory, which also tells what was read. */

#pragma once
#include "digest.h"
#include "states.h"

typedef struct {
    i64 layer;
    const char *name, *dtype; /* memories.{layer}.{name}; as safetensors calls it */
    i64 dims, shape[4];
    char *data;               /* in the states */
    i64 bytes;
} Entry; /* a tensor of the file */

enum { MOST_PARTS = 3 }; /* tensors of a layer */

static Entry entry_of(i64 layer, const char *name, i64 low, i64 dims, i64 a, i64 b, i64 c, void *data) {
    i64 numbers = a * b * (dims == 4 ? c : 1);
    return (Entry){layer, name, low ? "BF16" : "F32", dims, {1, a, b, c}, data, numbers * (low ? 2 : 4)};
}

/* the tensors of layer i for a sequence that has read `position` tokens; how many */
static int entries_of(const RetentiveStates *s, i64 n, i64 i, i64 position, Entry *to) {
    const Layer *l = model_of(s)->layer + i;
    Memory m = memory_from(s, i, n);
    i64 tokens = cached_tokens(l, position);
    if (l->kind == RETENTION) return *to = entry_of(i, "state", 0, 4, l->H, l->K, l->V, m.state), 1;
    if (l->kind == CONVOLUTION) return *to = entry_of(i, "rows", 0, 3, m.slots, model_of(s)->D, 0, m.state), 1;
    to[0] = entry_of(i, "keys", s->dtype, 4, tokens, l->kv, l->K, m.k);
    to[1] = entry_of(i, "values", s->dtype, 4, tokens, l->kv, l->K, m.v);
    if (l->gated) to[2] = entry_of(i, "gates", 0, 3, tokens, l->H, 0, m.decay);
    return l->gated ? 3 : 2;
}

/* all tensors of a sequence; how many */
static i64 all_entries(const RetentiveStates *s, i64 n, i64 position, Entry *to) {
    i64 count = 0;
    for (i64 i = 0; i < model_of(s)->layers; i++) count += entries_of(s, n, i, position, to + count);
    return count;
}

/* whether there is a file of a memory, which knows what was read: a bare state in its place would lose that */
static int is_memory(const char *path) {
    Tensors t;
    int is = open_tensors(&t, "", path, NULL) && item(item(t.head, "__metadata__"), "memory");
    return close_tensors(&t), is;
}

static int shape_as_text(const Entry *e, char *to, i64 bytes, const char *between) {
    int used = 0;
    for (i64 d = 0; d < e->dims; d++)
        used += snprintf(to + used, bytes - used, "%s%lld", d ? between : "", (long long)e->shape[d]);
    return used;
}

/* The digest of a memory's file: of `about`, of the tensors by their parts, of the position. `data` are the tensors' bytes,
   which may be in a file. */
static void digest_of(const Entry *entries, i64 count, const char *const *data, const char *about, const void *position,
                      char hex[2 * DIGEST_BYTES + 1]) {
    static const char *const parts[] = {"state", "keys", "values", "gates", "rows"};
    Digest d;
    char shape[96], kind[128];
    begin_digest(&d), add_to_digest(&d, about, (i64)strlen(about));
    for (int p = 0; p < 5; p++)
        for (i64 i = 0; i < count; i++) {
            const Entry *e = entries + i;
            if (strcmp(e->name, parts[p])) continue;
            shape_as_text(e, shape, sizeof shape, ", ");
            int length = snprintf(kind, sizeof kind, "torch.%s[%s]", *e->dtype == 'B' ? "bfloat16" : "float32", shape);
            add_to_digest(&d, kind, length), add_to_digest(&d, data[i], e->bytes);
        }
    add_to_digest(&d, "torch.int64[1]", 14), add_to_digest(&d, position, 8);
    end_digest(&d, hex);
}

/* the head of the file, `about` NULL or that of a memory; its bytes, or 0 where there was no memory */
static i64 head_of_state(RetentiveStates *s, i64 n, const Entry *entries, i64 count, const char *about, char **head) {
    const Model *m = model_of(s);
    i64 most = count * 192 + m->layers * 48 + 512 + (about ? 6 * (i64)strlen(about) : 0), used = 0, at = 8;
    char *text = *head = malloc(most), hex[2 * DIGEST_BYTES + 1], shape[96];
    const char **data = malloc((count + 1) * sizeof *data);
    if (!text || !data) return free(data), 0;
    used += snprintf(text, most, "{\"__metadata__\":{\"format\":\"retentive-state-2\",\"windows\":\"[");
    for (i64 i = 0; i < m->layers; i++)
        used += snprintf(text + used, most - used, i ? ", %lld" : "%lld", (long long)most_cached(m->layer + i));
    used += snprintf(text + used, most - used, "]\",\"sinks\":\"[");
    for (i64 i = 0; i < m->layers; i++)
        used += snprintf(text + used, most - used, i ? ", %lld" : "%lld", (long long)m->layer[i].sinks);
    used += snprintf(text + used, most - used, "]\"");
    if (about) {
        for (i64 i = 0; i < count; i++) data[i] = entries[i].data;
        digest_of(entries, count, data, about, &s->position[n], hex);
        used += snprintf(text + used, most - used, ",\"digest\":\"%s\",\"memory\":\"", hex);
        for (const char *c = about; *c; c++)
            if ((unsigned char)*c < 32) used += snprintf(text + used, most - used, "\\u%04x", *c);
            else used += snprintf(text + used, most - used, *c == '"' || *c == '\\' ? "\\%c" : "%c", *c);
        text[used++] = '"';
    }
    text[used++] = '}';
    free(data);
    for (i64 i = 0; i < count; at += entries[i++].bytes) {
        const Entry *e = entries + i;
        shape_as_text(e, shape, sizeof shape, ",");
        used += snprintf(text + used, most - used,
                         ",\"memories.%lld.%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%lld,%lld]}",
                         (long long)e->layer, e->name, e->dtype, shape, (long long)at, (long long)(at + e->bytes));
    }
    used += snprintf(text + used, most - used, ",\"position\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}}");
    while (used % 8) text[used++] = ' ';
    return used;
}

static int save_state(RetentiveStates *s, i64 n, const char *path, const char *about, char *error) {
    char *head, partial[4096];
    if (n < 0 || n >= s->count)
        return fail(error, "there are %lld sequences, got %lld", (long long)s->count, (long long)n);
    Entry *entries = malloc(MOST_PARTS * model_of(s)->layers * sizeof *entries);
    if (!entries) return fail(error, "no memory to save");
    settle(s, n);
    i64 count = all_entries(s, n, s->position[n], entries), used = head_of_state(s, n, entries, count, about, &head);
    if (!used) return free(entries), free(head), fail(error, "no memory to save");
    snprintf(partial, sizeof partial, "%s.partial", path);
    FILE *file = fopen(partial, "wb");
    uint64_t length = used;
    int good = file && fwrite(&length, 8, 1, file) && (i64)fwrite(head, 1, used, file) == used &&
               fwrite(&s->position[n], 8, 1, file);
    for (i64 i = 0; i < count && good; i++)
        good = (i64)fwrite(entries[i].data, 1, entries[i].bytes, file) == entries[i].bytes;
    if (file) good = !fclose(file) && good;
    free(head), free(entries);
    if (good && !rename(partial, path)) return 1;
    remove(partial);
    return fail(error, "%s cannot be written", path);
}

/* A tensor's bytes in a file; NULL where it is not there as it should be. Version 0.1.0 numbered those of each kind of layer
   by itself, by other names; `before` is how many there are before this layer's. */
static const char *found(const Tensors *t, const Entry *e, int old, i64 before) {
    char name[96];
    const char *dtype = "";
    int bad = 0;
    if (!old) snprintf(name, sizeof name, "memories.%lld.%s", (long long)e->layer, e->name);
    else snprintf(name, sizeof name, "%s.%lld", strcmp(e->name, "state") ? e->name : "layers", (long long)before);
    i64 numbers = e->bytes / (*e->dtype == 'B' ? 2 : 4);
    const char *at = tensor(t, name, numbers, 0, &dtype, &bad, NULL);
    return at && !strcmp(dtype, e->dtype) ? at : NULL;
}

/* how many layers of the same kind come before layer i */
static i64 before_layer(const Model *m, i64 i) {
    i64 count = 0;
    for (i64 j = 0; j < i; j++) count += m->layer[j].kind == m->layer[i].kind;
    return count;
}

/* the next number of a list in the metadata, such as "[0, 256]"; -1 where there is none */
static i64 next_number(char **at) { return **at && (*at)[1] ? strtoll(*at + 1, at, 10) : -1; }

/* whether the file is of as many layers, with the windows and sinks, that this model has */
static int same_layers(const Model *m, const Tensors *t, int old) {
    const Json *said = item(t->head, "__metadata__"), *list = item(said, "windows"), *firsts = item(said, "sinks");
    const Json *window = item(said, "window"); /* of version 0.1.0, the same for all */
    i64 tensors = -2;                          /* but metadata and position */
    for (const Json *j = t->head->child; j; j = j->next) tensors++;
    char *windows = list && list->type == STRING ? list->text : "";
    char *sinks = firsts && firsts->type == STRING ? firsts->text : NULL;
    for (i64 i = 0; i < m->layers; i++) {
        const Layer *l = m->layer + i;
        tensors -= l->kind != ATTENTION ? 1 : l->gated ? 3 : 2;
        i64 own = old ? strtoll(window && window->type == STRING ? window->text : "0", NULL, 10) : next_number(&windows);
        if (!(old && l->kind == RETENTION) && own != most_cached(l)) return 0;
        if ((sinks ? next_number(&sinks) : 0) != l->sinks) return 0;
    }
    return !tensors && (old || !strcmp(windows, "]"));
}

/* the bytes of all tensors in the file, whose entries are `entries`; 0 where one is missing */
static int find_all(const Model *m, const Tensors *t, const Entry *entries, i64 count, int old, const char **data) {
    for (i64 i = 0; i < count; i++)
        if (!(data[i] = found(t, entries + i, old, old ? before_layer(m, entries[i].layer) : 0))) return 0;
    return 1;
}

static int load_from(RetentiveStates *s, i64 n, const Tensors *t, const char *path, Entry *entries, const char **data,
                     char *error) {
    const Model *m = model_of(s);
    const Json *said = item(t->head, "__metadata__"), *about = item(said, "memory"), *digest = item(said, "digest");
    int bad = 0, old = is_text(item(said, "format"), "retentive-state-1");
    const char *dtype = "", *at = tensor(t, "position", 1, 0, &dtype, &bad, NULL);
    char hex[2 * DIGEST_BYTES + 1];
    i64 position = -1, count = 0;
    if (at && !strcmp(dtype, "I64")) memcpy(&position, at, 8);
    int good = position >= 0 && position <= (i64)1 << 40 && (old || is_text(item(said, "format"), "retentive-state-2"));
    good = good && same_layers(m, t, old);
    if (good) count = all_entries(s, n, position, entries); /* whose memory may have too few slots yet */
    if (!good || !find_all(m, t, entries, count, old, data))
        return fail(error, "%s holds no state of one sequence of this model", path);
    if (about && about->type == STRING) digest_of(entries, count, data, about->text, at, hex);
    if (about && (about->type != STRING || !is_text(digest, hex)))
        return fail(error, "%s was changed after it was written: its digest does not fit", path);
    if (!reserve(s, position)) return fail(error, "no memory for %lld tokens", (long long)position);
    settle(s, n); /* its ring is empty then */
    all_entries(s, n, position, entries);
    for (i64 i = 0; i < count; i++) memcpy(entries[i].data, data[i], entries[i].bytes);
    s->position[n] = position;
    return 1;
}

static int load_state(RetentiveStates *s, i64 n, const char *path, char *error) {
    Tensors t;
    i64 most = MOST_PARTS * model_of(s)->layers;
    if (n < 0 || n >= s->count)
        return fail(error, "there are %lld sequences, got %lld", (long long)s->count, (long long)n);
    if (!open_tensors(&t, "", path, error)) return close_tensors(&t), 0;
    Entry *entries = malloc(most * sizeof *entries);
    const char **data = malloc(most * sizeof *data);
    int good = entries && data ? load_from(s, n, &t, path, entries, data, error) : fail(error, "no memory to load");
    return free(entries), free(data), close_tensors(&t), good;
}

/* The functions of retentive.h, on top of read.c: one unit for the compiler. */

#include "retentive.h"
#include "read.c"
#include "sample.h"
#include "text.h"

struct Retentive {
    Folder folder;
    Text text; /* vocab 0: there is no tokenizer.json */
    Pool *pool;
    int threads;
};

#include "states_file.h"

static int cores(void) {
#ifdef _SC_NPROCESSORS_ONLN
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
#else
    return 1;
#endif
}

Retentive *retentive_open(const char *folder, int threads, char *error) {
    Retentive *r = calloc(1, sizeof *r);
    i64 length;
    char *data = read_file(folder, "config.json", &length);
    Json *raw = data ? parse_json(data, length) : NULL;
    int good = r && raw;
    if (!data) fail(error, "%s/config.json cannot be read", folder);
    else if (!raw) fail(error, "%s/config.json is not JSON", folder);
    good = good && read_model(&r->folder, raw, folder, error);
    free_json(raw), free(data);
    if (good) {
        char ignored[ERROR_BYTES]; /* a model without a tokenizer takes ids */
        open_text(&r->text, folder, ignored);
        r->threads = threads > 0 ? threads : cores();
        r->pool = open_pool(r->threads);
        if (!r->pool) good = fail(error, "no memory for threads");
    }
    if (good) return r;
    if (r) close_text(&r->text), close_folder(&r->folder);
    free(r);
    return NULL;
}

void retentive_use_threads(Retentive *r, int threads) { r->threads = threads < 1 ? 1 : threads; }
int retentive_use_activations(Retentive *r, int bits) {
    int narrow = bits == 8;
    if (!narrow && bits != 16) return 0;
    r->folder.model.head.narrow = narrow;
    for (i64 i = 0; i < r->folder.model.layers; i++) {
        Layer *l = r->folder.layers + i;
        l->in.narrow = l->out.narrow = l->up.narrow = l->down.narrow = narrow;
    }
    return 1;
}
#ifdef __wasm_atomics__
void retentive_join(Retentive *r) { join(r->pool); }
#endif

void retentive_close(Retentive *r) {
    if (!r) return;
    close_pool(r->pool), close_text(&r->text), close_folder(&r->folder);
    free(r);
}

int64_t retentive_vocabulary(const Retentive *r) { return r->folder.model.vocab; }
int64_t retentive_end(const Retentive *r) { return r->text.vocab ? r->text.end : -1; }

/* ---- states ---- */

RetentiveStates *retentive_states(Retentive *model, int64_t count) { return count < 1 ? NULL : new_states(model, count); }
void retentive_free(RetentiveStates *s) { free_states(s); }
int64_t retentive_bytes(const RetentiveStates *s) { return s->bytes; }
int64_t retentive_position(const RetentiveStates *s, int64_t sequence) { return s->position[sequence]; }

int retentive_copy(RetentiveStates *s, int64_t to, int64_t from) {
    if (to < 0 || from < 0 || to >= s->count || from >= s->count) return 0;
    return copy_sequence(s, to, from), 1;
}

int retentive_save(RetentiveStates *s, int64_t n, const char *path, char *error) {
    if (is_memory(path)) return fail(error, "%s holds a memory, which says more than a state: save elsewhere", path);
    return save_state(s, n, path, NULL, error);
}

int retentive_save_memory(RetentiveStates *s, int64_t n, const char *path, const char *about, char *error) {
    return save_state(s, n, path, about, error);
}

int retentive_load(RetentiveStates *s, int64_t n, const char *path, char *error) { return load_state(s, n, path, error); }

/* ---- tokens ---- */

static int in_vocabulary(const Retentive *r, const int64_t *ids, i64 count) {
    for (i64 i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= r->folder.model.vocab) return 0;
    return 1;
}

/* logits of `count` rows of x */
static int head_of(Retentive *r, const float *x, i64 count, float *logits) {
    i64 vocab = r->folder.model.vocab, wide = whole(vocab);
    float *y = wide == vocab ? logits : malloc(count * wide * 4);
    if (!y) return 0;
    Heading heading = {count, r->folder.dtype, r->threads, r->pool, &r->folder.model.head, x, y};
    int good = !native_head(&heading);
    for (i64 n = 0; n < count && y != logits && good; n++) memcpy(logits + n * vocab, y + n * wide, vocab * 4);
    if (y != logits) free(y);
    return good;
}

/* Tokens of `count` sequences from `first` on: one each through rings, or in chunks through settled states. */
static int tokens_of_states(RetentiveStates *s, i64 first, i64 count, int steps, const int64_t *ids, const i64 *begin,
                            float *x) {
    Retentive *r = s->model;
    i64 layers = r->folder.model.layers, longest = 0;
    for (i64 n = 0; n < count; n++) longest = larger(longest, s->position[first + n] + begin[n + 1] - begin[n]);
    Memory *memory = malloc(layers * sizeof *memory);
    if (!memory || !reserve(s, longest)) return free(memory), 0;
    for (i64 i = 0; i < layers; i++) memory[i] = memory_from(s, i, first);
    Reading reading = {count, steps, s->dtype, r->threads, r->pool, &r->folder.model, ids, begin, s->position + first,
                       NULL, memory, x};
    int good = !native_read(&reading);
    free(memory);
    for (i64 n = 0; n < count && good; n++) s->position[first + n] += begin[n + 1] - begin[n];
    return good;
}

int retentive_read(RetentiveStates *s, int64_t n, const int64_t *ids, int64_t count, float *logits) {
    Retentive *r = s->model;
    i64 D = r->folder.model.D, begin[2] = {0, count};
    if (n < 0 || n >= s->count || count < 1 || !in_vocabulary(r, ids, count)) return 0;
    float *x = malloc(count * D * 4);
    if (!x) return 0;
    if (count > 1) settle(s, n);
    int good =
        tokens_of_states(s, n, 1, count == 1, ids, begin, x) && (!logits || head_of(r, x + (count - 1) * D, 1, logits));
    free(x);
    return good;
}

int retentive_decode(RetentiveStates *s, int64_t count, const int64_t *ids, float *logits) {
    Retentive *r = s->model;
    if (count < 1 || count > s->count || !in_vocabulary(r, ids, count)) return 0;
    i64 *begin = malloc((count + 1) * sizeof *begin);
    float *x = malloc(count * r->folder.model.D * 4);
    for (i64 i = 0; begin && i <= count; i++) begin[i] = i;
    int good = begin && x && tokens_of_states(s, 0, count, 1, ids, begin, x) && head_of(r, x, count, logits);
    free(begin), free(x);
    return good;
}

int64_t retentive_encode(const Retentive *r, const char *text, int64_t bytes, int64_t *ids) {
    return r->text.splits ? encode(&r->text, text, bytes, ids) : -1;
}

const char *retentive_text(const Retentive *r, int64_t id, int64_t *length) {
    static const char *const none = "";
    *length = 0;
    if (id < 0 || id >= r->text.vocab) return none;
    if (r->text.bpe) return *length = r->text.lengths[id], r->text.bytes[id] ? r->text.bytes[id] : none;
    static char bytes[256];
    if (id > 255) return none;
    return bytes[id] = (char)id, *length = 1, bytes + id;
}

/* The functions of retentive.h, on top of read.c: one unit for the compiler. */

#include "retentive.h"
#include "digest.h"
#include "read.c"
#include "sample.h"
#include "text.h"

struct Retentive {
    Folder folder;
    Text text; /* vocab 0: there is no tokenizer.json */
    Pool *pool;
    int threads;
};

struct RetentiveStates {
    Retentive *model;
    i64 count, slots, dtype, bytes;
    Rings *rings; /* [layers], of `count` sequences */
    i64 *position;
    char *memory;
};

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

/* slots of a ring for which the fewest bytes move: ops/ring.py */
static i64 slots_for(i64 K, i64 V) {
    double ideal = sqrt(K * V / (1.5 * (K + V)));
    i64 half = (i64)exp2(rint(log2(ideal)));
    return 2 * (half < 2 ? 2 : half);
}

static char *arrange_states(RetentiveStates *s, char *at) {
    const Model *m = &s->model->folder.model;
    i64 N = s->count, H = m->H, R = s->slots;
    s->rings = (Rings *)take(&at, m->layers * (i64)sizeof(Rings) / 4), s->position = (i64 *)take(&at, 2 * N);
    for (i64 l = 0; l < m->layers; l++) {
        Rings ring = {take(&at, N * H * m->K * m->V), take(&at, N * H * R * m->K), take(&at, N * H * R * m->V),
                      take(&at, N * H * R), (i64 *)take(&at, 2 * N), (i64 *)take(&at, 2 * N)};
        if (s->memory) s->rings[l] = ring;
    }
    return at;
}

RetentiveStates *retentive_states(Retentive *model, int64_t count) {
    RetentiveStates *s = calloc(1, sizeof *s);
    if (!s || count < 1) return free(s), NULL;
    const Model *m = &model->folder.model;
    s->model = model, s->count = count, s->slots = slots_for(m->K, m->V), s->dtype = model->folder.dtype;
    s->bytes = (i64)(intptr_t)arrange_states(s, NULL);
    s->memory = aligned_alloc(64, round_up(s->bytes, 64));
    if (!s->memory) return free(s), NULL;
    memset(s->memory, 0, s->bytes);
    arrange_states(s, s->memory);
    return s;
}

void retentive_free(RetentiveStates *s) {
    if (s) free(s->memory);
    free(s);
}

int64_t retentive_bytes(const RetentiveStates *s) { return s->bytes; }
int64_t retentive_position(const RetentiveStates *s, int64_t sequence) { return s->position[sequence]; }

/* the rings of a layer from a sequence on */
static Rings rings_from(const RetentiveStates *s, i64 l, i64 n) {
    const Model *m = &s->model->folder.model;
    i64 H = m->H, R = s->slots, size = size_of(s->dtype);
    Rings *r = &s->rings[l];
    return (Rings){r->state + n * H * m->K * m->V,
                   (char *)r->k + n * H * R * m->K * size,
                   (char *)r->v + n * H * R * m->V * size,
                   r->decay + n * H * R,
                   r->written + n,
                   r->folded + n};
}

/* the tokens in a ring go into its state: S = exp(G) S + sum of exp(G - G_j) k_j v_j^T */
static void settle(RetentiveStates *s, i64 n) {
    const Model *m = &s->model->folder.model;
    i64 K = m->K, V = m->V, R = s->slots, size = size_of(s->dtype);
    float k[K], v[V];
    for (i64 l = 0; l < m->layers; l++) {
        Rings r = rings_from(s, l, n);
        i64 held = *r.written - *r.folded;
        for (i64 h = 0; h < m->H && held; h++) {
            float *S = r.state + h * K * V, weight[R];
            double since = 0;
            for (i64 j = held - 1; j >= 0; j--)
                weight[j] = (float)exp(since), since += r.decay[h * R + (*r.folded + j) % R];
            for (i64 i = 0; i < K * V; i++) S[i] *= (float)exp(since);
            for (i64 j = 0; j < held; j++) {
                i64 slot = h * R + (*r.folded + j) % R;
                read_row(s->dtype, (char *)r.k + slot * K * size, K, k, K),
                    read_row(s->dtype, (char *)r.v + slot * V * size, V, v, V);
                for (i64 a = 0; a < K; a++)
                    for (i64 b = 0; b < V; b++) S[a * V + b] += weight[j] * k[a] * v[b];
            }
        }
        *r.written = *r.folded = 0;
    }
}

int retentive_copy(RetentiveStates *s, int64_t to, int64_t from) {
    const Model *m = &s->model->folder.model;
    if (to < 0 || from < 0 || to >= s->count || from >= s->count) return 0;
    settle(s, from);
    for (i64 l = 0; l < m->layers; l++) {
        Rings a = rings_from(s, l, from), b = rings_from(s, l, to);
        memmove(b.state, a.state, m->H * m->K * m->V * 4);
        *b.written = *b.folded = 0;
    }
    s->position[to] = s->position[from];
    return 1;
}

/* whether there is a file of a memory, which knows what was read: a bare state in its place would lose that */
static int is_memory(const char *path) {
    Tensors t;
    int is = open_tensors(&t, "", path, NULL) && item(item(t.head, "__metadata__"), "memory");
    return close_tensors(&t), is;
}

/* the digest of a memory's file: of `about`, of the layers and of the position */
static void digest_of(const Model *m, const char *about, const float *const *layers, const void *position,
                      char hex[2 * DIGEST_BYTES + 1]) {
    Digest d;
    char kind[128];
    begin_digest(&d), add_to_digest(&d, about, (i64)strlen(about));
    int length = snprintf(kind, sizeof kind, "torch.float32[1, %lld, %lld, %lld]", (long long)m->H, (long long)m->K,
                          (long long)m->V);
    for (i64 l = 0; l < m->layers; l++)
        add_to_digest(&d, kind, length), add_to_digest(&d, layers[l], m->H * m->K * m->V * 4);
    add_to_digest(&d, "torch.int64[1]", 14), add_to_digest(&d, position, 8);
    end_digest(&d, hex);
}

/* the head of a state's file, `about` NULL or that of a memory; its bytes, or 0 where there was no memory */
static i64 head_of_state(RetentiveStates *s, i64 n, const char *about, char **head) {
    const Model *m = &s->model->folder.model;
    i64 floats = m->H * m->K * m->V, most = m->layers * 176 + 512 + (about ? 6 * (i64)strlen(about) : 0), used = 0;
    char *text = *head = malloc(most), hex[2 * DIGEST_BYTES + 1];
    const float *layers[m->layers];
    if (!text) return 0;
    used += snprintf(text, most, "{\"__metadata__\":{\"format\":\"retentive-state-2\",\"windows\":\"[");
    for (i64 l = 0; l < m->layers; l++) used += snprintf(text + used, most - used, l ? ", 0" : "0");
    used += snprintf(text + used, most - used, "]\"");
    if (about) {
        for (i64 l = 0; l < m->layers; l++) layers[l] = rings_from(s, l, n).state;
        digest_of(m, about, layers, &s->position[n], hex);
        used += snprintf(text + used, most - used, ",\"digest\":\"%s\",\"memory\":\"", hex);
        for (const char *c = about; *c; c++)
            if ((unsigned char)*c < 32) used += snprintf(text + used, most - used, "\\u%04x", *c);
            else used += snprintf(text + used, most - used, *c == '"' || *c == '\\' ? "\\%c" : "%c", *c);
        text[used++] = '"';
    }
    text[used++] = '}';
    for (i64 l = 0; l < m->layers; l++)
        used +=
            snprintf(text + used, most - used,
                     ",\"memories.%lld.state\":{\"dtype\":\"F32\",\"shape\":[1,%lld,%lld,%lld],\"data_offsets\":[%lld,%lld]}",
                     (long long)l, (long long)m->H, (long long)m->K, (long long)m->V, (long long)(l * floats * 4 + 8),
                     (long long)((l + 1) * floats * 4 + 8));
    used +=
        snprintf(text + used, most - used, ",\"position\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}}");
    while (used % 8) text[used++] = ' ';
    return used;
}

static int save_state(RetentiveStates *s, i64 n, const char *path, const char *about, char *error) {
    const Model *m = &s->model->folder.model;
    i64 floats = m->H * m->K * m->V, used;
    char *head, partial[4096];
    if (n < 0 || n >= s->count)
        return fail(error, "there are %lld sequences, got %lld", (long long)s->count, (long long)n);
    settle(s, n);
    used = head_of_state(s, n, about, &head);
    if (!used) return fail(error, "no memory to save");
    snprintf(partial, sizeof partial, "%s.partial", path);
    FILE *file = fopen(partial, "wb");
    uint64_t length = used;
    int good = file && fwrite(&length, 8, 1, file) && (i64)fwrite(head, 1, used, file) == used &&
               fwrite(&s->position[n], 8, 1, file);
    for (i64 l = 0; l < m->layers && good; l++)
        good = (i64)fwrite(rings_from(s, l, n).state, 4, floats, file) == floats;
    if (file) good = !fclose(file) && good;
    free(head);
    if (good && !rename(partial, path)) return 1;
    remove(partial);
    return fail(error, "%s cannot be written", path);
}

int retentive_save(RetentiveStates *s, int64_t n, const char *path, char *error) {
    if (is_memory(path)) return fail(error, "%s holds a memory, which says more than a state: save elsewhere", path);
    return save_state(s, n, path, NULL, error);
}

int retentive_save_memory(RetentiveStates *s, int64_t n, const char *path, const char *about, char *error) {
    return save_state(s, n, path, about, error);
}

int retentive_load(RetentiveStates *s, int64_t n, const char *path, char *error) {
    const Model *m = &s->model->folder.model;
    Tensors t;
    int bad = 0;
    const char *dtype = "", *position;
    const float *layers[m->layers];
    char name[64], hex[2 * DIGEST_BYTES + 1];
    if (n < 0 || n >= s->count)
        return fail(error, "there are %lld sequences, got %lld", (long long)s->count, (long long)n);
    if (!open_tensors(&t, "", path, error)) return close_tensors(&t), 0;
    const Json *said = item(t.head, "__metadata__"), *about = item(said, "memory"), *digest = item(said, "digest");
    int old = is_text(item(said, "format"), "retentive-state-1") && is_text(item(said, "kind"), "retention");
    int good = old || is_text(item(said, "format"), "retentive-state-2");
    position = good ? tensor(&t, "position", 1, 0, &dtype, &bad, NULL) : NULL;
    good = position && !strcmp(dtype, "I64");
    const char *names = old ? "layers.%lld" : "memories.%lld.state";
    snprintf(name, sizeof name, names, (long long)m->layers);
    good = good && !item(t.head, name);
    for (i64 l = 0; l < m->layers && good; l++) { /* all is looked at before anything is written over */
        snprintf(name, sizeof name, names, (long long)l);
        layers[l] = (const float *)tensor(&t, name, m->H * m->K * m->V, 0, &dtype, &bad, NULL);
        good = layers[l] && !strcmp(dtype, "F32");
    }
    if (!good) return close_tensors(&t), fail(error, "%s holds no state of one sequence of this model", path);
    if (about && about->type == STRING) digest_of(m, about->text, layers, position, hex);
    if (about && (about->type != STRING || !is_text(digest, hex)))
        return close_tensors(&t), fail(error, "%s was changed after it was written: its digest does not fit", path);
    for (i64 l = 0; l < m->layers; l++) {
        Rings r = rings_from(s, l, n);
        memcpy(r.state, layers[l], m->H * m->K * m->V * 4);
        *r.written = *r.folded = 0;
    }
    memcpy(&s->position[n], position, 8);
    close_tensors(&t);
    return 1;
}

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

/* Tokens of `count` sequences from `first` on, through rings or, if `plain`, in chunks through settled states. */
static int tokens_of_states(RetentiveStates *s, i64 first, i64 count, int plain, const int64_t *ids, const i64 *begin,
                            float *x) {
    Retentive *r = s->model;
    i64 layers = r->folder.model.layers;
    Rings rings[layers];
    for (i64 l = 0; l < layers; l++) rings[l] = rings_from(s, l, first);
    Reading reading = {count, plain ? 0 : s->slots, s->dtype, r->threads, r->pool, &r->folder.model, ids,
                       begin, s->position + first,  rings,    x};
    if (native_read(&reading)) return 0;
    for (i64 n = 0; n < count; n++) s->position[first + n] += begin[n + 1] - begin[n];
    return 1;
}

int retentive_read(RetentiveStates *s, int64_t n, const int64_t *ids, int64_t count, float *logits) {
    Retentive *r = s->model;
    i64 D = r->folder.model.D, begin[2] = {0, count};
    if (n < 0 || n >= s->count || count < 1 || !in_vocabulary(r, ids, count)) return 0;
    float *x = malloc(count * D * 4);
    if (!x) return 0;
    if (count > 1) settle(s, n);
    int good =
        tokens_of_states(s, n, 1, count > 1, ids, begin, x) && (!logits || head_of(r, x + (count - 1) * D, 1, logits));
    free(x);
    return good;
}

int retentive_decode(RetentiveStates *s, int64_t count, const int64_t *ids, float *logits) {
    Retentive *r = s->model;
    if (count < 1 || count > s->count || !in_vocabulary(r, ids, count)) return 0;
    i64 *begin = malloc((count + 1) * sizeof *begin);
    float *x = malloc(count * r->folder.model.D * 4);
    for (i64 i = 0; begin && i <= count; i++) begin[i] = i;
    int good = begin && x && tokens_of_states(s, 0, count, 0, ids, begin, x) && head_of(r, x, count, logits);
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

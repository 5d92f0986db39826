/* A model folder: config.json, model.safetensors and tokenizer.json, as retentive/checkpoint writes them. */

#pragma once
#include "json.h"
#include "model.h"
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

/* ---- tensors ---- */

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

/* The bytes of a tensor of the sizes [rows] or [rows][columns] (columns 0), its dtype's name in *dtype; NULL if it is
   not there. What is there in other sizes, or not whole, is an error, and *bad is set. */
static const char *tensor(const Tensors *t, const char *name, int64_t rows, int64_t columns, const char **dtype,
                          int *bad, char *error) {
    const Json *found = item(t->head, name), *type = item(found, "dtype"), *shape = item(found, "shape"),
               *at = item(found, "data_offsets");
    static const struct {
        const char *name;
        int size;
    } sizes[] = {{"F32", 4}, {"BF16", 2}, {"F16", 2}, {"I8", 1}, {"U8", 1}, {"I64", 8}};
    if (!found) return NULL;
    int size = 0, dims = 0;
    double count = 1;
    for (int i = 0; i < 6; i++)
        if (is_text(type, sizes[i].name)) size = sizes[i].size, *dtype = sizes[i].name;
    for (const Json *d = shape ? shape->child : NULL; d; d = d->next) dims++, count *= d->number;
    const Json *first = shape ? shape->child : NULL;
    int fits = size && at && at->child && at->child->next &&
               (columns ? dims == 2 && first->number == rows && first->next->number == columns : count == rows);
    double begin = fits ? at->child->number : 0, end = fits ? at->child->next->number : -1;
    if (fits && begin >= 0 && end - begin == count * size && end <= t->length - (t->at - t->data))
        return t->at + (int64_t)begin;
    *bad = 1;
    fail(error, "model.safetensors does not fit config.json: %s", name);
    return NULL;
}

/* ---- a model ---- */

typedef struct {
    Model model;
    Layer *layers;
    Tensors tensors;
    const Json *config;
    i64 bits, group;  /* of quantised matrices, or 0 */
    i64 dtype;        /* of what is no matrix, and of rings: 0 float32, 1 bfloat16 */
    char **kept;      /* what the model points to */
    i64 kept_count;
    int bad;          /* something failed, and `error` tells what */
    char *error;
} Folder;

static void *keep(Folder *f, int64_t bytes) {
    char **more = realloc(f->kept, (f->kept_count + 1) * sizeof *f->kept);
    void *memory = aligned_alloc(64, round_up(bytes ? bytes : 1, 64));
    if (more) f->kept = more;
    if (!more || !memory)
        return f->bad = 1, fail(f->error, "no memory for %.0f MB of weights", bytes / 1e6), free(memory), NULL;
    return f->kept[f->kept_count++] = memory;
}

static double number_of(Folder *f, const char *key) {
    const Json *j = item(f->config, key);
    if (j && (j->type == NUMBER || j->type == TRUTH) && j->number >= 0 && j->number <= 1 << 28) return j->number;
    if (!f->bad) fail(f->error, "config.json has no such number as %s: load and save it with a newer version", key);
    return f->bad = 1, 0;
}

static i64 whole_number_of(Folder *f, const char *key) {
    double number = number_of(f, key);
    if (number != floor(number) && !f->bad) f->bad = 1, fail(f->error, "config.json: %s is no whole number", key);
    return (i64)number;
}

/* which of some names a field has */
static i64 choice_of(Folder *f, const char *key, const char *const *names) {
    const Json *j = item(f->config, key);
    for (i64 i = 0; names[i]; i++)
        if (is_text(j, names[i])) return i;
    if (!f->bad) fail(f->error, "config.json: %s is none that is known", key);
    return f->bad = 1, 0;
}

/* a vector as floats; NULL where the file has none, which is an error if it is `needed` */
static const float *vector_of(Folder *f, i64 count, int needed, const char *name) {
    const char *dtype = NULL, *data = tensor(&f->tensors, name, count, 0, &dtype, &f->bad, f->error);
    i64 type = dtype && !strcmp(dtype, "F32") ? 0 : dtype && !strcmp(dtype, "BF16") ? 1 : 2;
    if (data && type == 2 && strcmp(dtype, "F16"))
        return f->bad = 1, fail(f->error, "%s is %s: expected floats", name, dtype), NULL;
    if (!data) {
        if (needed && !f->bad) f->bad = 1, fail(f->error, "model.safetensors has no %s", name);
        return NULL;
    }
    if (type) f->dtype = 1;
    float *x = keep(f, count * 4);
    if (x) read_row(type, data, count, x, count);
    return x;
}

typedef struct { const char *name; i64 rows; } Part; /* of a matrix; NULL: not in this model */

/* the parts one below the other, or panels of both in turn */
static Matrix matrix_of(Folder *f, i64 K, int in_turn, const char *prefix, const Part *parts, int count) {
    Matrix m = {0, K, FLOAT32, f->group, NULL, NULL};
    const char *rows[5] = {0}, *scales[5] = {0}, *dtype = NULL, *of_first = NULL;
    i64 panels = 0, first = 0;
    int have = 0;
    for (int i = 0; i < count && !f->bad; i++) {
        char name[256], of_scales[272];
        if (!parts[i].name) continue;
        snprintf(name, sizeof name, "%s%s.weight", prefix, parts[i].name);
        snprintf(of_scales, sizeof of_scales, "%s%s.scale", prefix, parts[i].name);
        rows[i] = tensor(&f->tensors, name, parts[i].rows, f->bits == 4 ? (K + 1) / 2 : K, &dtype, &f->bad, f->error);
        if (f->bits && !f->bad) {
            const char *half = NULL;
            scales[i] =
                tensor(&f->tensors, of_scales, parts[i].rows, (K + f->group - 1) / f->group, &half, &f->bad, f->error);
            if (!scales[i] || strcmp(half, "F16")) rows[i] = NULL;
        }
        if (!rows[i] && !f->bad) f->bad = 1, fail(f->error, "model.safetensors has no %s", name);
        of_first = of_first ? of_first : dtype;
        if (!f->bad && strcmp(dtype, of_first))
            f->bad = 1, fail(f->error, "%s is %s, others are %s: one dtype is needed", name, dtype, of_first);
        m.N = panels * ROWS + parts[i].rows, panels += (parts[i].rows + ROWS - 1) / ROWS, have++;
    }
    if (f->bad) return m;
    m.kind = f->bits == 8 ? INT8 : f->bits == 4 ? INT4 : !strcmp(dtype, "BF16") ? BFLOAT16 : FLOAT32;
    if (strcmp(dtype, f->bits == 8 ? "I8" : f->bits == 4 ? "U8" : m.kind == BFLOAT16 ? "BF16" : "F32"))
        return f->bad = 1,
               fail(f->error, "%s%s is %s: float32, bfloat16, int8 or int4 can be run", prefix, parts[0].name, dtype),
               m;
    uint8_t *to = keep(f, packed_bytes(&m));
    if (!to) return m;
    place(&m, to);
    for (int i = 0, n = 0; i < count; i++) {
        if (!parts[i].name) continue;
        pack(&m, parts[i].rows, in_turn ? n : first, in_turn ? have : 1, (const uint8_t *)rows[i],
             (const uint16_t *)scales[i]);
        first += (parts[i].rows + ROWS - 1) / ROWS, n++;
    }
    return m;
}

/* log(gamma) of each head, as ops/decay.py has it; of "gated" none */
static void decays_of(Folder *f) {
    Model *m = &f->model;
    const Json *decay = item(f->config, "decay"), *range = item(f->config, "decay_range");
    double *log_decay = keep(f, m->H * 8);
    float *as_float = keep(f, m->H * 4);
    if (f->bad) return;
    if (is_text(decay, "gated")) {
        m->gated = 1;
        return;
    }
    const Json *own = decay && decay->type == ARRAY ? decay->child : NULL;
    for (i64 h = 0; h < m->H && !f->bad; h++) {
        if (own) log_decay[h] = own->number, own = own->next;
        else if (is_text(decay, "paper")) log_decay[h] = log1p(-pow(2, -5.0 - h));
        else if (is_text(decay, "none")) log_decay[h] = 0;
        else if (is_text(decay, "lm") && range && range->child && range->child->next) {
            double begin = log(range->child->number), end = log(range->child->next->number);
            log_decay[h] = log1p(-exp(begin + (end - begin) * h / (m->H > 1 ? m->H - 1 : 1)));
        } else f->bad = 1, fail(f->error, "config.json: decay is none that is known");
        as_float[h] = (float)log_decay[h];
    }
    m->log_decay = log_decay, m->log_decay_f = as_float;
}

static void config_of(Folder *f) {
    static const char *const activations[] = {"swish", "gelu", "sigmoid", NULL};
    static const char *const turns[] = {"none", "interleaved", "half", NULL};
    Model *m = &f->model;
    /* fields of the model, of its mixers and of their feed-forward layers; in version 0.1.0 all in one place */
    const Json *whole = f->config, *blocks = item(whole, "blocks"), *one = blocks ? blocks->child : NULL;
    const Json *mixer = blocks ? item(one, "mixer") : whole, *ffn = blocks ? item(one, "ffn") : whole;
    if (blocks && (!ffn || one->next || !is_text(item(mixer, "kind"), "retention"))) {
        f->bad = 1, fail(f->error, "it runs RetNets, this is another model");
        return;
    }
    m->D = whole_number_of(f, "dim"), m->vocab = whole_number_of(f, "vocab_size");
    m->eps = number_of(f, "norm_eps"), m->embed_scale = number_of(f, "embed_scale") ? sqrt((double)m->D) : 1;
    f->config = blocks ? one : whole, m->layers = whole_number_of(f, blocks ? "repeat" : "layers");
    f->config = ffn, m->F = whole_number_of(f, blocks ? "width" : "ffn_dim");
    m->ffn_gate = number_of(f, blocks ? "gate" : "ffn_gate"), m->activation = choice_of(f, "activation", activations);
    f->config = mixer, m->H = whole_number_of(f, "heads"), m->kv = whole_number_of(f, "kv_heads");
    if (!f->bad && (m->D < 1 || m->layers < 1 || m->H < 1 || m->kv < 1 || m->H % m->kv || m->F < 1 || m->vocab < 1))
        f->bad = 1, fail(f->error, "config.json describes no model");
    if (f->bad) return;
    i64 keys = whole_number_of(f, "key_dim"), values = whole_number_of(f, "value_dim");
    m->K = keys / m->H, m->V = values / m->H;
    if (!f->bad && (keys % m->H || values % m->H || m->K < 2 || m->K % 2 || m->V < 1)) f->bad = 1, fail(f->error, "config.json describes no model");
    m->gate = number_of(f, "gate"), m->normed_heads = number_of(f, "head_norm");
    m->row_norm = number_of(f, "score_norm"), m->decay_scale = number_of(f, "decay_scale");
    m->gate_activation = choice_of(f, "gate_activation", activations);
    double base = item(mixer, "rotary_base") ? number_of(f, "rotary_base") : 10000;
    i64 turn = choice_of(f, "rotary", turns), half_K = m->K / 2;
    m->halves = turn == 2;
    double *frequency = turn ? keep(f, half_K * 8) : NULL;
    for (i64 i = 0; frequency && i < half_K; i++)
        frequency[i] = pow(base, -(turn == 2 ? (double)i / half_K : half_K > 1 ? (double)i / (half_K - 1) : 0));
    m->frequency = frequency;
    if (!f->bad) decays_of(f);
    f->config = whole;
}

static void layer_of(Folder *f, i64 i) {
    Model *m = &f->model;
    Layer *layer = &f->layers[i];
    char prefix[64], name[96];
    snprintf(prefix, sizeof prefix, "blocks.%lld.", (long long)i);
#define VECTOR(what, count, needed) (snprintf(name, sizeof name, "%s" what, prefix), vector_of(f, count, needed, name))
    Part in[] = {{"retention.q_proj", m->H * m->K},
                 {"retention.k_proj", m->kv * m->K},
                 {"retention.v_proj", m->kv * m->V},
                 {m->gate ? "retention.g_proj" : NULL, m->H * m->V},
                 {m->gated ? "retention.decay_proj" : NULL, m->H}};
    Part out[] = {{"retention.out_proj", m->D}}, down[] = {{"ffn.down_proj", m->D}};
    Part up[] = {{"ffn.gate_proj", m->F}, {m->ffn_gate ? "ffn.up_proj" : NULL, m->F}};
    layer->in = matrix_of(f, m->D, 0, prefix, in, 5), layer->out = matrix_of(f, m->H * m->V, 0, prefix, out, 1);
    layer->up = matrix_of(f, m->D, 1, prefix, up, 2), layer->down = matrix_of(f, m->F, 0, prefix, down, 1);
    layer->retention_norm = VECTOR("retention_norm.weight", m->D, 1);
    layer->ffn_norm = VECTOR("ffn_norm.weight", m->D, 1);
    layer->q_norm = VECTOR("retention.q_norm.weight", m->K, 0);
    layer->k_norm = VECTOR("retention.k_norm.weight", m->K, 0);
    layer->q_bias = VECTOR("retention.q_bias", m->H * m->K, 0);
    layer->k_bias = VECTOR("retention.k_bias", m->kv * m->K, 0);
    layer->decay_bias = VECTOR("retention.decay_proj.bias", m->H, 0);
    layer->head_norm = VECTOR("retention.head_norm.weight", m->V, 0);
#undef VECTOR
}

static void close_folder(Folder *f) {
    for (i64 i = 0; i < f->kept_count; i++) free(f->kept[i]);
    free(f->kept);
    memset(f, 0, sizeof *f);
}

/* the weights of a folder whose config.json is `raw`; 0 if that cannot be, and `error` tells why */
static int read_model(Folder *f, const Json *raw, const char *folder, char *error) {
    Model *m = &f->model;
    const Json *how = item(raw, "quantization");
    memset(f, 0, sizeof *f);
    f->error = error, f->config = item(raw, "config");
    if (!is_text(item(raw, "format"), "retentive-model-2") && !is_text(item(raw, "format"), "retentive-model-1"))
        return fail(error, "%s/config.json is none of this package's", folder);
    if (!item(f->config, "blocks") && !is_text(item(raw, "kind"), "retnet"))
        return fail(error, "it runs RetNets, this is another model");
    if (how)
        f->bits = item(how, "bits") ? item(how, "bits")->number : 0,
        f->group = item(how, "group") ? item(how, "group")->number : 0;
    if (how && ((f->bits != 8 && f->bits != 4) || f->group < 16 || f->group > 256 || f->group % 16))
        return fail(error, "config.json: unknown quantization");
    config_of(f);
    if (f->bad || !open_tensors(&f->tensors, folder, "model.safetensors", error))
        return close_tensors(&f->tensors), close_folder(f), 0;
    f->layers = keep(f, m->layers * sizeof(Layer));
    for (i64 i = 0; i < m->layers && !f->bad; i++) layer_of(f, i);
    m->layer = f->layers;
    if (!f->bad) {
        int tied = number_of(f, "tie_embeddings") != 0;
        Part embed[] = {{"embed", m->vocab}}, head[] = {{"head", m->vocab}};
        m->embed = matrix_of(f, m->D, 0, "", embed, 1), m->head = tied ? m->embed : matrix_of(f, m->D, 0, "", head, 1);
        m->embed_norm = vector_of(f, m->D, number_of(f, "embed_norm") != 0, "embed_norm.weight");
        m->final_norm = vector_of(f, m->D, number_of(f, "final_norm") != 0, "norm.weight");
    }
    int good = !f->bad;
    close_tensors(&f->tensors);
    if (!good) close_folder(f);
    return good;
}

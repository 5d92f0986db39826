/* A model folder: config.json, model.safetensors and tokenizer.json, as retentive/checkpoint writes them. */

#pragma once
#include "config.h"

/* A tensor [rows][columns], or [rows] where columns are 0, as floats; NULL where the file has none, which is an error if it
   is `needed`. */
static const float *floats_of(Folder *f, i64 rows, i64 columns, int needed, const char *name) {
    const char *dtype = NULL, *data = tensor(&f->tensors, name, rows, columns, &dtype, &f->bad, f->error);
    i64 count = columns ? rows * columns : rows;
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

static const float *vector_of(Folder *f, i64 count, int needed, const char *name) {
    return floats_of(f, count, 0, needed, name);
}

typedef struct { const char *name; i64 rows; } Part; /* of a matrix; NULL: not in this model */

/* the parts one below the other, or panels of both in turn */
static Matrix matrix_of(Folder *f, i64 K, int in_turn, const char *prefix, const Part *parts, int count) {
    Matrix m = {.K = K, .kind = FLOAT32, .group = f->group};
    const char *rows[5] = {0}, *scales[5] = {0}, *minimums[5] = {0}, *dtype = NULL, *of_first = NULL;
    i64 panels = 0, first = 0;
    int have = 0;
    for (int i = 0; i < count && !f->bad; i++) {
        char name[256], of_scales[272], of_minimums[272];
        if (!parts[i].name) continue;
        snprintf(name, sizeof name, "%s%s.weight", prefix, parts[i].name);
        snprintf(of_scales, sizeof of_scales, "%s%s.scale", prefix, parts[i].name);
        snprintf(of_minimums, sizeof of_minimums, "%s%s.minimum", prefix, parts[i].name);
        rows[i] = tensor(&f->tensors, name, parts[i].rows, f->bits == 4 ? (K + 1) / 2 : K, &dtype, &f->bad, f->error);
        if (f->bits && !f->bad) {
            const char *half = NULL, *other = "F16";
            i64 groups = (K + f->group - 1) / f->group;
            scales[i] = tensor(&f->tensors, of_scales, parts[i].rows, groups, &half, &f->bad, f->error);
            minimums[i] = tensor(&f->tensors, of_minimums, parts[i].rows, groups, &other, &f->bad, f->error);
            if (!scales[i] || strcmp(half, "F16") || strcmp(other, "F16")) rows[i] = NULL;
            if (minimums[i]) m.least = 1;
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
             (const uint16_t *)scales[i], (const uint16_t *)minimums[i]);
        first += (parts[i].rows + ROWS - 1) / ROWS, n++;
    }
    return m;
}

/* biases of q, k and v, each in panels of its own; NULL where the mixer has none */
static const float *in_bias_of(Folder *f, const Layer *l, const char *mixer) {
    const char *const names[] = {"q_proj", "k_proj", "v_proj"};
    const i64 at[] = {0, row_of_k(l), row_of_v(l)}, counts[] = {l->H * l->K, l->kv * l->K, l->kv * l->V};
    float *bias = NULL;
    for (int i = 0; i < 3 && !f->bad; i++) {
        char name[128];
        snprintf(name, sizeof name, "%s.%s.bias", mixer, names[i]);
        const float *own = vector_of(f, counts[i], bias != NULL, name);
        if (!own) break;
        if (!bias && (bias = keep(f, row_of_gate(l) * 4))) memset(bias, 0, row_of_gate(l) * 4);
        if (!bias) break;
        memcpy(bias + at[i], own, counts[i] * 4);
    }
    return bias;
}

#define OWN(what) (snprintf(name, sizeof name, "%s%s", own, what), name)
/* retention or attention, whose tensors' names begin with `own` */
static void mixer_of(Folder *f, const char *own, Layer *l) {
    i64 D = f->model.D;
    int attends = l->kind == ATTENTION;
    char name[128];
    l->q_norm = vector_of(f, l->K, 0, OWN(".q_norm.weight")), l->k_norm = vector_of(f, l->K, 0, OWN(".k_norm.weight"));
    l->q_bias = vector_of(f, l->H * l->K, 0, OWN(".q_bias")), l->k_bias = vector_of(f, l->kv * l->K, 0, OWN(".k_bias"));
    l->decay_bias = vector_of(f, l->H, 0, attends ? OWN(".forget_proj.bias") : OWN(".decay_proj.bias"));
    l->head_norm = vector_of(f, l->joint ? l->H * l->V : l->V, 0, OWN(".head_norm.weight"));
    l->in_bias = in_bias_of(f, l, own);
    Part in[] = {{"q_proj", l->H * l->K},
                 {"k_proj", l->kv * l->K},
                 {"v_proj", l->kv * l->V},
                 {l->gate ? "g_proj" : NULL, l->H * l->V},
                 {!l->gated ? NULL : attends ? "forget_proj" : "decay_proj", l->H}};
    Part out[] = {{"out_proj", D}};
    OWN(".");
    l->in = matrix_of(f, D, 0, name, in, 5), l->out = matrix_of(f, l->H * l->V, 0, name, out, 1);
}

static void layer_of(Folder *f, i64 i) {
    static const char *const kinds[] = {"retention", "attention", "convolution"};
    i64 D = f->model.D;
    Layer *l = &f->layers[i];
    char block[64], own[96], name[128];
    snprintf(block, sizeof block, "blocks.%lld.", (long long)i);
    snprintf(own, sizeof own, "%s%s", block, kinds[l->kind]);
    l->mixer_norm = vector_of(f, D, 1, OWN("_norm.weight"));
    if (l->kind == CONVOLUTION) l->convolution = floats_of(f, l->taps, D, 1, OWN(".weight"));
    else mixer_of(f, own, l);
    snprintf(name, sizeof name, "%sffn_norm.weight", block), l->ffn_norm = vector_of(f, D, l->F > 0, name);
    Part down[] = {{"ffn.down_proj", D}};
    Part up[] = {{"ffn.gate_proj", l->F}, {l->ffn_gate ? "ffn.up_proj" : NULL, l->F}};
    if (l->F) l->up = matrix_of(f, D, 1, block, up, 2), l->down = matrix_of(f, l->F, 0, block, down, 1);
}
#undef OWN

static void close_folder(Folder *f) {
    for (i64 i = 0; i < f->kept_count; i++) free(f->kept[i]);
    free(f->kept);
    memset(f, 0, sizeof *f);
}

/* how the matrices are quantised, as config.json tells; 0 where that is not known */
static int quantization_of(Folder *f, const Json *how, char *error) {
    if (!how) return 1;
    f->bits = item(how, "bits") ? item(how, "bits")->number : 0;
    f->group = item(how, "group") ? item(how, "group")->number : 0;
    if ((f->bits == 8 || f->bits == 4) && f->group >= 16 && f->group <= 256 && f->group % 16 == 0) return 1;
    return fail(error, "config.json: unknown quantization");
}

/* the matrices and vectors of all layers, of the embedding and the head */
static void weights_of(Folder *f, const Json *config) {
    Model *m = &f->model;
    for (i64 i = 0; i < m->layers && !f->bad; i++) layer_of(f, i);
    if (f->bad) return;
    Part embed[] = {{"embed", m->vocab}}, head[] = {{"head", m->vocab}};
    m->embed = matrix_of(f, m->D, 0, "", embed, 1);
    m->head = number_of(f, config, "tie_embeddings") ? m->embed : matrix_of(f, m->D, 0, "", head, 1);
    m->embed_norm = vector_of(f, m->D, number_or(f, config, "embed_norm", 0) != 0, "embed_norm.weight");
    m->final_norm = vector_of(f, m->D, number_or(f, config, "final_norm", 1) != 0, "norm.weight");
}

/* the weights of a folder whose config.json is `raw`; 0 if that cannot be, and `error` has the reason */
static int read_model(Folder *f, const Json *raw, const char *folder, char *error) {
    const Json *format = item(raw, "format");
    memset(f, 0, sizeof *f);
    f->error = error;
    if (!is_text(format, "retentive-model-2") && !is_text(format, "retentive-model-1"))
        return fail(error, "%s/config.json is none of this package's", folder);
    int good = quantization_of(f, item(raw, "quantization"), error) &&
               open_tensors(&f->tensors, folder, "model.safetensors", error);
    if (good) config_of(f, raw);
    good = good && !f->bad && check_sum(&f->tensors, "model.safetensors", error);
    if (good) weights_of(f, item(raw, "config"));
    good = good && !f->bad;
    close_tensors(&f->tensors);
    if (!good) close_folder(f);
    return good;
}

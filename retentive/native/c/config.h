/* config.json: the shapes of a model and of each of its layers, as retentive/models/config.py writes them. */

#pragma once
#include "model.h"
#include "pages.h"
#include "tensors.h"

enum { MOST_LAYERS = 10000, MOST_NUMBER = 1 << 28, MOST_TAPS = 64 };

typedef struct {
    Model model;
    Layer *layers;
    Turn *turns;
    Tensors tensors;
    i64 bits, group; /* of quantised matrices, or 0 */
    i64 dtype;       /* of vectors, rings and caches: 0 float32, 1 bfloat16 */
    char **kept;     /* blocks of memory that the model points into */
    i64 kept_count, left; /* bytes left of the last block, from `next` on */
    char *next;
    int bad;         /* something failed, and `error` has the line */
    char *error;
} Folder;

/* room in a block of many matrices, whose pages can be large, where memory that is not touched takes no room; a block of
   its own elsewhere */
static void *keep(Folder *f, int64_t bytes) {
#ifdef __linux__
    const i64 block = 64 * LARGE_PAGE, alignment = LARGE_PAGE;
#else
    const i64 block = 0, alignment = 64;
#endif
    bytes = round_up(bytes ? bytes : 1, 64);
    if (bytes > f->left) {
        i64 size = round_up(bytes > block ? bytes : block, alignment);
        char **more = realloc(f->kept, (f->kept_count + 1) * sizeof *f->kept);
        char *memory = aligned_alloc(alignment, size);
        if (more) f->kept = more;
        if (!more || !memory)
            return f->bad = 1, fail(f->error, "no memory for %.0f MB of weights", bytes / 1e6), free(memory), NULL;
        f->kept[f->kept_count++] = f->next = memory, f->left = size;
        in_large_pages(memory, size);
    }
    f->next += bytes, f->left -= bytes;
    return f->next - bytes;
}

/* ---- fields ---- */

static double number_of(Folder *f, const Json *object, const char *key) {
    const Json *j = item(object, key);
    if (j && (j->type == NUMBER || j->type == TRUTH) && j->number >= 0 && j->number <= MOST_NUMBER) return j->number;
    if (!f->bad) fail(f->error, "config.json has no such number as %s: load and save it with a newer version", key);
    return f->bad = 1, 0;
}

/* the same of a field that older files, or other kinds of models, do not have */
static double number_or(Folder *f, const Json *object, const char *key, double otherwise) {
    const Json *j = item(object, key);
    return j && j->type != NOTHING ? number_of(f, object, key) : otherwise;
}

static i64 whole_number_of(Folder *f, const Json *object, const char *key) {
    double number = number_of(f, object, key);
    if (number != floor(number) && !f->bad) f->bad = 1, fail(f->error, "config.json: %s is no whole number", key);
    return (i64)number;
}

/* which of some names a field has */
static i64 choice_of(Folder *f, const Json *object, const char *key, const char *const *names) {
    const Json *j = item(object, key);
    for (i64 i = 0; names[i]; i++)
        if (is_text(j, names[i])) return i;
    if (!f->bad) fail(f->error, "config.json: %s is none that is known", key);
    return f->bad = 1, 0;
}

static const char *const ACTIVATIONS[] = {"swish", "gelu", "sigmoid", NULL};

static void expect(Folder *f, int holds) {
    if (!holds && !f->bad) f->bad = 1, fail(f->error, "config.json describes no model");
}

/* ---- layers ---- */

/* log(gamma) of each head, as ops/decay.py has it; NULL for a decay per token */
static const double *decays_of(Folder *f, const Json *mixer, i64 H) {
    const Json *decay = item(mixer, "decay"), *range = item(mixer, "decay_range");
    if (is_text(decay, "gated") || is_text(decay, "sigmoid")) return NULL;
    const Json *own = decay && decay->type == ARRAY ? decay->child : NULL;
    double *log_decay = keep(f, H * 8);
    for (i64 h = 0; h < H && !f->bad; h++) {
        if (own) log_decay[h] = own->number, own = own->next;
        else if (is_text(decay, "paper")) log_decay[h] = log1p(-pow(2, -5.0 - h));
        else if (is_text(decay, "none")) log_decay[h] = 0;
        else if (is_text(decay, "lm") && range && range->child && range->child->next) {
            double begin = log(range->child->number), end = log(range->child->next->number);
            log_decay[h] = log1p(-exp(begin + (end - begin) * h / (H > 1 ? H - 1 : 1)));
        } else f->bad = 1, fail(f->error, "config.json: decay is none that is known");
    }
    return log_decay;
}

static int same_numbers(const double *a, const double *b, i64 n) { return a == b || (a && b && !memcmp(a, b, n * 8)); }

/* Smaller angles of pairs, for longer texts: `Scaling` of ops/rotary.py. */
static void slow_down(Folder *f, const Json *scaling, double *frequency, i64 count) {
    double factor = number_of(f, scaling, "factor"), original = number_of(f, scaling, "original");
    double low = number_of(f, scaling, "low"), high = number_of(f, scaling, "high");
    expect(f, factor > 0 && (original == 0 || low < high));
    for (i64 i = 0; i < count && !f->bad; i++) {
        double turns = frequency[i] * original / (2 * 3.14159265358979323846);
        double kept = original > 0 ? fmin(fmax((turns - low) / (high - low), 0), 1) : 0;
        frequency[i] *= kept + (1 - kept) / factor;
    }
}

/* the layer's turn: that of an earlier layer which agrees in everything, or a new one */
static void turn_of(Folder *f, const Json *mixer, const char *rotary, const double *log_decay, Layer *layer) {
    static const char *const turns[] = {"none", "interleaved", "half", NULL};
    i64 turn = choice_of(f, mixer, rotary, turns), half = layer->K / 2;
    double base = number_or(f, mixer, "rotary_base", 10000), *frequency = turn ? keep(f, half * 8) : NULL;
    Model *m = &f->model;
    if (f->bad) return;
    for (i64 i = 0; frequency && i < half; i++)
        frequency[i] = pow(base, -(turn == 2 ? (double)i / half : half > 1 ? (double)i / (half - 1) : 0));
    const Json *scaling = item(mixer, "rotary_scaling");
    if (frequency && scaling && scaling->type != NOTHING) slow_down(f, scaling, frequency, half);
    double by_position = number_or(f, mixer, "position_scale", 0);
    expect(f, by_position == 0 || by_position > 1);
    Turn own = {layer->K, layer->H, turn == 2, log_decay != NULL, turn_floats(m), by_position, frequency, log_decay};
    i64 i = 0;
    for (; i < m->turns; i++) {
        const Turn *t = f->turns + i;
        if (t->K == own.K && t->H == own.H && t->halves == own.halves && t->position_scale == by_position && same_numbers(t->frequency, frequency, half) &&
            same_numbers(t->log_decay, log_decay, own.H))
            break;
    }
    if (i == m->turns) f->turns[m->turns++] = own;
    layer->turn = f->turns + i;
}

/* Cosines and sines at the position from which moving sinks are seen in a long text. */
static const float *far_turn_of(Folder *f, const Layer *layer) {
    i64 half = layer->K / 2, last = layer->sinks + layer->window - 1;
    float *turn = keep(f, layer->K * 4);
    for (i64 i = 0; turn && i < half; i++) {
        double angle = layer->turn->frequency ? last * layer->turn->frequency[i] : 0;
        turn[i] = (float)cos(angle), turn[half + i] = (float)sin(angle);
    }
    return turn;
}

static void retention_of(Folder *f, const Json *mixer, Layer *layer) {
    i64 H = layer->H, keys = whole_number_of(f, mixer, "key_dim"), values = whole_number_of(f, mixer, "value_dim");
    expect(f, H > 0 && keys % H == 0 && values % H == 0);
    if (f->bad) return;
    layer->K = keys / H, layer->V = values / H;
    layer->gate = number_of(f, mixer, "gate"), layer->normed_heads = number_of(f, mixer, "head_norm");
    layer->joint = number_or(f, mixer, "head_norm_joint", 0);
    layer->gate_activation = choice_of(f, mixer, "gate_activation", ACTIVATIONS);
    layer->decay_scale = number_of(f, mixer, "decay_scale");
    const double *log_decay = decays_of(f, mixer, H);
    float *as_floats = log_decay ? keep(f, H * 4) : NULL;
    layer->gated = log_decay || f->bad ? 0 : is_text(item(mixer, "decay"), "sigmoid") ? BOUNDED : 1;
    layer->log_decay = as_floats;
    for (i64 h = 0; as_floats && h < H; h++) as_floats[h] = (float)log_decay[h];
    turn_of(f, mixer, "rotary", number_of(f, mixer, "score_norm") ? log_decay : NULL, layer);
}

/* Attention; the names of two of its fields differ in what version 0.1.0 wrote. */
static void attention_of(Folder *f, const Json *mixer, const char *window, const char *rotary, Layer *layer) {
    i64 D = f->model.D;
    layer->K = (i64)number_or(f, mixer, "head_dim", layer->H > 0 ? (double)D / layer->H : 0), layer->V = layer->K;
    layer->gated = number_or(f, mixer, "forget_gate", 0), layer->decay_scale = 1;
    layer->gate = number_or(f, mixer, "output_gate", 0), layer->gate_activation = SIGMOID;
    layer->window = (i64)number_or(f, mixer, window, 0);
    layer->sinks = layer->window ? (i64)number_or(f, mixer, "sinks", 0) : 0;
    expect(f, layer->H == layer->kv || !layer->gated);
    if (!f->bad) turn_of(f, mixer, rotary, NULL, layer);
    if (!f->bad && layer->sinks && number_or(f, mixer, "moving_sinks", 0)) layer->far_turn = far_turn_of(f, layer);
}

/* A layer with heads, of `kind`; where fields of the whole model are also the mixer's, as version 0.1.0 wrote them, `flat`. */
static Layer layer_as(Folder *f, const Json *mixer, i64 kind, int flat, int hybrid) {
    Layer layer = {kind};
    layer.H = whole_number_of(f, mixer, "heads"), layer.eps = number_of(f, mixer, "norm_eps");
    layer.kv = hybrid && kind == ATTENTION ? layer.H : whole_number_of(f, mixer, "kv_heads");
    expect(f, layer.H > 0 && layer.kv > 0 && layer.H % layer.kv == 0);
    if (f->bad) return layer;
    if (kind == RETENTION) retention_of(f, mixer, &layer);
    else attention_of(f, mixer, flat ? "attention_window" : "window", hybrid ? "attention_rotary" : "rotary", &layer);
    expect(f, layer.K >= 2 && layer.K % 2 == 0 && layer.V > 0);
    return layer;
}

static Layer convolution_of(Folder *f, const Json *mixer) {
    Layer layer = {CONVOLUTION};
    layer.taps = whole_number_of(f, mixer, "taps");
    expect(f, whole_number_of(f, mixer, "dim") == f->model.D && layer.taps >= 2 && layer.taps <= MOST_TAPS);
    return layer;
}

static void feed_forward_of(Folder *f, const Json *ffn, const char *width, const char *gate, Layer *layer) {
    layer->F = whole_number_of(f, ffn, width), layer->ffn_gate = number_of(f, ffn, gate);
    layer->activation = choice_of(f, ffn, "activation", ACTIVATIONS);
    expect(f, layer->F > 0);
}

/* room for so many layers, of which `different` are written down */
static void room_for_layers(Folder *f, double layers, i64 different) {
    expect(f, layers >= 1 && layers <= MOST_LAYERS && layers == floor(layers));
    if (f->bad) return;
    f->model.layers = (i64)layers, f->model.layer = f->layers = keep(f, f->model.layers * sizeof(Layer));
    f->model.turn = f->turns = keep(f, different * sizeof(Turn));
}

/* A list of blocks; equal neighbours are written once, with the number of them. */
static void blocks_of(Folder *f, const Json *blocks) {
    static const char *const kinds[] = {"retention", "attention", "convolution", NULL};
    double layers = 0;
    i64 different = 0, at = 0;
    for (const Json *b = blocks->child; b; b = b->next, different++) layers += number_or(f, b, "repeat", 1);
    if (!f->bad) room_for_layers(f, layers, different);
    for (const Json *b = blocks->child; b && !f->bad; b = b->next) {
        const Json *mixer = item(b, "mixer");
        i64 kind = choice_of(f, mixer, "kind", kinds);
        Layer layer = kind == CONVOLUTION ? convolution_of(f, mixer) : layer_as(f, mixer, kind, 0, 0);
        const Json *ffn = item(b, "ffn");
        if (!ffn || ffn->type != NOTHING) feed_forward_of(f, ffn, "width", "gate", &layer);
        for (double n = number_or(f, b, "repeat", 1); n > 0 && !f->bad && at < f->model.layers; n--) f->layers[at++] = layer;
    }
    expect(f, at == f->model.layers);
}

/* The flat fields of version 0.1.0, for a "retnet", a "transformer" or a "hybrid", in which one block in so many attends
   (and does so with a feed-forward layer whose width only its matrix tells). */
static void flat_layers_of(Folder *f, const Json *config, const Json *kind) {
    int transformer = is_text(kind, "transformer"), hybrid = is_text(kind, "hybrid");
    if (!transformer && !hybrid && !is_text(kind, "retnet"))
        f->bad = 1, fail(f->error, "it runs RetNets, Transformers and hybrids, this is another model");
    double layers = number_of(f, config, "layers"), every = hybrid ? number_of(f, config, "attention_every") : 0;
    expect(f, !hybrid || every >= 1);
    if (!f->bad) room_for_layers(f, layers, 2);
    for (i64 i = 0; !f->bad && i < f->model.layers; i++) {
        int attends = transformer || (hybrid && (i + 1) % (i64)every == 0);
        Layer layer = layer_as(f, config, attends ? ATTENTION : RETENTION, 1, hybrid);
        char name[64];
        snprintf(name, sizeof name, "blocks.%lld.ffn.gate_proj.weight", (long long)i);
        if (!attends) feed_forward_of(f, config, "ffn_dim", "ffn_gate", &layer);
        else layer.F = rows_of_tensor(&f->tensors, name), layer.ffn_gate = 1, layer.activation = SWISH;
        f->layers[i] = layer;
    }
}

/* the model that config.json, `raw`, describes */
static void config_of(Folder *f, const Json *raw) {
    const Json *config = item(raw, "config"), *blocks = item(config, "blocks");
    Model *m = &f->model;
    m->D = whole_number_of(f, config, "dim"), m->vocab = whole_number_of(f, config, "vocab_size");
    m->eps = number_of(f, config, "norm_eps");
    m->embed_scale = number_or(f, config, "embed_scale", 0) ? sqrt((double)m->D) : 1;
    expect(f, m->D > 0 && m->vocab > 0);
    if (f->bad) return;
    if (blocks) blocks_of(f, blocks);
    else flat_layers_of(f, config, item(raw, "kind"));
}

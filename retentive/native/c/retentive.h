/* A model without Python: open a model folder, read, decode, keep what was read.

    char error[256];
    Retentive *model = retentive_open("runs/mine", 0, error);
    RetentiveStates *states = retentive_states(model, 1);
    retentive_read(states, 0, ids, count, logits);                 a prompt; logits [vocabulary] after its last token
    int64_t id = retentive_sample(logits, retentive_vocabulary(model), &(RetentiveSampling){0.8}, &seed);
    retentive_decode(states, 1, &id, logits);                      one token more

Folders are those of the Python package, of retention, attention and convolutions in any order, float32, bfloat16, int8 or
int4; states are saved in its files. Functions give 0 or NULL where they fail; `error`, of 256 bytes or NULL, then has a
line that tells why. A model may have many states; it works for one caller at a time.
*/

#ifndef RETENTIVE_H
#define RETENTIVE_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct Retentive Retentive;
typedef struct RetentiveStates RetentiveStates;

/* A model folder, read by so many threads; 0 for as many as there are cores. */
Retentive *retentive_open(const char *folder, int threads, char *error);
/* From the next call on at most so many of them, at least 1. */
void retentive_use_threads(Retentive *model, int threads);
/* Bits of the integers that activations become beside weights of integers: 16, as at first, or 8, which loses next to
   nothing and is faster in prompts and with many sequences. Other numbers change nothing, and give 0. */
int retentive_use_activations(Retentive *model, int bits);
#ifdef __wasm_atomics__
/* In a browser the threads are workers of the page, which call this; it never returns. */
void retentive_join(Retentive *model);
#endif
/* After all its states. */
void retentive_close(Retentive *model);
/* Numbers of a row of logits. */
int64_t retentive_vocabulary(const Retentive *model);
/* The token that ends a document, and with which a text begins; -1 if there is none. */
int64_t retentive_end(const Retentive *model);

/* States of `count` sequences that have read nothing. */
RetentiveStates *retentive_states(Retentive *model, int64_t count);
void retentive_free(RetentiveStates *states);
/* Bytes that they take: of retention and convolutions as many after a million tokens as after one; a cache of attention
   grows with the longest sequence, up to its window. */
int64_t retentive_bytes(const RetentiveStates *states);
/* Tokens that a sequence has read. */
int64_t retentive_position(const RetentiveStates *states, int64_t sequence);
/* Sequence `from` over sequence `to`. */
int retentive_copy(RetentiveStates *states, int64_t to, int64_t from);
/* To a safetensors file and back. */
int retentive_save(RetentiveStates *states, int64_t sequence, const char *path, char *error);
/* A file of `retentive memory` and of the server: `about` is the JSON of its fields (retentive/infer/memory.py). */
int retentive_save_memory(RetentiveStates *states, int64_t sequence, const char *path, const char *about, char *error);
/* Either; what a memory's digest says to be damaged is refused. */
int retentive_load(RetentiveStates *states, int64_t sequence, const char *path, char *error);

/* `count` tokens of a sequence; logits [vocabulary] after the last, unless NULL. */
int retentive_read(RetentiveStates *states, int64_t sequence, const int64_t *ids, int64_t count, float *logits);
/* A token for each of the first `count` sequences; logits [count][vocabulary]. */
int retentive_decode(RetentiveStates *states, int64_t count, const int64_t *ids, float *logits);

/* How tokens are drawn. A filter of 0 is off, so that {.temperature = 0.8} draws from all of softmax(logits / 0.8). */
typedef struct {
    double temperature; /* 0 picks the likeliest token */
    int64_t top_k;      /* only the k likeliest tokens */
    double top_p;       /* only the likeliest tokens whose probabilities sum up to p */
    double min_p;       /* only tokens at least this fraction as likely as the likeliest */
} RetentiveSampling;
/* A token drawn from logits [vocabulary]; -1 where they are not finite, or without memory. `random` is a seed at first,
   any number, and changes with every draw. */
int64_t retentive_sample(const float *logits, int64_t vocabulary, const RetentiveSampling *how, uint64_t *random);

/* Ids of a text, at most as many as it has bytes; how many, or -1 where tokenizer.json splits words in a way that is
   not known here (ids then come from elsewhere). */
int64_t retentive_encode(const Retentive *model, const char *text, int64_t bytes, int64_t *ids);
/* The bytes that a token stands for, *length of them: maybe a part of a letter. */
const char *retentive_text(const Retentive *model, int64_t id, int64_t *length);

#ifdef __cplusplus
}
#endif
#endif

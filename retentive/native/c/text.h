/* tokenizer.json: bytes, or a byte-level BPE with GPT-2's word boundaries, as retentive/data/tokenizer.py trains it. */

#pragma once
#include "classes.h"
#include "folder.h"

typedef struct {
    char *data;
    Json *json;
    int bpe, digits, splits; /* digits: each by itself; splits: words are split as we know how */
    i64 vocab, end;          /* tokens; the one that ends a document */
    char **bytes;            /* [vocab] what a token stands for, NULL for none */
    i64 *lengths;
    i64 of_byte[256];
    struct Merge { i64 left, right, rank, made; } *merges; /* a hash table */
    i64 room;                                              /* of it, a power of two */
} Text;

static uint64_t pair_hash(i64 left, i64 right) {
    return ((uint64_t)left * 0x9e3779b97f4a7c15u ^ (uint64_t)right) * 0xff51afd7ed558ccdu;
}

static struct Merge *merge_of(const Text *t, i64 left, i64 right) {
    for (uint64_t at = pair_hash(left, right) >> 20;; at++) {
        struct Merge *m = &t->merges[at & (t->room - 1)];
        if (m->rank < 0 || (m->left == left && m->right == right)) return m;
    }
}

/* the next code point of UTF-8 from *at on; U+FFFD for a byte that begins none: too long, cut short, a surrogate */
static uint32_t code_point(const char **at, const char *end) {
    static const uint32_t least[] = {0, 0x80, 0x800, 0x10000}; /* that takes so many bytes more */
    const unsigned char *s = (const unsigned char *)*at;
    int more = s[0] < 0x80 ? 0 : s[0] >= 0xf0 ? 3 : s[0] >= 0xe0 ? 2 : 1;
    uint32_t c = more ? s[0] & (0x3f >> more) : s[0];
    int good = s[0] < 0x80 || (s[0] >= 0xc0 && s[0] < 0xf8 && end - *at > more);
    for (int i = 1; i <= more && good; i++) good = (s[i] & 0xc0) == 0x80, c = c << 6 | (s[i] & 63);
    if (!good || c < least[more] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return (*at)++, 0xfffd;
    *at += more + 1;
    return c;
}

/* GPT-2's letters for bytes: the printable ones stand for themselves, the others follow from 256 on */
static int byte_of_letter(uint32_t c) {
    if ((c >= 33 && c <= 126) || (c >= 161 && c <= 255 && c != 173)) return (int)c;
    if (c < 256) return -1;
    for (int b = 0, n = 256; b < 256; b++)
        if (!((b >= 33 && b <= 126) || (b >= 161 && b != 173)) && (uint32_t)n++ == c) return b;
    return -1;
}

static Class class_of(const Text *t, uint32_t c) {
    if (c < 128)
        return c == ' ' || (c >= 9 && c <= 13)      ? SPACE
               : c >= '0' && c <= '9'               ? DIGIT
               : (c | 32) >= 'a' && (c | 32) <= 'z' ? LETTER
                                                    : OTHER;
    size_t low = 0, high = sizeof runs_of_classes / sizeof *runs_of_classes; /* c is from low's first on, before high's */
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (runs_of_classes[middle] >> 3 <= c) low = middle;
        else high = middle;
    }
    Class class = runs_of_classes[low] & 7;
    return class != NEW_DIGIT ? class : t->digits ? DIGIT : OTHER;
}

/* the end of the word that begins at `at`: 's 't 're 've 'm 'll 'd, or a space and letters, digits or others, or
   space */
static const char *word_end(const Text *t, const char *at, const char *end) {
    static const char *const tails[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int i = 0; i < 7; i++) {
        i64 n = (i64)strlen(tails[i]);
        if (end - at >= n && !memcmp(at, tails[i], n)) return at + n;
    }
    const char *next = at, *one;
    Class first = class_of(t, code_point(&next, end));
    if (t->digits && first == DIGIT) return next;
    if (first == SPACE) {
        const char *last = at, *stop = at; /* the last of the spaces, and what follows them */
        while (stop < end) {
            one = stop;
            if (class_of(t, code_point(&one, end)) != SPACE) break;
            last = stop, stop = one;
        }
        one = stop;
        Class then = stop < end ? class_of(t, code_point(&one, end)) : SPACE;
        if (stop == end || (t->digits && then == DIGIT))
            return stop;                   /* digits are cut off before words are looked for */
        if (last > at) return last;        /* all but the last, which may go with the word */
        if (*last != ' ') return stop;
        next = stop, first = then;
    }
    while (next < end) {
        one = next;
        if (class_of(t, code_point(&one, end)) != first) break;
        next = one;
    }
    return next;
}

/* ids of a word's bytes, merged by rank; how many */
static i64 merge_word(const Text *t, const char *word, i64 length, i64 *ids) {
    i64 count = 0;
    for (i64 i = 0; i < length; i++) ids[count++] = t->of_byte[(unsigned char)word[i]];
    for (;;) {
        struct Merge *best = NULL;
        i64 where = 0;
        for (i64 i = 0; i + 1 < count; i++) {
            struct Merge *m = merge_of(t, ids[i], ids[i + 1]);
            if (m->rank >= 0 && (!best || m->rank < best->rank)) best = m, where = i;
        }
        if (!best) return count;
        ids[where] = best->made;
        memmove(ids + where + 1, ids + where + 2, (count - where - 2) * sizeof *ids), count--;
    }
}

/* ids of a text [at most its bytes]; how many */
static i64 encode(const Text *t, const char *text, i64 length, i64 *ids) {
    const char *at = text, *end = text + length;
    i64 count = 0;
    if (!t->bpe)
        for (; at < end; at++) ids[count++] = (unsigned char)*at;
    while (at < end) {
        const char *stop = word_end(t, at, end);
        count += merge_word(t, at, stop - at, ids + count), at = stop;
    }
    return count;
}

static i64 id_of(const Json *vocab, const char *token, i64 length) { /* slow: for a few */
    for (const Json *j = vocab->child; j; j = j->next)
        if ((i64)strlen(j->key) == length && !memcmp(j->key, token, length)) return (i64)j->number;
    return -1;
}

static void close_text(Text *t) {
    for (i64 i = 0; i < t->vocab && t->bytes; i++) free(t->bytes[i]);
    free(t->bytes), free(t->lengths), free(t->merges), free_json(t->json), free(t->data);
    memset(t, 0, sizeof *t);
}

typedef struct { const char *key; i64 id; } Named;
static int by_name(const void *a, const void *b) { return strcmp(((const Named *)a)->key, ((const Named *)b)->key); }

/* vocabulary and merges; 0 where there is no memory or they make no sense */
static int read_bpe(Text *t) {
    const Json *model = item(t->json, "model"), *vocab = item(model, "vocab"), *merges = item(model, "merges");
    i64 count = 0, n = 0, rank = 0;
    if (!vocab || vocab->type != OBJECT || !merges) return 0;
    for (const Json *j = vocab->child; j; j = j->next)
        count++, t->vocab = j->number >= t->vocab ? (i64)j->number + 1 : t->vocab;
    for (const Json *j = merges->child; j; j = j->next) n++;
    if (t->vocab > 1 << 24) return t->vocab = 0;
    for (t->room = 16; t->room < 2 * n; t->room *= 2) {}
    Named *names = malloc((count + 1) * sizeof *names);
    t->bytes = calloc(t->vocab, sizeof *t->bytes), t->lengths = calloc(t->vocab, sizeof *t->lengths);
    t->merges = malloc(t->room * sizeof *t->merges);
    char *pair = malloc(2 * 65536);
    int good = names && t->bytes && t->lengths && t->merges && pair;
    for (i64 i = 0; good && i < t->room; i++) t->merges[i].rank = -1;
    for (int b = 0; b < 256; b++) t->of_byte[b] = -1;
    count = 0;
    for (const Json *j = good ? vocab->child : NULL; j; j = j->next) {
        i64 id = (i64)j->number;
        const char *at = j->key, *end = at + strlen(at);
        if (id < 0) return free(names), free(pair), 0;
        char *bytes = malloc(end - at + 1);
        if (!bytes) return free(names), free(pair), 0;
        i64 length = 0;
        while (at < end) {
            int b = byte_of_letter(code_point(&at, end));
            if (b >= 0) bytes[length++] = (char)b;
        }
        free(t->bytes[id]), t->bytes[id] = bytes, t->lengths[id] = length;
        if (length == 1) t->of_byte[(unsigned char)*bytes] = id;
        names[count++] = (Named){j->key, id};
    }
    if (good) qsort(names, count, sizeof *names, by_name);
    for (const Json *j = good ? merges->child : NULL; j && good; j = j->next, rank++) {
        char *left = NULL, *right = NULL;
        if (j->type == ARRAY && j->child && j->child->next) left = j->child->text, right = j->child->next->text;
        else if (j->type == STRING && (right = strchr(j->text, ' '))) left = j->text, *right++ = 0;
        if (!left || !right || strlen(left) + strlen(right) >= 2 * 65536) return free(names), free(pair), 0;
        strcpy(pair, left), strcat(pair, right);
        Named *a = bsearch(&(Named){left, 0}, names, count, sizeof *names, by_name);
        Named *b = bsearch(&(Named){right, 0}, names, count, sizeof *names, by_name);
        Named *made = bsearch(&(Named){pair, 0}, names, count, sizeof *names, by_name);
        if (!a || !b || !made) return free(names), free(pair), 0;
        struct Merge *m = merge_of(t, a->id, b->id);
        if (m->rank < 0) *m = (struct Merge){a->id, b->id, rank, made->id};
    }
    free(names), free(pair);
    for (int b = 0; b < 256; b++) good = good && t->of_byte[b] >= 0;
    return good;
}

/* whether words are split as `word_end` does */
static void read_splits(Text *t) {
    const Json *before = item(t->json, "pre_tokenizer"), *parts = item(before, "pretokenizers");
    const Json *level = parts && parts->child ? parts->child->next : before;
    if (parts && parts->child)
        t->digits = is_text(item(parts->child, "type"), "Digits") && item(parts->child, "individual_digits") &&
                    item(parts->child, "individual_digits")->number;
    const Json *prefix = item(level, "add_prefix_space"), *regex = item(level, "use_regex"),
               *normal = item(t->json, "normalizer");
    t->splits = is_text(item(level, "type"), "ByteLevel") && (!parts || (t->digits && !level->next)) && prefix &&
                !prefix->number && (!regex || regex->number) && (!normal || normal->type == NOTHING);
}

static int open_text(Text *t, const char *folder, char *error) {
    static const char *const ends[] = {"<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", NULL};
    i64 length;
    memset(t, 0, sizeof *t);
    t->data = read_file(folder, "tokenizer.json", &length);
    if (!t->data) return fail(error, "%s/tokenizer.json cannot be read", folder);
    t->json = parse_json(t->data, length), t->end = -1;
    if (is_text(item(t->json, "type"), "bytes")) return t->vocab = 257, t->end = 256, t->splits = 1;
    const Json *model = item(t->json, "model");
    t->bpe = 1;
    if (!is_text(item(model, "type"), "BPE") || !is_text(item(item(t->json, "decoder"), "type"), "ByteLevel") ||
        !read_bpe(t))
        return close_text(t), fail(error, "tokenizer.json is none that is known here: bytes or a byte-level BPE");
    read_splits(t);
    for (int i = 0; ends[i] && t->end < 0; i++) t->end = id_of(item(model, "vocab"), ends[i], strlen(ends[i]));
    for (const Json *j = item(t->json, "added_tokens") ? item(t->json, "added_tokens")->child : NULL; j; j = j->next)
        for (int i = 0; ends[i]; i++)
            if (is_text(item(j, "content"), ends[i]) && item(j, "id") && t->end < 0) t->end = (i64)item(j, "id")->number;
    if (t->end >= 0 && t->end < t->vocab) t->lengths[t->end] = 0; /* it stands for no text */
    return 1;
}

/* JSON as a tree: of config.json, tokenizer.json and the heads of safetensors files. */

#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef enum { NOTHING, TRUTH, NUMBER, STRING, ARRAY, OBJECT } Type;

typedef struct Json {
    Type type;
    double number;       /* also of a truth: 0 or 1 */
    char *text;          /* of a string, UTF-8, ended by 0; */
    int64_t length;      /* its bytes */
    char *key;           /* where it is in an object */
    struct Json *child, *next;
} Json;

typedef struct { char *at, *end; int depth; } Reader;

enum { MOST_DEPTH = 64 };

static void free_json(Json *j) {
    while (j) {
        Json *next = j->next;
        free_json(j->child);
        free(j);
        j = next;
    }
}

static void skip_space(Reader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r')) r->at++;
}

static int hex_of(Reader *r) { /* four digits, or -1 */
    int value = 0;
    if (r->end - r->at < 4) return -1;
    for (int i = 0; i < 4; i++) {
        char c = *r->at++;
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) return -1;
        value = value * 16 + digit;
    }
    return value;
}

static char *put_utf8(char *to, uint32_t c) {
    if (c < 0x80) *to++ = (char)c;
    else if (c < 0x800) *to++ = (char)(0xc0 | c >> 6), *to++ = (char)(0x80 | (c & 63));
    else if (c < 0x10000)
        *to++ = (char)(0xe0 | c >> 12), *to++ = (char)(0x80 | (c >> 6 & 63)), *to++ = (char)(0x80 | (c & 63));
    else {
        *to++ = (char)(0xf0 | c >> 18), *to++ = (char)(0x80 | (c >> 12 & 63));
        *to++ = (char)(0x80 | (c >> 6 & 63)), *to++ = (char)(0x80 | (c & 63));
    }
    return to;
}

/* A string, written over its own place in the text, where it is never longer; NULL if there is none. */
static char *read_string(Reader *r, int64_t *length) {
    if (r->at >= r->end || *r->at++ != '"') return NULL;
    char *start = r->at, *to = start;
    while (r->at < r->end && *r->at != '"') {
        if (*r->at != '\\') {
            *to++ = *r->at++;
            continue;
        }
        if (++r->at >= r->end) return NULL;
        char c = *r->at++;
        const char *names = "nrtbf\"\\/", *means = "\n\r\t\b\f\"\\/", *found = strchr(names, c);
        if (found && c) *to++ = means[found - names];
        else if (c == 'u') {
            int high = hex_of(r), low = 0;
            if (high < 0) return NULL;
            if (high >= 0xd800 && high < 0xdc00 && r->end - r->at >= 6 && r->at[0] == '\\' && r->at[1] == 'u') {
                r->at += 2, low = hex_of(r);
                if (low < 0) return NULL;
                high = 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
            }
            to = put_utf8(to, (uint32_t)high);
        } else return NULL;
    }
    if (r->at >= r->end) return NULL;
    r->at++;
    *to = 0, *length = to - start;
    return start;
}

static Json *read_value(Reader *r);

/* what stands between brackets; 0 where it is not JSON */
static int read_children(Reader *r, Json *j, char close) {
    Json **last = &j->child;
    int64_t length;
    skip_space(r);
    if (r->at < r->end && *r->at == close) return r->at++, 1;
    for (;;) {
        char *key = NULL;
        skip_space(r);
        if (close == '}') {
            if (!(key = read_string(r, &length))) return 0;
            skip_space(r);
            if (r->at >= r->end || *r->at++ != ':') return 0;
        }
        Json *value = read_value(r);
        if (!value) return 0;
        value->key = key, *last = value, last = &value->next;
        skip_space(r);
        if (r->at >= r->end) return 0;
        char c = *r->at++;
        if (c == close) return 1;
        if (c != ',') return 0;
    }
}

static int read_into(Reader *r, Json *j) {
    static const struct {
        const char *word;
        Type type;
        double number;
    } words[] = {{"true", TRUTH, 1}, {"false", TRUTH, 0}, {"null", NOTHING, 0}};
    skip_space(r);
    if (r->at >= r->end) return 0;
    char c = *r->at;
    if (c == '{' || c == '[') {
        if (++r->depth > MOST_DEPTH) return 0;
        r->at++, j->type = c == '{' ? OBJECT : ARRAY;
        int good = read_children(r, j, c == '{' ? '}' : ']');
        r->depth--;
        return good;
    }
    if (c == '"') return j->type = STRING, (j->text = read_string(r, &j->length)) != NULL;
    for (int i = 0; i < 3; i++) {
        int64_t n = (int64_t)strlen(words[i].word);
        if (r->end - r->at >= n && !memcmp(r->at, words[i].word, n))
            return r->at += n, j->type = words[i].type, j->number = words[i].number, 1;
    }
    char *end;
    j->type = NUMBER, j->number = strtod(r->at, &end); /* the text is ended by 0 */
    if (end == r->at || end > r->end) return 0;
    return r->at = end, 1;
}

static Json *read_value(Reader *r) {
    Json *j = calloc(1, sizeof(Json));
    if (j && read_into(r, j)) return j;
    free_json(j);
    return NULL;
}

/* The tree of `text`, whose strings lie in it: it is changed, and lives as long. NULL where it is not JSON. */
static Json *parse_json(char *text, int64_t length) {
    Reader r = {text, text + length, 0};
    Json *j = read_value(&r);
    skip_space(&r);
    if (j && r.at == r.end) return j;
    free_json(j);
    return NULL;
}

/* what an object has under a key, or NULL */
static const Json *item(const Json *object, const char *key) {
    if (!object || object->type != OBJECT) return NULL;
    for (const Json *j = object->child; j; j = j->next)
        if (!strcmp(j->key, key)) return j;
    return NULL;
}

static int is_text(const Json *j, const char *text) { return j && j->type == STRING && !strcmp(j->text, text); }

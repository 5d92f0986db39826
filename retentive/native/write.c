/* A model that writes, without Python.

    write MODEL [-p PROMPT] [-n TOKENS] [-t TEMPERATURE] [--top-k K] [--top-p P] [--min-p M] [-s SEED] [-j THREADS]
                [--activations BITS] [--state FILE]

MODEL is a folder that `retentive train`, `convert` or `quantize` wrote. With --state it goes on from a file, if that is there, and is saved to it after the prompt and in the end.
*/

#include <retentive.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *model, *prompt, *state;
    long tokens, threads, activations;
    RetentiveSampling how;
    uint64_t seed;
} Options;

static void stop(const char *what) {
    fprintf(stderr, "write: %s\n", what);
    exit(2);
}

static double number(const char *text) {
    char *end;
    double x = strtod(text, &end);
    if (end == text || *end || !(x >= 0 && x <= 1e15)) stop("options but -p and --state take numbers from 0 on");
    return x;
}

static Options read_options(int argc, char **argv) {
    Options o = {.prompt = "", .tokens = 200, .activations = 16, .how = {.temperature = 0.8, .top_p = 0.95}};
    for (int i = 1; i < argc; i++) {
        const char *flag = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (flag[0] != '-') {
            if (o.model) stop("one MODEL, please");
            o.model = flag;
            continue;
        }
        if (!value)
            stop("usage: write MODEL [-p PROMPT] [-n TOKENS] [-t TEMPERATURE] [--top-k K] [--top-p P] [--min-p M] "
                 "[-s SEED] [-j THREADS] [--activations BITS] [--state FILE]");
        i++;
        if (!strcmp(flag, "-p")) o.prompt = value;
        else if (!strcmp(flag, "-n")) o.tokens = (long)number(value);
        else if (!strcmp(flag, "-t")) o.how.temperature = number(value);
        else if (!strcmp(flag, "--top-k")) o.how.top_k = (int64_t)number(value);
        else if (!strcmp(flag, "--top-p")) o.how.top_p = number(value);
        else if (!strcmp(flag, "--min-p")) o.how.min_p = number(value);
        else if (!strcmp(flag, "-s")) o.seed = (uint64_t)number(value);
        else if (!strcmp(flag, "-j")) o.threads = (long)number(value);
        else if (!strcmp(flag, "--activations")) o.activations = (long)number(value);
        else if (!strcmp(flag, "--state")) o.state = value;
        else stop("unknown option: -p, -n, -t, --top-k, --top-p, --min-p, -s, -j, --activations and --state are known");
    }
    if (!o.model) stop("which MODEL? a folder with config.json and model.safetensors");
    return o;
}

static void print_token(const Retentive *model, int64_t id) {
    int64_t length;
    const char *bytes = retentive_text(model, id, &length);
    fwrite(bytes, 1, length, stdout);
    fflush(stdout);
}

int main(int argc, char **argv) {
    char error[256];
    Options o = read_options(argc, argv);
    Retentive *model = retentive_open(o.model, (int)o.threads, error);
    if (!model) stop(error);
    if (!retentive_use_activations(model, (int)o.activations)) stop("--activations of 8 or 16 bits");
    RetentiveStates *states = retentive_states(model, 1);
    int64_t vocabulary = retentive_vocabulary(model), bytes = (int64_t)strlen(o.prompt), count = 0;
    int64_t *ids = malloc((bytes + 1) * sizeof *ids);
    float *logits = malloc(vocabulary * sizeof *logits);
    if (!states || !ids || !logits) stop("no memory");

    FILE *there = o.state ? fopen(o.state, "rb") : NULL;
    if (there) {
        fclose(there);
        if (!retentive_load(states, 0, o.state, error)) stop(error);
    } else if (retentive_end(model) >= 0) ids[count++] = retentive_end(model); /* as every text in training begins */
    int64_t encoded = retentive_encode(model, o.prompt, bytes, ids + count);
    if (encoded < 0) stop("this model's tokenizer.json is missing, or none that is known here");
    count += encoded;
    if (!count) stop("a prompt of at least one token, please: -p");
    if (!retentive_read(states, 0, ids, count, logits)) stop("the prompt could not be read");
    if (o.state && !retentive_save(states, 0, o.state, error)) stop(error); /* before the text, which may be long */

    fputs(o.prompt, stdout);
    for (long n = 0; n < o.tokens; n++) {
        int64_t id = retentive_sample(logits, vocabulary, &o.how, &o.seed);
        if (id < 0) stop("the model's logits are not finite: are there NaN in its weights?");
        if (id == retentive_end(model)) break;
        print_token(model, id);
        if (!retentive_decode(states, 1, &id, logits)) stop("a token could not be read");
    }
    putchar('\n');
    if (fflush(stdout)) stop("the text could not be written");
    if (o.state && !retentive_save(states, 0, o.state, error)) stop(error);
    retentive_free(states);
    retentive_close(model);
    free(ids), free(logits);
    return 0;
}

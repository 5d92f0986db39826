/* What the tests ask of the standalone library: `logits MODEL STATE PROMPT IDS` prints logits as numbers of 9 digits, with
activations of as many bits as ACTIVATIONS in the environment says.

IDS are read in two parts, the second token by token with a state that was saved to STATE and loaded in between, and a
copy of it; then the ids of PROMPT, and their text.
*/

#include <retentive.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print(const char *name, const float *x, int64_t n) {
    printf("%s", name);
    for (int64_t i = 0; i < n; i++) printf(" %.9g", x[i]);
    printf("\n");
}

int main(int argc, char **argv) {
    char error[256] = "";
    int64_t ids[4096], count = 0, length;
    if (argc < 4) return 1;
    for (int i = 4; i < argc; i++) ids[count++] = atoll(argv[i]);
    Retentive *model = retentive_open(argv[1], 2, error);
    if (!model) return printf("error %s\n", error), 2;
    if (getenv("ACTIVATIONS") && !retentive_use_activations(model, atoi(getenv("ACTIVATIONS")))) return 7;
    int64_t vocab = retentive_vocabulary(model), half = count / 2;
    float *logits = malloc(2 * vocab * sizeof *logits);
    RetentiveStates *a = retentive_states(model, 1), *b = retentive_states(model, 2);
    if (!retentive_read(a, 0, ids, half, logits)) return 3;
    print("read", logits, vocab);
    if (!retentive_save(a, 0, argv[2], error) || !retentive_load(b, 1, argv[2], error))
        return printf("error %s\n", error), 2;
    if (!retentive_copy(b, 0, 1) || retentive_position(b, 0) != half) return 4;
    for (int64_t i = half; i < count; i++) {
        int64_t both[] = {ids[i], ids[i]};
        if (!retentive_decode(b, 2, both, logits)) return 5;
    }
    print("decoded", logits, vocab), print("copied", logits + vocab, vocab);
    if (!retentive_save(b, 1, argv[2], error)) return printf("error %s\n", error), 2;
    if (retentive_read(b, 0, &vocab, 1, logits)) return 6; /* no such token */
    count = retentive_encode(model, argv[3], (int64_t)strlen(argv[3]), ids);
    printf("ids");
    for (int64_t i = 0; i < count; i++) printf(" %lld", (long long)ids[i]);
    printf("\ntext ");
    for (int64_t i = 0; i < count; i++) {
        const char *bytes = retentive_text(model, ids[i], &length);
        fwrite(bytes, 1, length, stdout);
    }
    printf("\n");
    retentive_free(a), retentive_free(b), retentive_close(model), free(logits);
    return 0;
}

/* a folder, a state or nothing, and ids: prints the logits after the last */
#include <retentive.h>
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) { /* MODEL STATE IDS: logits after them */
    char error[256];
    Retentive *model = retentive_open(argv[1], 1, error);
    if (!model) return puts(error), 2;
    RetentiveStates *states = retentive_states(model, 1);
    if (*argv[2] && !retentive_load(states, 0, argv[2], error)) return puts(error), 3;
    float *logits = malloc(retentive_vocabulary(model) * sizeof *logits);
    int64_t ids[64], count = 0;
    for (int i = 3; i < argc; i++) ids[count++] = atoll(argv[i]);
    if (!retentive_read(states, 0, ids, count, logits)) return 4;
    for (int64_t i = 0; i < retentive_vocabulary(model); i++) printf("%.9g ", logits[i]);
    return 0;
}

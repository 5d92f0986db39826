/* The row of C without Python in `python -m benchmarks edge`: a folder is opened, read and written, and a line of JSON says
   how fast.

    edge_form MODEL THREADS PROMPT TOKENS STEPS VOCABULARY BEGAN
*/

#include <retentive.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>

static double now(void) {
    struct timeval t;
    gettimeofday(&t, NULL);
    return t.tv_sec + t.tv_usec * 1e-6;
}

/* the most memory that this process had; what getrusage tells may be that of the one that started it */
static long peak_kilobytes(void) {
    char line[256];
    long found = 0;
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, "VmHWM:", 6)) found = atol(line + 6);
    if (status) fclose(status);
    return found;
}

static void need(int good, const char *why) {
    if (good) return;
    fprintf(stderr, "%s\n", why);
    exit(1);
}

int main(int argc, char **argv) {
    char error[256] = "";
    need(argc == 8, "usage: edge_form MODEL THREADS PROMPT TOKENS STEPS VOCABULARY BEGAN");
    int threads = atoi(argv[2]), prompt = atoi(argv[3]), tokens = atoi(argv[4]), steps = atoi(argv[5]);
    int64_t vocabulary = atoi(argv[6]);
    Retentive *model = retentive_open(argv[1], threads, error);
    need(model != NULL, error);
    RetentiveStates *states = retentive_states(model, 2); /* the second stays blank */
    float *logits = malloc(retentive_vocabulary(model) * sizeof *logits);
    int64_t *ids = malloc(tokens * sizeof *ids);
    need(states && logits && ids, "no memory");
    for (int i = 0; i < tokens; i++) ids[i] = (i + 1) % vocabulary;

    need(retentive_read(states, 0, ids, prompt < tokens ? prompt : tokens, logits), "the prompt was not read");
    printf("{\"first_seconds\": %.6f, \"logits\": [", now() - atof(argv[7]));
    for (int64_t i = 0; i < vocabulary; i++) printf("%s%.9g", i ? ", " : "", logits[i]);
    double reading = 1e30, writing = 1e30;
    for (int turn = 0; turn < 3; turn++) { /* the first warms up */
        retentive_copy(states, 0, 1);
        double began = now();
        need(retentive_read(states, 0, ids, tokens, logits), "the text was not read");
        double took = now() - began;
        if (turn && took < reading) reading = took;
        began = now();
        for (int64_t n = 0; n < steps; n++) {
            int64_t id = n % vocabulary;
            need(retentive_read(states, 0, &id, 1, logits), "a token was not read");
        }
        took = now() - began;
        if (turn && took < writing) writing = took;
    }
    printf("], \"read_per_second\": %.3f, \"write_per_second\": %.3f, \"peak_bytes\": %ld}\n", tokens / reading,
           steps / writing, peak_kilobytes() * 1024);
    return 0;
}

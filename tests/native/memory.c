/* a folder and a memory; and a file and words about it, to save it once more */
#include <retentive.h>
#include <stdio.h>
int main(int argc, char **argv) {
    char error[256];
    Retentive *model = retentive_open(argv[1], 1, error);
    RetentiveStates *states = retentive_states(model, 1);
    if (!retentive_load(states, 0, argv[2], error)) return puts(error), 2;
    if (argc > 3 && !retentive_save_memory(states, 0, argv[3], argv[4], error)) return puts(error), 3;
    return 0;
}

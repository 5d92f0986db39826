/* a folder and files: says of each whether it is a state of this model */
#include <retentive.h>
#include <stdio.h>
int main(int argc, char **argv) {
    char error[256];
    Retentive *model = retentive_open(argv[1], 1, error);
    RetentiveStates *states = retentive_states(model, 1);
    for (int i = 2; i < argc; i++)
        puts(retentive_load(states, 0, argv[i], error) ? "taken" : error);
    return argc < 3;
}

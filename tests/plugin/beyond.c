/* With a third argument, passes a length beyond the end of an array. A sanitized library must then abort with a report. */
#include "fake_host.h"

#include <stdio.h>

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    detox_steer *steer = NULL;
    detox_callback *callback = NULL;
    detox_host_table table = fake_table();
    if (detox_steer_load(argv[1], argv[2], NULL, &steer) != DETOX_OK) return 3;
    if (detox_steer_callback(steer, &table, NULL, &callback) != DETOX_OK) return 3;
    int32_t *sequences = calloc(4, sizeof *sequences);
    detox_status status = detox_batch(callback, argc > 3 ? 5 : 4, sequences, NULL, NULL);
    printf("%d\n", (int) status);
    free(sequences);
    return 0;
}

/*
 * Fuzzes the plugin. The fuzzer chooses the order of calls, the numbers, the handles and the tensors. No call may crash or
 * trigger AddressSanitizer. A function may return any status, but a failure must leave a message.
 *
 * DETOX_FUZZ_FILES holds the paths of a model and of files to steer it with, separated by ':':
 * MODEL:STEER:STEER:PROBE:NOTHING.
 */
#include "fake_host.h"

#include <stdio.h>

static const uint8_t *input;
static size_t n_input;

static uint8_t next_byte(void) {
    if (n_input == 0) return 0;
    n_input--;
    return *input++;
}

static uint64_t next_number(size_t n_bytes) {
    uint64_t number = 0;
    for (size_t i = 0; i < n_bytes; i++) number = number << 8 | next_byte();
    return number;
}

static double next_double(void) {
    uint64_t bits = next_number(8);
    double number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static float next_float(void) {
    uint32_t bits = (uint32_t) next_number(4);
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

enum { N_FILES = 5, N_HANDLES = 4 };

static char paths[4096];
static const char *files[N_FILES + 1];

static void find_files(void) {
    if (files[0] != NULL) return;
    const char *given = getenv("DETOX_FUZZ_FILES");
    if (given == NULL || strlen(given) >= sizeof paths) abort();
    strcpy(paths, given);
    int n = 0;
    for (char *at = strtok(paths, ":"); at != NULL && n < N_FILES; at = strtok(NULL, ":")) files[n++] = at;
    if (n != N_FILES) abort();
}

static const char *next_file(void) {
    uint8_t byte = next_byte();
    /* files[N_FILES] is NULL. */
    return files[byte % (N_FILES + 1)];
}

/* Handles that are live, freed, of the wrong kind, or invalid. */
static void *handles[N_HANDLES];

static void *next_handle(void) {
    uint8_t byte = next_byte();
    if (byte >= 240) return (void *) (uintptr_t) next_number(8);
    return handles[byte % N_HANDLES];
}

static bool also(struct ggml_tensor *tensor, bool ask, void *user_data) {
    (void) user_data;
    return ask ? tensor->name[0] == 'l' : true;
}

static void compute_node(void *callback) {
    static const char *const names[] = {"embd", "ffn_swiglu-0", "ffn_swiglu-1", "ffn_swiglu-2", "l_out-0", "l_out-1",
                                        "l_out-2", "result_norm", "cache_k_l0 (view)", "l_out-99999999999", "", "x"};
    static float data[96 * 8];
    static int64_t indices[8];
    uint8_t choice = next_byte(), form = next_byte();
    struct ggml_tensor target, index, node;
    int64_t width = form & 1 ? 64 : form & 2 ? 96 : form % 97, n_rows = (form >> 4) % 8;
    node = fake_matrix(names[next_byte() % (sizeof names / sizeof *names)], data, width, n_rows);
    for (int i = 0; i < 8; i++) indices[i] = (int64_t) (int8_t) next_byte();
    index = fake_matrix("", (float *) indices, 8, 1);
    index.type = FAKE_I64;
    index.nb[0] = sizeof(int64_t);
    index.ne[0] = n_rows;
    index.n_bytes = sizeof indices;
    target = fake_matrix("", data, 64, (int64_t) next_byte());
    node.sources[0] = &node;
    if (form & 4) {
        node.op = "SET_ROWS";
        node.sources[1] = &index;
        node.sources[2] = form & 8 ? &target : NULL;
    }
    if (choice >= 250) node.type = (int32_t) next_number(4);
    if (choice >= 240 && choice < 250) node.nb[choice % 4] = (size_t) next_number(8);
    if (choice >= 230 && choice < 240) node.ne[choice % 4] = (int64_t) next_number(8);
    /* The plugin cannot detect a shape that exceeds the tensor's data. Give such a tensor no data and no F32 type, so that
     * the plugin does not read it. */
    if (choice >= 230) node.n_bytes = 0;
    if (choice >= 230 && node.type == FAKE_F32) {
        node.type = 1;
    }
    fake_compute((detox_callback *) callback, &node);
}

static detox_status call(void) {
    static float room[64 * 2];
    uint8_t which = next_byte() % 20;
    void *handle = next_handle();
    int32_t sequence = (int32_t) (int8_t) next_byte();
    switch (which) {
        case 0: {
            detox_steer_options options = DETOX_STEER_OPTIONS_INIT;
            detox_steer *steer = NULL;
            if (next_byte() > 200) options.size = next_byte() % (sizeof options + 1);
            options.coefficient = next_byte() > 100 ? 1.0f : next_float();
            options.route = next_byte() % 3;
            const char *model = next_byte() > 60 ? files[0] : next_file();
            detox_status status = detox_steer_load(model, next_file(), &options, &steer);
            if (status == DETOX_OK) {
                void **slot = &handles[next_byte() % N_HANDLES];
                detox_steer_free((detox_steer *) *slot);
                detox_callback_free((detox_callback *) *slot);
                *slot = steer;
            }
            return status;
        }
        case 1: case 2: {
            detox_host_table table = fake_table();
            detox_callback_options options = DETOX_CALLBACK_OPTIONS_INIT;
            detox_callback *callback = NULL;
            uint8_t form = next_byte();
            options.n_seq_max = form % 5;
            options.kv_unified = (form & 8) != 0;
            options.next = form & 16 ? also : NULL;
            if (form & 32) table.size = next_byte() % (sizeof table + 1);
            if (form & 64) table.op = NULL;
            if (form & 128) options.size = next_byte() % (sizeof options + 1);
            detox_status status = detox_steer_callback((detox_steer *) handle, &table, &options, &callback);
            if (status == DETOX_OK) {
                void **slot = &handles[next_byte() % N_HANDLES];
                detox_callback_free((detox_callback *) *slot);
                detox_steer_free((detox_steer *) *slot);
                *slot = callback;
            }
            return status;
        }
        case 3: return detox_steer_free((detox_steer *) handle);
        case 4: return detox_callback_free((detox_callback *) handle);
        case 5: return detox_set_coefficient((detox_steer *) handle, next_float());
        case 6: return detox_get_coefficient((detox_steer *) handle, next_byte() & 1 ? room : NULL);
        case 7: {
            detox_control_vector vector = DETOX_CONTROL_VECTOR_INIT;
            if (next_byte() > 200) vector.size = next_byte() % (sizeof vector + 1);
            size_t capacity = next_byte() > 100 ? 64 * 2 : next_byte() % 64;
            return detox_steer_control_vector((detox_steer *) handle, &vector, next_byte() & 1 ? room : NULL, capacity);
        }
        case 8: {
            int32_t sequences[16];
            int8_t flags[16];
            for (int i = 0; i < 16; i++) sequences[i] = next_byte() > 250 ? -1 : next_byte() % 5;
            for (int i = 0; i < 16; i++) flags[i] = (int8_t) next_byte();
            uint8_t form = next_byte();
            return detox_batch((detox_callback *) handle, next_byte() % 17, form & 1 ? sequences : NULL,
                               form & 2 ? flags : NULL, form & 4 ? flags : NULL);
        }
        case 9: return detox_set_sequence((detox_callback *) handle, sequence, (sequence & 64) != 0);
        case 10: {
            detox_gate_options options = DETOX_GATE_OPTIONS_INIT;
            if (next_byte() > 100) options.threshold = next_double();
            if (next_byte() > 200) options.size = next_byte() % (sizeof options + 1);
            options.window = next_byte();
            return detox_gate_set((detox_callback *) handle, next_byte() > 60 ? files[3] : next_file(), &options);
        }
        case 11: return detox_gate_remove((detox_callback *) handle);
        case 12: return detox_gate_set_threshold((detox_callback *) handle, next_double());
        case 13: {
            double probability;
            bool is_open;
            uint8_t form = next_byte();
            return detox_gate_state((detox_callback *) handle, sequence, form & 1 ? &probability : NULL,
                                    form & 2 ? &is_open : NULL);
        }
        case 14: return detox_gate_reset((detox_callback *) handle, sequence);
        case 15: {
            char text[64], language[3];
            double toxicity = -1.0;
            size_t n = next_byte() % sizeof text;
            for (size_t i = 0; i < n; i++) text[i] = (char) next_byte();
            text[n] = '\0';
            language[0] = (char) next_byte();
            language[1] = (char) next_byte();
            language[2] = '\0';
            uint8_t form = next_byte();
            detox_status status = detox_score(text, form & 1 ? "en" : form & 2 ? language : NULL, &toxicity);
            if (status == DETOX_OK && !(toxicity >= 0.0 && toxicity <= 1.0)) abort();
            return status;
        }
        case 16: return detox_check((detox_callback *) handle);
        default:
            for (int i = next_byte() % 8; i >= 0; i--) compute_node(handle);
            return DETOX_OK;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    find_files();
    input = data;
    n_input = size;
    /* Start with one handle of each kind. Otherwise most inputs would have no valid handle. */
    detox_steer *steer = NULL;
    detox_callback *callback = NULL;
    detox_steer_options options = DETOX_STEER_OPTIONS_INIT;
    options.route = DETOX_ROUTE_CALLBACK;
    detox_host_table table = fake_table();
    if (detox_steer_load(files[0], files[1], &options, &steer) != DETOX_OK) abort();
    if (detox_steer_callback(steer, &table, NULL, &callback) != DETOX_OK) abort();
    handles[0] = steer;
    handles[1] = callback;
    handles[2] = handles[3] = NULL;
    while (n_input > 0) {
        detox_status status = call();
        if (status < DETOX_OK || status >= DETOX_INTERNAL_ERROR) abort();
        if (status != DETOX_OK && detox_last_error()[0] == '\0') abort();
    }
    for (int i = 0; i < N_HANDLES; i++) {
        detox_steer_free((detox_steer *) handles[i]);
        detox_callback_free((detox_callback *) handles[i]);
    }
    return 0;
}

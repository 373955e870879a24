/*
 * Uses every function of the plugin wrongly in every way that can be seen, and rightly in between.
 *
 *     misuse MODEL STEER CONTROL_VECTOR PROBE NOT_A_FILE
 *
 * STEER assigns 4 to neuron 5 of layer 0; MODEL is gguf/tiny/llama.gguf.
 */
#include "fake_host.h"

#include <math.h>
#include <stdio.h>

static int n_wrong;

#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: expected %s (last error: %s)\n", __FILE__, __LINE__, #condition,                   \
                    detox_last_error());                                                                               \
            n_wrong++;                                                                                                 \
        }                                                                                                              \
    } while (0)

enum { WIDTH = 96, N_EMBD = 64, N_LAYER = 3, N_ROWS = 2 };

static float values[WIDTH * 8];

/* A graph of the tiny llama: rows of ones everywhere. Returns a neuron of layer 0 in the last row. */
static float compute_graph(detox_callback *callback, bool has_neurons) {
    float neuron = 0.0f;
    for (int i = 0; i < WIDTH * 8; i++) values[i] = 1.0f;
    struct ggml_tensor embedding = fake_matrix("embd", values, N_EMBD, N_ROWS);
    fake_compute(callback, &embedding);
    for (int il = 0; il < N_LAYER; il++) {
        char name[32];
        int64_t n_rows = il + 1 == N_LAYER ? 1 : N_ROWS;
        for (int i = 0; i < WIDTH * 8; i++) values[i] = 1.0f;
        snprintf(name, sizeof name, "ffn_swiglu-%d", il);
        struct ggml_tensor neurons = fake_matrix(name, values, WIDTH, n_rows);
        if (has_neurons) fake_compute(callback, &neurons);
        if (il == 0) neuron = values[WIDTH + 5];
        for (int i = 0; i < WIDTH * 8; i++) values[i] = 1.0f;
        snprintf(name, sizeof name, "l_out-%d", il);
        struct ggml_tensor output = fake_matrix(name, values, N_EMBD, n_rows);
        fake_compute(callback, &output);
    }
    return neuron;
}

static void use_steer(const char *model, const char *file, const char *vector_file, const char *no_file) {
    detox_steer *steer = NULL;
    detox_steer_options options = DETOX_STEER_OPTIONS_INIT;
    EXPECT(detox_steer_load(NULL, file, NULL, &steer) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_steer_load(model, NULL, NULL, &steer) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_steer_load(model, file, NULL, NULL) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_steer_load(model, no_file, NULL, &steer) == DETOX_IO_ERROR);
    EXPECT(strstr(detox_last_error(), no_file) != NULL);
    EXPECT(detox_steer_load(no_file, file, NULL, &steer) == DETOX_IO_ERROR);
    EXPECT(detox_steer_load(model, model, NULL, &steer) == DETOX_INVALID_FILE);
    EXPECT(detox_steer_load(file, file, NULL, &steer) == DETOX_INVALID_FILE);
    options.size = 3;
    EXPECT(detox_steer_load(model, file, &options, &steer) == DETOX_INVALID_ARGUMENT);
    options.size = sizeof options;
    options.route = 7;
    EXPECT(detox_steer_load(model, file, &options, &steer) == DETOX_INVALID_ARGUMENT);
    options.route = DETOX_ROUTE_CALLBACK;
    options.coefficient = NAN;
    EXPECT(detox_steer_load(model, file, &options, &steer) == DETOX_INVALID_ARGUMENT);
    EXPECT(steer == NULL);

    EXPECT(detox_steer_load(model, vector_file, NULL, &steer) == DETOX_OK);
    detox_control_vector vector = DETOX_CONTROL_VECTOR_INIT;
    float data[N_EMBD * (N_LAYER - 1)];
    float coefficient;
    EXPECT(detox_steer_control_vector(steer, NULL, NULL, 0) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_steer_control_vector(steer, &vector, data, 5) == DETOX_INVALID_ARGUMENT);
    EXPECT(vector.len == 0);
    EXPECT(detox_steer_control_vector(steer, &vector, NULL, 0) == DETOX_OK);
    EXPECT(vector.len == N_EMBD * (N_LAYER - 1) && vector.n_embd == N_EMBD && vector.is_whole);
    EXPECT(vector.il_start == 1 && vector.il_end == N_LAYER - 1 && vector.size == sizeof vector);
    EXPECT(detox_steer_control_vector(steer, &vector, data, vector.len) == DETOX_OK);
    vector.size = 8;
    EXPECT(detox_steer_control_vector(steer, &vector, data, vector.len) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_set_coefficient(steer, INFINITY) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_set_coefficient(steer, 0.0f) == DETOX_OK);
    EXPECT(detox_get_coefficient(steer, &coefficient) == DETOX_OK && coefficient == 0.0f);
    EXPECT(detox_get_coefficient(steer, NULL) == DETOX_INVALID_ARGUMENT);
    vector.size = sizeof vector;
    EXPECT(detox_steer_control_vector(steer, &vector, NULL, 0) == DETOX_OK && vector.len == 0);

    /* What a control vector does is for all sequences. */
    detox_callback *callback = NULL;
    detox_host_table table = fake_table();
    EXPECT(detox_set_coefficient(steer, 1.0f) == DETOX_OK);
    EXPECT(detox_steer_callback(steer, &table, NULL, &callback) == DETOX_OK);
    EXPECT(detox_set_sequence(callback, 0, false) == DETOX_REFUSED);
    EXPECT(strstr(detox_last_error(), "\nhint: ") != NULL);
    EXPECT(detox_gate_set(callback, file, NULL) == DETOX_REFUSED);
    EXPECT(detox_callback_free(callback) == DETOX_OK);

    EXPECT(detox_steer_free(steer) == DETOX_OK);
    EXPECT(detox_steer_free(steer) == DETOX_INVALID_HANDLE);
    EXPECT(detox_set_coefficient(steer, 1.0f) == DETOX_INVALID_HANDLE);
    EXPECT(detox_steer_control_vector(steer, &vector, NULL, 0) == DETOX_INVALID_HANDLE);
    EXPECT(detox_steer_callback(steer, &table, NULL, &callback) == DETOX_INVALID_HANDLE);
    EXPECT(detox_set_coefficient((detox_steer *) (void *) data, 1.0f) == DETOX_INVALID_HANDLE);
    EXPECT(detox_set_coefficient(NULL, 1.0f) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_steer_free(NULL) == DETOX_OK);
}

static void use_callback(const char *model, const char *file, const char *probe) {
    detox_steer *steer = NULL;
    detox_callback *callback = NULL;
    detox_steer_options options = DETOX_STEER_OPTIONS_INIT;
    options.route = DETOX_ROUTE_CALLBACK;
    EXPECT(detox_steer_load(model, file, &options, &steer) == DETOX_OK);

    detox_host_table table = fake_table();
    EXPECT(detox_steer_callback(steer, NULL, NULL, &callback) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_steer_callback(steer, &table, NULL, NULL) == DETOX_INVALID_ARGUMENT);
    table.get = NULL;
    EXPECT(detox_steer_callback(steer, &table, NULL, &callback) == DETOX_INVALID_ARGUMENT);
    EXPECT(strstr(detox_last_error(), "get") != NULL);
    table = fake_table();
    table.size = sizeof(size_t);
    EXPECT(detox_steer_callback(steer, &table, NULL, &callback) == DETOX_INVALID_ARGUMENT);
    table = fake_table();
    detox_callback_options context = DETOX_CALLBACK_OPTIONS_INIT;
    context.n_seq_max = 0;
    EXPECT(detox_steer_callback(steer, &table, &context, &callback) == DETOX_INVALID_ARGUMENT);
    context.n_seq_max = 4000000000u;
    EXPECT(detox_steer_callback(steer, &table, &context, &callback) == DETOX_INVALID_ARGUMENT);
    EXPECT(callback == NULL);

    /* One sequence, nothing announced. The steer may be freed first. */
    EXPECT(detox_steer_callback(steer, &table, NULL, &callback) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_check(callback) == DETOX_OK);
    EXPECT(detox_set_coefficient(steer, 0.5f) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 2.5f);
    EXPECT(detox_set_coefficient(steer, 0.0f) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 1.0f);
    EXPECT(detox_set_coefficient(steer, 1.0f) == DETOX_OK);
    EXPECT(detox_set_sequence(callback, 0, false) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 1.0f);
    EXPECT(detox_set_sequence(callback, 0, true) == DETOX_OK);
    EXPECT(detox_steer_free(steer) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_check(callback) == DETOX_OK);

    /* A graph without the node: told once, and then all is well again. */
    compute_graph(callback, false);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(strstr(detox_last_error(), " edits were made") != NULL);
    EXPECT(detox_check(callback) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_check(callback) == DETOX_OK);
    /* A graph whose beginning is not seen. */
    struct ggml_tensor early = fake_matrix("ffn_swiglu-0", values, WIDTH, N_ROWS);
    EXPECT(detox_batch(callback, N_ROWS, NULL, NULL, NULL) == DETOX_OK);
    fake_compute(callback, &early);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(strstr(detox_last_error(), "before a micro-batch") != NULL);
    /* A node of another form. */
    struct ggml_tensor embedding = fake_matrix("embd", values, N_EMBD, N_ROWS);
    struct ggml_tensor narrow = fake_matrix("ffn_swiglu-0", values, 3, N_ROWS);
    fake_compute(callback, &embedding);
    EXPECT(fake_compute(callback, &narrow));
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    struct ggml_tensor half = fake_matrix("ffn_swiglu-0", values, WIDTH, N_ROWS);
    half.type = 1;
    fake_compute(callback, &embedding);
    EXPECT(fake_compute(callback, &half));
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    struct ggml_tensor rows = fake_matrix("ffn_swiglu-0", values, WIDTH, N_ROWS + 1);
    fake_compute(callback, &embedding);
    EXPECT(fake_compute(callback, &rows));
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(detox_check(callback) == DETOX_OK);

    /* Announcements. */
    int32_t sequences[N_ROWS] = {0, 0};
    int8_t flags[N_ROWS] = {0, 1};
    EXPECT(detox_batch(callback, N_ROWS, sequences, flags, flags) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_check(callback) == DETOX_OK);
    EXPECT(detox_batch(callback, N_ROWS, NULL, NULL, NULL) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_batch(callback, 1, NULL, NULL, NULL) == DETOX_OK);
    compute_graph(callback, true);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    sequences[1] = 1;
    EXPECT(detox_batch(callback, N_ROWS, sequences, flags, flags) == DETOX_INVALID_ARGUMENT);
    sequences[1] = -1;
    EXPECT(detox_batch(callback, N_ROWS, sequences, flags, flags) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_batch(callback, SIZE_MAX, sequences, flags, flags) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_batch(callback, 0x7fffffff, NULL, NULL, NULL) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_set_sequence(callback, 1, false) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_set_sequence(callback, -1, false) == DETOX_INVALID_ARGUMENT);

    /* Gates. */
    double probability = 0.0;
    bool is_open = false;
    EXPECT(detox_gate_state(callback, 0, &probability, &is_open) == DETOX_REFUSED);
    EXPECT(detox_gate_reset(callback, 0) == DETOX_REFUSED);
    EXPECT(detox_gate_set(callback, NULL, NULL) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_gate_set(callback, file, NULL) == DETOX_INVALID_FILE);
    detox_gate_options gate = DETOX_GATE_OPTIONS_INIT;
    gate.threshold = 2.0;
    EXPECT(detox_gate_set(callback, probe, &gate) == DETOX_INVALID_ARGUMENT);
    gate.threshold = 0.0;
    EXPECT(detox_gate_set(callback, probe, &gate) == DETOX_OK);
    EXPECT(detox_gate_state(callback, 0, &probability, &is_open) == DETOX_OK && probability == -1.0 && !is_open);
    EXPECT(compute_graph(callback, true) == 1.0f);
    EXPECT(detox_gate_state(callback, 0, &probability, NULL) == DETOX_OK && probability > 0.0);
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_gate_set_threshold(callback, 1.0) == DETOX_OK);
    EXPECT(detox_gate_set_threshold(callback, NAN) == DETOX_INVALID_ARGUMENT);
    EXPECT(compute_graph(callback, true) == 1.0f);
    EXPECT(detox_gate_set_threshold(callback, 0.0) == DETOX_OK);
    EXPECT(detox_gate_reset(callback, 0) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 1.0f);
    EXPECT(detox_gate_state(callback, 9, &probability, &is_open) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_gate_remove(callback) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_check(callback) == DETOX_OK);

    /* A gate that is set, and one that is removed, within a decode: from the next micro-batch on. */
    for (int i = 0; i < 2; i++) {
        struct ggml_tensor neurons = fake_matrix("ffn_swiglu-0", values, WIDTH, N_ROWS);
        struct ggml_tensor output = fake_matrix("l_out-1", values, N_EMBD, N_ROWS);
        fake_compute(callback, &embedding);
        gate.threshold = 0.0;
        EXPECT((i == 0 ? detox_gate_set(callback, probe, &gate) : detox_gate_remove(callback)) == DETOX_OK);
        fake_compute(callback, &neurons);
        fake_compute(callback, &output);
        EXPECT(detox_check(callback) == DETOX_OK);
    }
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_check(callback) == DETOX_OK);

    /* Freed, and of another kind. llama.cpp goes on without it. */
    EXPECT(detox_steer_free((detox_steer *) callback) == DETOX_INVALID_HANDLE);
    EXPECT(detox_callback_free(callback) == DETOX_OK);
    EXPECT(detox_callback_free(callback) == DETOX_INVALID_HANDLE);
    EXPECT(compute_graph(callback, true) == 1.0f);
    EXPECT(!detox_eval_callback(&embedding, true, callback));
    EXPECT(detox_eval_callback(&embedding, false, callback));
    EXPECT(!detox_eval_callback(&embedding, true, NULL));
    EXPECT(!detox_eval_callback(NULL, true, &embedding));
    EXPECT(detox_check(callback) == DETOX_INVALID_HANDLE);
    EXPECT(detox_check(NULL) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_batch(callback, 0, NULL, NULL, NULL) == DETOX_INVALID_HANDLE);
    EXPECT(detox_callback_free(NULL) == DETOX_OK);
}

/* Sequences that differ, in contexts that tell them apart and in ones that cannot. */
static void use_sequences(const char *model, const char *file) {
    detox_steer *steer = NULL;
    detox_callback *callback = NULL;
    detox_steer_options options = DETOX_STEER_OPTIONS_INIT;
    options.route = DETOX_ROUTE_CALLBACK;
    detox_host_table table = fake_table();
    detox_callback_options context = DETOX_CALLBACK_OPTIONS_INIT;
    context.n_seq_max = 2;
    context.kv_unified = true;
    int32_t sequences[N_ROWS] = {1, 0};
    EXPECT(detox_steer_load(model, file, &options, &steer) == DETOX_OK);
    EXPECT(detox_steer_callback(steer, &table, &context, &callback) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_set_sequence(callback, 0, false) == DETOX_OK);
    EXPECT(detox_batch(callback, N_ROWS, sequences, NULL, NULL) == DETOX_OK);
    /* The last row is sequence 0's. */
    EXPECT(compute_graph(callback, true) == 1.0f);
    EXPECT(detox_check(callback) == DETOX_OK);
    compute_graph(callback, true);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(strstr(detox_last_error(), "nobody announced the batch") != NULL);
    EXPECT(detox_callback_free(callback) == DETOX_OK);

    /* With a stream each, and without the functions that tell them apart. */
    table.size = offsetof(detox_host_table, op);
    context.kv_unified = false;
    EXPECT(detox_steer_callback(steer, &table, &context, &callback) == DETOX_OK);
    EXPECT(detox_batch(callback, N_ROWS, sequences, NULL, NULL) == DETOX_REFUSED);
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_check(callback) == DETOX_OK);
    EXPECT(detox_callback_free(callback) == DETOX_OK);
    EXPECT(detox_steer_free(steer) == DETOX_OK);
}

static void use_score(void) {
    double benign = -1.0, rude = -1.0;
    EXPECT(detox_score("what a lovely day in the garden", "en", &benign) == DETOX_OK && benign >= 0.0);
    EXPECT(detox_score("shut up, you stupid fool", "en", &rude) == DETOX_OK && rude <= 1.0);
    EXPECT(rude > benign);
    EXPECT(detox_score("", NULL, &benign) == DETOX_OK && benign == 0.0);
    EXPECT(detox_score(NULL, "en", &benign) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_score("hello", "en", NULL) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_score("\xff\xfe", "en", &benign) == DETOX_INVALID_ARGUMENT);
    EXPECT(detox_score("hello", "xx", &benign) == DETOX_UNSUPPORTED);
    EXPECT(benign == 0.0);
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    EXPECT(detox_abi_version() == DETOX_ABI_VERSION);
    EXPECT(strncmp(detox_version(), "0.", 2) == 0);
    EXPECT(strcmp(detox_last_error(), "") == 0);
    use_steer(argv[1], argv[2], argv[3], argv[5]);
    use_callback(argv[1], argv[2], argv[4]);
    use_sequences(argv[1], argv[2]);
    use_score();
    return n_wrong > 0;
}

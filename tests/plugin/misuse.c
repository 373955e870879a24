/*
 * Calls every function of the plugin with every detectable misuse, and correctly in between.
 *
 *     misuse MODEL STEER CONTROL_VECTOR PROBE NOT_A_FILE
 *
 * STEER assigns 4 to neuron 5 of layer 0; MODEL is gguf/tiny/llama.gguf.
 */
#define _POSIX_C_SOURCE 200809L
#include "fake_host.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

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

/* Computes a graph like the tiny llama's with all values 1. Returns neuron 5 of layer 0 in the last row. */
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

    /* A control vector steers all sequences. It cannot be switched off for one of them. */
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

    /* One sequence, no announced batches. The steer may be freed before the callback. */
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

    /* A graph without the steered node: reported once, then everything works again. */
    compute_graph(callback, false);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(strstr(detox_last_error(), " edits were made") != NULL);
    EXPECT(detox_check(callback) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_check(callback) == DETOX_OK);
    /* A graph with unknown names, and no graph at all. */
    struct ggml_tensor renamed = fake_matrix("renamed", values, WIDTH, N_ROWS);
    fake_compute(callback, &renamed);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(strstr(detox_last_error(), "no micro-batch was seen to start") != NULL);
    EXPECT(detox_check(callback) == DETOX_OK);
    EXPECT(detox_batch(callback, N_ROWS, NULL, NULL, NULL) == DETOX_OK);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(strstr(detox_last_error(), "is cb_eval set?") != NULL);
    EXPECT(detox_check(callback) == DETOX_OK);
    /* A decode that was not checked before the next batch was announced. */
    compute_graph(callback, false);
    EXPECT(detox_batch(callback, N_ROWS, NULL, NULL, NULL) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 1.0f);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(strstr(detox_last_error(), " edits were made") != NULL);
    /* A batch that llama_decode refused, followed by a smaller one. */
    EXPECT(detox_batch(callback, N_ROWS + 1, NULL, NULL, NULL) == DETOX_OK);
    EXPECT(detox_batch(callback, N_ROWS, NULL, NULL, NULL) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 4.0f);
    EXPECT(detox_check(callback) == DETOX_OK);
    /* Absurd extents. */
    struct ggml_tensor endless = fake_matrix("embd", values, N_EMBD, 1000000000000);
    fake_compute(callback, &endless);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    struct ggml_tensor first = fake_matrix("embd", values, N_EMBD, 1);
    struct ggml_tensor wide = fake_matrix("ffn_swiglu-0", values, 1000000000000, 1);
    fake_compute(callback, &first);
    EXPECT(fake_compute(callback, &wide));
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(strstr(detox_last_error(), "cannot allocate") != NULL);
    /* A graph without its first node. */
    struct ggml_tensor early = fake_matrix("ffn_swiglu-0", values, WIDTH, N_ROWS);
    EXPECT(detox_batch(callback, N_ROWS, NULL, NULL, NULL) == DETOX_OK);
    fake_compute(callback, &early);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(strstr(detox_last_error(), "before a micro-batch") != NULL);
    /* Nodes of the wrong width, type and number of rows. */
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

    /* Setting or removing a gate during a decode takes effect from the next micro-batch. */
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

    /* Freed handles, and handles of the wrong kind. llama.cpp continues unsteered. */
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

static int n_next;

/* A callback of the program's own that requests no node. */
static bool never(struct ggml_tensor *tensor, bool ask, void *user_data) {
    (void) tensor;
    (void) user_data;
    n_next++;
    return !ask;
}

static detox_callback *reentered;
static int n_refused;

static void shape_and_more(const struct ggml_tensor *tensor, detox_shape *shape) {
    n_refused = (detox_gate_state(reentered, 0, NULL, NULL) == DETOX_REFUSED) +
                (detox_gate_set_threshold(reentered, 0.5) == DETOX_REFUSED) +
                (detox_gate_remove(reentered) == DETOX_REFUSED) + (detox_check(reentered) == DETOX_REFUSED) +
                (detox_batch(reentered, 1, NULL, NULL, NULL) == DETOX_REFUSED) +
                (detox_callback_free(reentered) == DETOX_REFUSED);
    fake_shape(tensor, shape);
}

static bool free_and_more(struct ggml_tensor *tensor, bool ask, void *user_data) {
    (void) tensor;
    (void) user_data;
    n_refused = (detox_callback_free(reentered) == DETOX_REFUSED) &&
                (detox_gate_set_threshold(reentered, 0.5) == DETOX_REFUSED) &&
                (strstr(detox_last_error(), "this callback has none") != NULL);
    return !ask;
}

static atomic_bool is_in_use;

static bool slowly(struct ggml_tensor *tensor, bool ask, void *is_running) {
    (void) tensor;
    atomic_store((atomic_bool *) is_running, true);
    struct timespec while_another_frees = {0, 50000000};
    nanosleep(&while_another_frees, NULL);
    atomic_store((atomic_bool *) is_running, false);
    return !ask;
}

static void *evaluate(void *callback) {
    struct ggml_tensor node = fake_matrix("x", values, N_EMBD, 1);
    detox_eval_callback(&node, true, callback);
    return NULL;
}

/* Steers sequences differently, in contexts that can tell sequences apart and in contexts that cannot. */
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
    /* The last row belongs to sequence 0. */
    EXPECT(compute_graph(callback, true) == 1.0f);
    EXPECT(detox_check(callback) == DETOX_OK);
    compute_graph(callback, true);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(strstr(detox_last_error(), "the batch was not announced") != NULL);
    /* An announced batch whose last token is never decoded. It must not count for the next batch. */
    int32_t longer[N_ROWS + 1] = {1, 0, 1};
    EXPECT(detox_batch(callback, N_ROWS + 1, longer, NULL, NULL) == DETOX_OK);
    compute_graph(callback, true);
    EXPECT(detox_check(callback) == DETOX_NOT_STEERED);
    EXPECT(strstr(detox_last_error(), "1 of the 3 tokens announced were not decoded") != NULL);
    EXPECT(detox_batch(callback, N_ROWS, sequences, NULL, NULL) == DETOX_OK);
    EXPECT(compute_graph(callback, true) == 1.0f);
    EXPECT(detox_check(callback) == DETOX_OK);
    EXPECT(detox_callback_free(callback) == DETOX_OK);

    /* The table's functions run under a lock. Calls from there that need the lock, or would wait for it, are refused. */
    struct ggml_tensor row = fake_matrix("embd", values, N_EMBD, N_ROWS);
    table.shape = shape_and_more;
    EXPECT(detox_steer_callback(steer, &table, &context, &callback) == DETOX_OK);
    reentered = callback;
    n_refused = 0;
    fake_compute(callback, &row);
    EXPECT(n_refused == 6);
    EXPECT(detox_set_sequence(callback, 0, true) == DETOX_OK);
    EXPECT(detox_callback_free(callback) == DETOX_OK);
    table.shape = fake_shape;
    /* The program's own callback runs outside the lock. It may not free the callback that called it. */
    context.next = free_and_more;
    EXPECT(detox_steer_callback(steer, &table, &context, &callback) == DETOX_OK);
    reentered = callback;
    n_refused = 0;
    fake_compute(callback, &row);
    EXPECT(n_refused == 1);
    EXPECT(detox_callback_free(callback) == DETOX_OK);
    /* Freeing waits while another thread is in that callback. */
    pthread_t thread;
    context.next = slowly;
    context.next_user_data = &is_in_use;
    EXPECT(detox_steer_callback(steer, &table, &context, &callback) == DETOX_OK);
    EXPECT(pthread_create(&thread, NULL, evaluate, callback) == 0);
    while (!atomic_load(&is_in_use)) sched_yield();
    EXPECT(detox_callback_free(callback) == DETOX_OK);
    EXPECT(!atomic_load(&is_in_use));
    EXPECT(pthread_join(thread, NULL) == 0);
    context.next = NULL;
    context.next_user_data = NULL;

    /* A size that ends within a member of the table or of the options: that member counts as absent. */
    for (size_t size = offsetof(detox_host_table, op); size < sizeof table; size++) {
        table.size = size;
        context.size = sizeof context;
        EXPECT(detox_steer_callback(steer, &table, &context, &callback) == DETOX_OK);
        EXPECT(compute_graph(callback, true) == 4.0f);
        EXPECT(detox_callback_free(callback) == DETOX_OK);
    }
    table.size = sizeof table;
    context.next = never;
    for (size_t size = offsetof(detox_callback_options, next); size < sizeof context; size++) {
        context.size = size;
        bool has_next = size >= offsetof(detox_callback_options, next_user_data);
        n_next = 0;
        EXPECT(detox_steer_callback(steer, &table, &context, &callback) == DETOX_OK);
        EXPECT(compute_graph(callback, true) == 4.0f);
        EXPECT((n_next > 0) == has_next);
        EXPECT(detox_callback_free(callback) == DETOX_OK);
    }
    context.size = sizeof context;
    context.next = NULL;

    /* One stream per sequence, but without the functions needed to tell them apart. */
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

/*
 * Measures the callback's overhead when steering is off (coefficient 0):
 *
 *     ask MODEL STEER ROUNDS
 *
 * Asks the callback about every node of a graph like llama.cpp's, ROUNDS times, and prints the best time per node in
 * nanoseconds. To count instructions, run it under `valgrind --tool=cachegrind --cache-sim=no` with two numbers of rounds
 * and take the difference.
 */
#define _POSIX_C_SOURCE 200809L
#include "fake_host.h"

#include <stdio.h>
#include <time.h>

enum { N_LAYERS = 30, N_NAMES = 22, N_NODES = N_LAYERS * N_NAMES + 2 };

static const char *const names[N_NAMES] = {
    "attn_norm-%d", "Qcur-%d", "Qcur-%d (reshaped)", "Qcur-%d", "Kcur-%d", "Kcur-%d", "Vcur-%d", "cache_k_l%d (view)",
    "cache_v_l%d (view)", "kq-%d", "kq_soft_max-%d", "kqv-%d", "kqv_out-%d", "attn_out-%d", "ffn_inp-%d", "ffn_norm-%d",
    "ffn_gate-%d", "ffn_up-%d", "ffn_swiglu-%d", "ffn_out-%d", "l_out-%d", "node_%d (permuted)"};

static struct ggml_tensor nodes[N_NODES];

static double now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e9 * (double) now.tv_sec + (double) now.tv_nsec;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    static float values[64];
    nodes[0] = fake_matrix("embd", values, 64, 1);
    for (int i = 1; i < N_NODES - 1; i++) {
        char name[64];
        snprintf(name, sizeof name, names[(i - 1) % N_NAMES], (i - 1) / N_NAMES);
        nodes[i] = fake_matrix(name, values, 64, 1);
    }
    nodes[N_NODES - 1] = fake_matrix("result_norm", values, 64, 1);

    detox_steer *steer = NULL;
    detox_callback *callback = NULL;
    detox_host_table table = fake_table();
    detox_steer_options options = DETOX_STEER_OPTIONS_INIT;
    options.route = DETOX_ROUTE_CALLBACK;
    options.coefficient = 0.0f;
    if (detox_steer_load(argv[1], argv[2], &options, &steer) != DETOX_OK ||
        detox_steer_callback(steer, &table, NULL, &callback) != DETOX_OK) {
        fprintf(stderr, "error: %s\n", detox_last_error());
        return 1;
    }
    double best = 0.0;
    for (int round = 0; round < atoi(argv[3]); round++) {
        double start = now_ns();
        for (int i = 0; i < N_NODES; i++) {
            if (detox_eval_callback(&nodes[i], true, callback)) return 3;
        }
        double taken = now_ns() - start;
        if (round == 0 || taken < best) best = taken;
        if (detox_check(callback) != DETOX_OK) return 4;
    }
    printf("%.1f\n", best / N_NODES);
    detox_callback_free(callback);
    detox_steer_free(steer);
    return 0;
}

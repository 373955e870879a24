/*
 * Steers a model in a program over llama.h and prints the results as JSON. Tokens are passed as numbers, so that results
 * can be compared with other programs.
 *
 *     steer -m MODEL -t 1,60,70 [--steer FILE] [options]
 *
 *     --steer FILE          an intervention file or a control vector
 *     --coefficient C       a factor for the file's coefficients (1)
 *     --callback            use the callback for everything, and no control vector
 *     --force               allow a file made for another quantisation of the model
 *     --sequences N         decode the tokens in N sequences of one batch (1); prints the last logits of each
 *     --off S               do not steer sequence S
 *     --unified             one KV stream for all sequences
 *     --ubatch N            tokens computed at once (512)
 *     --gate PROBE T        steer only while the probe's probability is at least T
 *     -n N                  generate N more tokens greedily; prints them, with the gate's probability before each
 *     --apart               give each sequence another text: sequence S gets the tokens from number S on, followed by
 *                           those before it. -n then continues each sequence separately and prints, step by step, the
 *                           tokens of all sequences
 *     --as-prompt, --as-generated   announce the tokens as prompt or as generated
 *     --count               chain a callback of this program, which counts the blocks it sees
 *     --race N              decode N times while another thread switches the coefficient between 0 and C
 *
 * overhead.c in this folder measures the cost. Build it with any llama.cpp:
 *     cc -I <llama.cpp>/include -I <detox_gguf>/include steer.c -ldetox_gguf -lllama -lggml -lggml-base -lpthread -lm
 */
#define DETOX_WITH_GGML
#include "detox_gguf.h"
#include "llama.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TOKENS = 4096 };

static struct {
    const char *model, *steer, *probe;
    llama_token tokens[MOST_TOKENS];
    int n_tokens, n_sequences, off, n_predict, n_race, n_ubatch, generated;
    float coefficient;
    double threshold;
    bool callback, force, unified, count, apart;
} args = {.n_sequences = 1, .off = -1, .coefficient = 1.0f, .n_ubatch = 512, .generated = -1};

static void stop(const char *what) {
    fprintf(stderr, "error: %s\n", what);
    exit(1);
}

/* Exits with the library's message if a call failed. */
static void must(detox_status status) {
    if (status != DETOX_OK) {
        fprintf(stderr, "error (status %d): %s\n", (int) status, detox_last_error());
        exit(1);
    }
}

/* Parses a whole number of at least `least`; nothing may follow it. */
static int number(const char *flag, const char *value, int least) {
    char *end;
    long found = strtol(value, &end, 10);
    if (end == value || *end != '\0' || found < least || found > 1000000) {
        fprintf(stderr, "error: %s: expected a number from %d to 1000000, found %s\n", flag, least, value);
        exit(1);
    }
    return (int) found;
}

static double decimal(const char *flag, const char *value) {
    char *end;
    double found = strtod(value, &end);
    if (end == value || *end != '\0') {
        fprintf(stderr, "error: %s: expected a number, found %s\n", flag, value);
        exit(1);
    }
    return found;
}

static void parse(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *flag = argv[i];
        bool is_last = i + 1 == argc;
        if (strcmp(flag, "--callback") == 0) { args.callback = true; continue; }
        if (strcmp(flag, "--force") == 0) { args.force = true; continue; }
        if (strcmp(flag, "--unified") == 0) { args.unified = true; continue; }
        if (strcmp(flag, "--apart") == 0) { args.apart = true; continue; }
        if (strcmp(flag, "--count") == 0) { args.count = true; continue; }
        if (strcmp(flag, "--as-prompt") == 0) { args.generated = 0; continue; }
        if (strcmp(flag, "--as-generated") == 0) { args.generated = 1; continue; }
        if (is_last) stop("unknown flag, or a flag without its value");
        char *value = argv[++i];
        if (strcmp(flag, "-m") == 0) args.model = value;
        else if (strcmp(flag, "--steer") == 0) args.steer = value;
        else if (strcmp(flag, "--coefficient") == 0) args.coefficient = (float) decimal(flag, value);
        else if (strcmp(flag, "--sequences") == 0) args.n_sequences = number(flag, value, 1);
        else if (strcmp(flag, "--off") == 0) args.off = number(flag, value, 0);
        else if (strcmp(flag, "--ubatch") == 0) args.n_ubatch = number(flag, value, 1);
        else if (strcmp(flag, "-n") == 0) args.n_predict = number(flag, value, 0);
        else if (strcmp(flag, "--race") == 0) args.n_race = number(flag, value, 1);
        else if (strcmp(flag, "--gate") == 0 && i + 1 < argc) {
            args.probe = value;
            args.threshold = decimal(flag, argv[++i]);
        } else if (strcmp(flag, "-t") == 0) {
            for (char *token = strtok(value, ","); token != NULL; token = strtok(NULL, ",")) {
                if (args.n_tokens == MOST_TOKENS) stop("-t: too many tokens");
                args.tokens[args.n_tokens++] = number(flag, token, 0);
            }
        } else stop("unknown flag");
    }
    if (args.model == NULL || args.n_tokens == 0) stop("expected -m MODEL and -t TOKEN,TOKEN,...");
}

static void quiet(enum ggml_log_level level, const char *text, void *user_data) {
    (void) user_data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

/* A callback of the program's own, to show that both work together: counts the blocks of each decode. */
static bool count_blocks(struct ggml_tensor *tensor, bool ask, void *n_blocks) {
    bool is_block = strncmp(ggml_get_name(tensor), "l_out-", 6) == 0;
    if (!ask && is_block) ++*(int *) n_blocks;
    return ask ? is_block : true;
}

static int n_blocks;

static struct llama_context *open_context(struct llama_model *model, detox_callback *callback) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = (uint32_t) (args.n_sequences * 256 * (1 + (args.n_tokens + args.n_predict) / 256));
    params.n_batch = params.n_ctx;
    params.n_ubatch = (uint32_t) args.n_ubatch;
    params.n_seq_max = (uint32_t) args.n_sequences;
    params.kv_unified = args.unified;
    /* Exact settings, so that comparisons show steering and not rounding. */
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    if (callback != NULL) {
        params.cb_eval = detox_eval_callback;
        params.cb_eval_user_data = callback;
    } else if (args.count) {
        params.cb_eval = count_blocks;
        params.cb_eval_user_data = &n_blocks;
    }
    struct llama_context *context = llama_init_from_model(model, params);
    if (context == NULL) stop("llama.cpp could not create a context");
    return context;
}

static void set_control_vector(struct llama_context *context, detox_steer *steer) {
    detox_control_vector vector = DETOX_CONTROL_VECTOR_INIT;
    must(detox_steer_control_vector(steer, &vector, NULL, 0));
    float *data = malloc((vector.len + 1) * sizeof *data);
    must(detox_steer_control_vector(steer, &vector, data, vector.len));
    if (llama_set_adapter_cvec(context, vector.len > 0 ? data : NULL, vector.len, vector.n_embd, vector.il_start,
                               vector.il_end) != 0) {
        stop("llama.cpp refused the control vector");
    }
    free(data);
}

/* Decodes `n` tokens in every sequence, starting at `position`, with the logits of each sequence's last token. With
 * --apart, sequence S starts at token S of the `n` and wraps around; if `n` is 1, `tokens` has one token per sequence. */
static void decode(struct llama_context *context, detox_callback *callback, const llama_token *tokens, int n,
                   int position, bool is_announced, int generated) {
    int n_all = n * args.n_sequences;
    struct llama_batch batch = llama_batch_init(n_all, 0, 1);
    int32_t *sequences = malloc((size_t) n_all * sizeof *sequences);
    int8_t *phases = malloc((size_t) n_all);
    for (int i = 0; i < n; i++) {
        for (int s = 0; s < args.n_sequences; s++) {
            int at = batch.n_tokens++;
            batch.token[at] = !args.apart ? tokens[i] : n > 1 ? tokens[(i + s) % n] : tokens[s];
            batch.pos[at] = position + i;
            batch.n_seq_id[at] = 1;
            batch.seq_id[at][0] = sequences[at] = s;
            batch.logits[at] = i + 1 == n;
            phases[at] = generated == 1;
        }
    }
    if (callback != NULL && is_announced) {
        must(detox_batch(callback, (size_t) n_all, sequences, batch.logits, generated < 0 ? NULL : phases));
    }
    if (llama_decode(context, batch) != 0) stop("llama_decode failed");
    if (callback != NULL) must(detox_check(callback));
    llama_batch_free(batch);
    free(sequences);
    free(phases);
}

/* The logits of the last token of a sequence. */
static const float *logits_of(struct llama_context *context, int n, int sequence) {
    return llama_get_logits_ith(context, (n - 1) * args.n_sequences + sequence);
}

static void print_row(const float *row, int n) {
    printf("[");
    for (int i = 0; i < n; i++) printf("%s%.9g", i > 0 ? "," : "", (double) row[i]);
    printf("]");
}

static atomic_bool race_is_over;

static void *change_coefficient(void *steer) {
    while (!atomic_load(&race_is_over)) {
        must(detox_set_coefficient(steer, args.coefficient));
        must(detox_set_coefficient(steer, 0.0f));
    }
    return NULL;
}

/* Checks that each micro-batch is steered entirely or not at all. */
static void race(struct llama_context *context, detox_steer *steer, detox_callback *callback, int n_vocab) {
    float *expected[2];
    for (int i = 0; i < 2; i++) {
        must(detox_set_coefficient(steer, i == 0 ? 0.0f : args.coefficient));
        llama_memory_clear(llama_get_memory(context), true);
        decode(context, callback, args.tokens, args.n_tokens, 0, false, -1);
        expected[i] = malloc((size_t) n_vocab * sizeof(float));
        memcpy(expected[i], logits_of(context, args.n_tokens, 0), (size_t) n_vocab * sizeof(float));
    }
    pthread_t thread;
    if (pthread_create(&thread, NULL, change_coefficient, steer) != 0) stop("could not start a thread");
    int n[3] = {0, 0, 0};
    for (int i = 0; i < args.n_race; i++) {
        llama_memory_clear(llama_get_memory(context), true);
        decode(context, callback, args.tokens, args.n_tokens, 0, false, -1);
        const float *row = logits_of(context, args.n_tokens, 0);
        int which = 2;
        for (int j = 0; j < 2; j++) {
            if (memcmp(row, expected[j], (size_t) n_vocab * sizeof(float)) == 0) which = j;
        }
        n[which]++;
    }
    atomic_store(&race_is_over, true);
    pthread_join(thread, NULL);
    free(expected[0]);
    free(expected[1]);
    printf("{\"plain\": %d, \"steered\": %d, \"neither\": %d}\n", n[0], n[1], n[2]);
}

int main(int argc, char **argv) {
    parse(argc, argv);
    if (detox_abi_version() != DETOX_ABI_VERSION) stop("the library's version does not match this program's header");
    llama_log_set(quiet, NULL);
    llama_backend_init();

    detox_steer *steer = NULL;
    detox_callback *callback = NULL;
    if (args.steer != NULL) {
        detox_steer_options options = DETOX_STEER_OPTIONS_INIT;
        options.coefficient = args.coefficient;
        options.route = args.callback ? DETOX_ROUTE_CALLBACK : DETOX_ROUTE_CHEAPEST;
        options.force = args.force;
        must(detox_steer_load(args.model, args.steer, &options, &steer));

        detox_host_table table = detox_ggml_host_table();
        detox_callback_options context_options = DETOX_CALLBACK_OPTIONS_INIT;
        context_options.n_seq_max = (uint32_t) args.n_sequences;
        context_options.kv_unified = args.unified;
        context_options.next = args.count ? count_blocks : NULL;
        context_options.next_user_data = &n_blocks;
        must(detox_steer_callback(steer, &table, &context_options, &callback));
        if (args.probe != NULL) {
            detox_gate_options gate = DETOX_GATE_OPTIONS_INIT;
            gate.threshold = args.threshold;
            must(detox_gate_set(callback, args.probe, &gate));
        }
        if (args.off >= 0) must(detox_set_sequence(callback, args.off, false));
    }

    struct llama_model *model = llama_model_load_from_file(args.model, llama_model_default_params());
    if (model == NULL) stop("llama.cpp could not load the model");
    int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    struct llama_context *context = open_context(model, callback);
    if (steer != NULL) set_control_vector(context, steer);

    /* If all sequences, prompts and generated tokens are steered alike, no announcement is needed. */
    bool is_announced = args.off >= 0 || (args.probe != NULL && args.n_sequences > 1) || args.generated >= 0;
    if (args.n_race > 0) {
        race(context, steer, callback, n_vocab);
    } else {
        decode(context, callback, args.tokens, args.n_tokens, 0, is_announced, args.generated);
        printf("{\"logits\": [");
        for (int s = 0; s < args.n_sequences; s++) {
            if (s > 0) printf(",\n");
            print_row(logits_of(context, args.n_tokens, s), n_vocab);
        }
        printf("],\n\"n_blocks\": %d,\n\"generated\": [", n_blocks);
        struct { llama_token token; double probability; bool is_open; } *steps;
        int n_shown = args.apart ? args.n_sequences : 1;
        steps = calloc((size_t) n_shown, sizeof *steps);
        llama_token *next = calloc((size_t) n_shown, sizeof *next);
        for (int i = 0; i < args.n_predict; i++) {
            for (int s = 0; s < n_shown; s++) {
                const float *row = logits_of(context, i == 0 ? args.n_tokens : 1, s);
                next[s] = 0;
                for (int t = 1; t < n_vocab; t++) next[s] = row[t] > row[next[s]] ? t : next[s];
                steps[s].token = next[s];
                steps[s].probability = -1.0;
                steps[s].is_open = steer != NULL;
                if (args.probe != NULL) must(detox_gate_state(callback, s, &steps[s].probability, &steps[s].is_open));
            }
            decode(context, callback, next, 1, args.n_tokens + i, is_announced, args.generated < 0 ? -1 : 1);
            for (int s = 0; s < n_shown; s++) {
                printf("%s{\"token\": %d, \"probability\": %.17g, \"is_open\": %s, \"logits\": ", i + s > 0 ? ",\n" : "",
                       steps[s].token, steps[s].probability, steps[s].is_open ? "true" : "false");
                print_row(logits_of(context, 1, s), n_vocab);
                printf("}");
            }
        }
        free(steps);
        free(next);
        printf("]}\n");
    }

    /* In any order: a context continues unsteered after its callback is freed. */
    llama_free(context);
    llama_model_free(model);
    must(detox_callback_free(callback));
    must(detox_steer_free(steer));
    llama_backend_free();
    return 0;
}

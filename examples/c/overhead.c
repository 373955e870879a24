/*
 * Measures the cost of steering: decodes the same tokens with several contexts over one model, in turn and in a new order
 * each time, and compares each context's time for a token with the time of two unsteered contexts for the same token.
 *
 *     overhead -m MODEL -t 1,60,70 --steer FILE [--tokens N] [--threads N] [--pool] [--cpu] [--force] [--only NAME]
 *
 *     -t                the prompt, whose tokens are decoded again and again afterwards
 *     --steer FILE      an intervention file or a control vector
 *     --tokens N        tokens decoded by each context (300), after 20 that are not counted
 *     --threads N       threads (1)
 *     --pool            one thread pool for all contexts, as in llama-server; without it llama.cpp starts threads for
 *                       every graph, and twice for a graph that the callback splits
 *     --cpu             measure the process's CPU time instead of wall-clock time, for a machine that is also doing other
 *                       work; with one thread only, since several threads wait for each other by spinning
 *     --only NAME       run only this context, without times: to count its instructions from outside
 *
 * The contexts:
 * - `plain` and `plain_again`: unsteered;
 * - `control_vector`: only if the whole file can be a control vector;
 * - `callback_at_0`: the callback at a coefficient of 0, which is asked about each node and wants none;
 * - `callback`: everything by the callback.
 *
 * Prints JSON. For each context: the median time in microseconds per token; the median of its ratios to the mean of
 * `plain` and `plain_again`, with a 95% interval; and a hash of its last logits. The ratios of the two unsteered contexts
 * show how much two identical contexts differ. The interval is from order statistics: it assumes independent tokens but
 * no distribution. It shows the spread within this process, not between processes.
 *
 * Build it like steer.c, with -lggml-cpu in addition: that library has the thread pool, and is needed with or without
 * --pool.
 */
#define _POSIX_C_SOURCE 200809L
#define DETOX_WITH_GGML
#include "detox_gguf.h"
#include "ggml-cpu.h"
#include "llama.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PLAIN, PLAIN_AGAIN, CONTROL_VECTOR, CALLBACK_AT_0, CALLBACK, N_KINDS };
static const char *const NAMES[N_KINDS] = {"plain", "plain_again", "control_vector", "callback_at_0", "callback"};

enum { MOST_TOKENS = 4096, N_WARM = 20 };

static struct {
    const char *model, *steer, *only;
    llama_token tokens[MOST_TOKENS];
    int n_prompt, n_tokens, n_threads;
    bool pool, cpu, force;
} args = {.n_tokens = 300, .n_threads = 1};

typedef struct {
    struct llama_context *context;
    detox_steer *steer;
    detox_callback *callback;
    /* Microseconds of each token. */
    double *us;
} subject;

static void stop(const char *what) {
    fprintf(stderr, "error: %s\n", what);
    exit(1);
}

static void must(detox_status status) {
    if (status != DETOX_OK) {
        fprintf(stderr, "error (status %d): %s\n", (int) status, detox_last_error());
        exit(1);
    }
}

static int number(const char *flag, const char *value, int least) {
    char *end;
    long found = strtol(value, &end, 10);
    if (end == value || *end != '\0' || found < least || found > 1000000) {
        fprintf(stderr, "error: %s: expected a number from %d to 1000000, found %s\n", flag, least, value);
        exit(1);
    }
    return (int) found;
}

static void parse(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *flag = argv[i];
        if (strcmp(flag, "--pool") == 0) { args.pool = true; continue; }
        if (strcmp(flag, "--cpu") == 0) { args.cpu = true; continue; }
        if (strcmp(flag, "--force") == 0) { args.force = true; continue; }
        if (i + 1 == argc) stop("unknown flag, or a flag without its value");
        char *value = argv[++i];
        if (strcmp(flag, "-m") == 0) args.model = value;
        else if (strcmp(flag, "--steer") == 0) args.steer = value;
        else if (strcmp(flag, "--tokens") == 0) args.n_tokens = number(flag, value, 1);
        else if (strcmp(flag, "--threads") == 0) args.n_threads = number(flag, value, 1);
        else if (strcmp(flag, "--only") == 0) args.only = value;
        else if (strcmp(flag, "-t") == 0) {
            for (char *token = strtok(value, ","); token != NULL; token = strtok(NULL, ",")) {
                if (args.n_prompt == MOST_TOKENS) stop("-t: too many tokens");
                args.tokens[args.n_prompt++] = number(flag, token, 0);
            }
        } else stop("unknown flag");
    }
    if (args.model == NULL || args.n_prompt == 0 || args.steer == NULL) stop("expected -m MODEL, -t TOKEN,TOKEN,... and --steer FILE");
    if (args.cpu && args.n_threads > 1) stop("--cpu is for one thread: several threads wait for each other by spinning, which counts as CPU time");
}

static void quiet(enum ggml_log_level level, const char *text, void *user_data) {
    (void) user_data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

/* Opens a context of this kind. Returns false if it was not requested or is not possible. */
static bool open_subject(subject *of, int kind, struct llama_model *model, struct ggml_threadpool *pool) {
    if (args.only != NULL && strcmp(args.only, NAMES[kind]) != 0) return false;
    detox_control_vector vector = DETOX_CONTROL_VECTOR_INIT;
    if (kind >= CONTROL_VECTOR) {
        detox_steer_options options = DETOX_STEER_OPTIONS_INIT;
        options.route = kind == CONTROL_VECTOR ? DETOX_ROUTE_CHEAPEST : DETOX_ROUTE_CALLBACK;
        options.coefficient = kind == CALLBACK_AT_0 ? 0.0f : 1.0f;
        options.force = args.force;
        must(detox_steer_load(args.model, args.steer, &options, &of->steer));
        must(detox_steer_control_vector(of->steer, &vector, NULL, 0));
        if (kind == CONTROL_VECTOR && !vector.is_whole) return false;
    }
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = (uint32_t) (256 * (1 + (args.n_prompt + N_WARM + args.n_tokens) / 256));
    /* So that any prompt fits in one decode. */
    params.n_batch = params.n_ctx;
    params.n_threads = params.n_threads_batch = args.n_threads;
    if (kind == CALLBACK_AT_0 || kind == CALLBACK) {
        detox_host_table table = detox_ggml_host_table();
        must(detox_steer_callback(of->steer, &table, NULL, &of->callback));
        params.cb_eval = detox_eval_callback;
        params.cb_eval_user_data = of->callback;
    }
    of->context = llama_init_from_model(model, params);
    if (of->context == NULL) stop("llama.cpp could not create a context");
    if (pool != NULL) llama_attach_threadpool(of->context, pool, pool);
    if (vector.len > 0) {
        float *data = malloc(vector.len * sizeof *data);
        must(detox_steer_control_vector(of->steer, &vector, data, vector.len));
        if (llama_set_adapter_cvec(of->context, data, vector.len, vector.n_embd, vector.il_start, vector.il_end) != 0) {
            stop("llama.cpp refused the control vector");
        }
        free(data);
    }
    of->us = malloc((size_t) args.n_tokens * sizeof *of->us);
    return true;
}

static double now_us(void) {
    struct timespec now;
    clock_gettime(args.cpu ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &now);
    return 1e6 * (double) now.tv_sec + 1e-3 * (double) now.tv_nsec;
}

/* Decodes, including the call of detox_check, and returns the time in microseconds. */
static double decode(subject *of, llama_token *tokens, int n) {
    struct llama_batch batch = llama_batch_get_one(tokens, n);
    double start = now_us();
    if (llama_decode(of->context, batch) != 0) stop("llama_decode failed");
    if (of->callback != NULL) must(detox_check(of->callback));
    /* A backend may compute asynchronously: reading the logits waits for it. */
    if (llama_get_logits_ith(of->context, -1) == NULL) stop("no logits");
    double us = now_us() - start;
    /* No ratio to it could be computed. */
    if (us <= 0.0) stop("a decode took 0 us: the clock is too coarse for this model");
    return us;
}

/* FNV-1a hash of the last decode's logits. */
static uint64_t hash_logits(const subject *of) {
    const unsigned char *bytes = (const unsigned char *) llama_get_logits_ith(of->context, -1);
    const struct llama_vocab *vocab = llama_model_get_vocab(llama_get_model(of->context));
    size_t n_bytes = sizeof(float) * (size_t) llama_vocab_n_tokens(vocab);
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n_bytes; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *) a, y = *(const double *) b;
    return (x > y) - (x < y);
}

/* Sorts the values and returns the median with its 95% interval. The interval's ends are order statistics; their distance
 * from the middle is that within which the heads of n fair coin tosses lie around n / 2 in at least 95% of cases. This
 * assumes independent values. Fewer than 6 values have no such interval: it is then the smallest and the largest value,
 * at a lower confidence. */
static double median(double *values, int n, double *low, double *high) {
    qsort(values, (size_t) n, sizeof *values, by_value);
    int half = (int) ceil(0.98 * sqrt((double) n) + 0.5);
    int from = n / 2 - half, to = (n - 1) / 2 + half;
    *low = values[from < 0 ? 0 : from];
    *high = values[to >= n ? n - 1 : to];
    return 0.5 * (values[n / 2] + values[(n - 1) / 2]);
}

int main(int argc, char **argv) {
    parse(argc, argv);
    if (detox_abi_version() != DETOX_ABI_VERSION) stop("the library's version does not match this program's header");
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(args.model, llama_model_default_params());
    if (model == NULL) stop("llama.cpp could not load the model");
    struct ggml_threadpool *pool = NULL;
    if (args.pool) {
        struct ggml_threadpool_params params = ggml_threadpool_params_default(args.n_threads);
        pool = ggml_threadpool_new(&params);
        if (pool == NULL) stop("could not create a thread pool");
    }

    subject subjects[N_KINDS] = {0};
    int open[N_KINDS], n_open = 0;
    for (int kind = 0; kind < N_KINDS; kind++) {
        if (open_subject(&subjects[kind], kind, model, pool)) open[n_open++] = kind;
    }
    if (n_open == 0) stop("--only: expected a context that exists for this file, found none");
    for (int i = 0; i < n_open; i++) decode(&subjects[open[i]], args.tokens, args.n_prompt);
    /* The contexts take turns, so that other load on the machine affects all of them equally. The order is shuffled for
     * each token, because each context finds the caches as the one before left them. */
    uint32_t seed = 1;
    for (int token = -N_WARM; token < args.n_tokens; token++) {
        for (int i = n_open - 1; i > 0; i--) {
            seed = seed * 1664525u + 1013904223u;
            int j = (int) ((seed >> 16) % (uint32_t) (i + 1)), kind = open[i];
            open[i] = open[j];
            open[j] = kind;
        }
        for (int i = 0; i < n_open; i++) {
            subject *of = &subjects[open[i]];
            double us = decode(of, &args.tokens[(token + N_WARM) % args.n_prompt], 1);
            if (token >= 0) of->us[token] = us;
        }
    }

    if (args.only == NULL) {
        double *ratios = malloc((size_t) args.n_tokens * sizeof *ratios), low, high;
        printf("{\"tokens\": %d, \"threads\": %d, \"pool\": %s", args.n_tokens, args.n_threads, args.pool ? "true" : "false");
        for (int kind = 0; kind < N_KINDS; kind++) {
            if (subjects[kind].us == NULL) continue;
            memcpy(ratios, subjects[kind].us, (size_t) args.n_tokens * sizeof *ratios);
            printf(",\n\"%s\": {\"us\": %.1f", NAMES[kind], median(ratios, args.n_tokens, &low, &high));
            /* Relative to both unsteered contexts: a bias in either one alone would shift every ratio. */
            for (int i = 0; i < args.n_tokens; i++) {
                ratios[i] = subjects[kind].us[i] / (0.5 * (subjects[PLAIN].us[i] + subjects[PLAIN_AGAIN].us[i]));
            }
            double middle = median(ratios, args.n_tokens, &low, &high);
            printf(", \"ratio\": %.4f, \"low\": %.4f, \"high\": %.4f", middle, low, high);
            printf(", \"logits\": \"%016llx\"}", (unsigned long long) hash_logits(&subjects[kind]));
        }
        printf("}\n");
        free(ratios);
    }

    for (int kind = 0; kind < N_KINDS; kind++) {
        if (subjects[kind].context != NULL) llama_free(subjects[kind].context);
        must(detox_callback_free(subjects[kind].callback));
        must(detox_steer_free(subjects[kind].steer));
        free(subjects[kind].us);
    }
    if (pool != NULL) ggml_threadpool_free(pool);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}

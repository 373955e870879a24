/*
 * In place of a llama-server: takes -m and --control-vector-scaled as it does, loads the control vector as llama.cpp's
 * common_control_vector_load does, by the functions of gguf.h, and prints the logits of the tokens in -t.
 */
#include "gguf.h"
#include "llama.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void quiet(enum ggml_log_level level, const char *text, void *user_data) {
    (void) user_data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void stop(const char *what) {
    fprintf(stderr, "error: %s\n", what);
    exit(1);
}

static void set_control_vector(struct llama_context *context, const struct llama_model *model, char *file) {
    char *colon = strrchr(file, ':');
    if (colon == NULL) stop("--control-vector-scaled expects FILE:SCALE");
    float scale = strtof(colon + 1, NULL);
    *colon = '\0';
    struct ggml_context *tensors = NULL;
    struct gguf_init_params params = {.no_alloc = false, .ctx = &tensors};
    struct gguf_context *gguf = gguf_init_from_file(file, params);
    if (gguf == NULL) stop("no GGUF");
    int n_embd = llama_model_n_embd(model), n_layer = llama_model_n_layer(model);
    float *data = calloc((size_t) n_embd * (size_t) n_layer, sizeof *data);
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); i++) {
        const char *name = gguf_get_tensor_name(gguf, i);
        if (strncmp(name, "direction.", 10) != 0) continue;
        int layer = atoi(name + 10);
        struct ggml_tensor *tensor = ggml_get_tensor(tensors, name);
        if (layer < 1 || layer >= n_layer || tensor->type != GGML_TYPE_F32 || ggml_nelements(tensor) != n_embd) {
            stop("a direction that llama.cpp refuses");
        }
        for (int j = 0; j < n_embd; j++) data[(layer - 1) * n_embd + j] += scale * ((float *) tensor->data)[j];
    }
    size_t len = (size_t) n_embd * (size_t) (n_layer - 1);
    if (llama_set_adapter_cvec(context, data, len, n_embd, 1, n_layer) != 0) stop("llama.cpp refused the control vector");
    free(data);
    gguf_free(gguf);
    ggml_free(tensors);
}

int main(int argc, char **argv) {
    const char *path = NULL;
    char *vector = NULL;
    llama_token tokens[64];
    int n = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "-m") == 0) path = argv[i + 1];
        else if (strcmp(argv[i], "--control-vector-scaled") == 0) vector = argv[i + 1];
        else if (strcmp(argv[i], "-t") == 0) {
            for (char *at = argv[i + 1]; *at != '\0' && n < 64; at += *at == ',') tokens[n++] = (llama_token) strtol(at, &at, 10);
        } else stop("an unknown flag");
    }
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model *model = path == NULL ? NULL : llama_model_load_from_file(path, llama_model_default_params());
    if (model == NULL) stop("no model");
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = 256;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    struct llama_context *context = llama_init_from_model(model, params);
    if (context == NULL) stop("no context");
    if (vector != NULL) set_control_vector(context, model, vector);
    if (llama_decode(context, llama_batch_get_one(tokens, n)) != 0) stop("llama_decode failed");
    const float *row = llama_get_logits_ith(context, -1);
    int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (int i = 0; i < n_vocab; i++) printf("%s%.9g", i == 0 ? "[" : ",", (double) row[i]);
    printf("]\n");
    llama_free(context);
    llama_model_free(model);
    return 0;
}

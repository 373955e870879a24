/* A fake host without llama.cpp. It has its own tensors; the tests make up the graphs. */
#ifndef FAKE_HOST_H
#define FAKE_HOST_H

#include "detox_gguf.h"

#include <stdlib.h>
#include <string.h>

struct ggml_tensor {
    char name[64];
    const char *op;
    int32_t type;
    int64_t ne[4];
    size_t nb[4];
    void *data;
    size_t n_bytes;
    struct ggml_tensor *sources[3];
};

enum { FAKE_F32 = 0, FAKE_I64 = 27 };

static const char *fake_name(const struct ggml_tensor *tensor) { return tensor->name; }

static void fake_shape(const struct ggml_tensor *tensor, detox_shape *shape) {
    shape->type = tensor->type;
    memcpy(shape->ne, tensor->ne, sizeof shape->ne);
    memcpy(shape->nb, tensor->nb, sizeof shape->nb);
}

/* Aborts if the range exceeds the tensor, as ggml does. */
static void fake_get(const struct ggml_tensor *tensor, void *data, size_t offset, size_t n_bytes) {
    if (offset + n_bytes > tensor->n_bytes) abort();
    memcpy(data, (const char *) tensor->data + offset, n_bytes);
}

static void fake_set(struct ggml_tensor *tensor, const void *data, size_t offset, size_t n_bytes) {
    if (offset + n_bytes > tensor->n_bytes) abort();
    memcpy((char *) tensor->data + offset, data, n_bytes);
}

static const char *fake_op(const struct ggml_tensor *tensor) { return tensor->op; }

static const struct ggml_tensor *fake_source(const struct ggml_tensor *tensor, int32_t index) {
    return index >= 0 && index < 3 ? tensor->sources[index] : NULL;
}

static inline detox_host_table fake_table(void) {
    detox_host_table table = {sizeof(detox_host_table), fake_name, fake_shape, fake_get, fake_set, fake_op, fake_source};
    return table;
}

/* An F32 matrix stored in `data`, which must be large enough. */
static inline struct ggml_tensor fake_matrix(const char *name, float *data, int64_t width, int64_t n_rows) {
    struct ggml_tensor tensor;
    memset(&tensor, 0, sizeof tensor);
    strncpy(tensor.name, name, sizeof tensor.name - 1);
    tensor.op = "ADD";
    tensor.type = FAKE_F32;
    tensor.ne[0] = width;
    tensor.ne[1] = n_rows;
    tensor.ne[2] = tensor.ne[3] = 1;
    tensor.nb[0] = sizeof(float);
    tensor.nb[1] = sizeof(float) * (size_t) width;
    tensor.nb[2] = tensor.nb[3] = tensor.nb[1] * (size_t) n_rows;
    tensor.data = data;
    tensor.n_bytes = tensor.nb[2];
    return tensor;
}

/* Handles a node as llama.cpp does: ask, compute, show the result. */
static inline bool fake_compute(detox_callback *callback, struct ggml_tensor *tensor) {
    if (!detox_eval_callback(tensor, true, callback)) return true;
    return detox_eval_callback(tensor, false, callback);
}

#endif

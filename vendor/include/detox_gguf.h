/*
 * detox_gguf.h: steer a model inside a program that runs llama.cpp itself.
 *
 * The library contains no llama.cpp. The program links its own and passes the library the few functions it needs
 * (detox_host_table). Any build and backend works, and so does any revision whose graphs have the nodes that the
 * library knows; if they do not, detox_check reports it.
 *
 *     detox_steer *steer;
 *     detox_steer_load("model.gguf", "steer.json", NULL, &steer);
 *     // what a control vector can do:    detox_steer_control_vector -> llama_set_adapter_cvec
 *     // what it cannot do:               detox_steer_callback       -> llama_context_params.cb_eval
 *
 * Conventions
 * - Functions return a detox_status. If it is not DETOX_OK, nothing was changed, out-parameters keep their values, and
 *   detox_last_error() in the same thread returns the reason.
 * - Handles are numbers in the form of pointers: never dereference one. The library looks them up, so a handle that was
 *   freed or is of another kind is refused (DETOX_INVALID_HANDLE).
 * - Strings are UTF-8, NUL-terminated, and copied. Returned strings belong to the library.
 * - Any function may be called from any thread at any time, even while llama_decode runs, except detox_batch and
 *   detox_check: call these between two decodes of their context. Changes take effect from the next micro-batch; one
 *   micro-batch is never steered with two settings. A control vector keeps the coefficient it was fetched with until
 *   the program sets it again.
 * - Structs begin with their size, so that they can grow: set it with sizeof, or use the *_INIT macros. Members that
 *   are missing from a program's older header count as zero.
 * - The functions in a host table are called only inside detox_eval_callback, in the thread of llama_decode. They must
 *   not call functions that take a detox_callback: those that need its lock are refused there (DETOX_REFUSED). Neither
 *   they nor `next` may throw or longjmp out.
 *
 * docs/plugin.md has recipes, the version policy of this interface, and what cannot be checked.
 */
#ifndef DETOX_GGUF_H
#define DETOX_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define DETOX_API __declspec(dllimport)
#elif defined(__GNUC__)
#define DETOX_API __attribute__((visibility("default")))
#else
#define DETOX_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this interface. A library with another version does not match this header. */
#define DETOX_ABI_VERSION 1

/* The result of a function. Values keep their meaning; new ones may be added. */
typedef enum detox_status {
    DETOX_OK = 0,
    /* A null pointer, a number out of range, text that is not UTF-8, or a struct that is too small. */
    DETOX_INVALID_ARGUMENT = 1,
    /* A handle that was freed, never existed, or is of another kind. */
    DETOX_INVALID_HANDLE = 2,
    /* A file could not be opened or read. */
    DETOX_IO_ERROR = 3,
    /* A file is malformed or was made for another model. */
    DETOX_INVALID_FILE = 4,
    /* The model's architecture or the text's language is not supported. */
    DETOX_UNSUPPORTED = 5,
    /* Not possible in this setup; the message says what to change. */
    DETOX_REFUSED = 6,
    /* detox_check: something was decoded without being steered as it should have been. */
    DETOX_NOT_STEERED = 7,
    /* A bug in the library; the panic was stopped at its boundary. */
    DETOX_INTERNAL_ERROR = 8
} detox_status;

/* An intervention, checked against a model's file. Valid until detox_steer_free. */
typedef struct detox_steer detox_steer;

/* The state of one llama_context's eval callback. Valid until detox_callback_free. */
typedef struct detox_callback detox_callback;

/* Declared by llama.cpp. */
struct ggml_tensor;

/* The type of llama_context_params.cb_eval. */
typedef bool (*detox_eval_fn)(struct ggml_tensor *tensor, bool ask, void *user_data);

/* ---------------------------------------------------------------------------------------------------------------- */
/* Version and errors                                                                                               */

/* The DETOX_ABI_VERSION that the library was built with. */
DETOX_API uint32_t detox_abi_version(void);

/* The library's version, such as "0.1.0 (0123456789ab)". */
DETOX_API const char *detox_version(void);

/* Why the last failed function of this thread failed, with a hint on a separate line if there is one; "" if none
 * failed. Valid until this thread calls the library again. */
DETOX_API const char *detox_last_error(void);

/* ---------------------------------------------------------------------------------------------------------------- */
/* Interventions                                                                                                    */

typedef enum detox_route {
    /* A control vector, at almost no cost, for everything it can do exactly; the callback for the rest. */
    DETOX_ROUTE_CHEAPEST = 0,
    /* The callback for everything. Needed for gates and to exclude sequences. Also exact under LoRA adapters on
     * ffn_down; a control vector is computed from the model's file alone and does not know about them. */
    DETOX_ROUTE_CALLBACK = 1
} detox_route;

typedef struct detox_steer_options {
    size_t size;
    /* A factor for the file's own coefficients. */
    float coefficient;
    /* A detox_route. */
    int32_t route;
    /* Allow a file made for another quantisation or fine-tune of the same model, and a control vector without a
     * fingerprint whose controlvector.model_hint differs from the model's architecture. */
    bool force;
} detox_steer_options;

#define DETOX_STEER_OPTIONS_INIT { sizeof(detox_steer_options), 1.0f, DETOX_ROUTE_CHEAPEST, false }

/* Reads an intervention file (JSON) or a control vector (GGUF) and checks it against the model's file. `options` may
 * be NULL: coefficient 1, the cheapest route, no force. The files are not read again later. */
DETOX_API detox_status detox_steer_load(const char *model_path, const char *steer_path,
                                        const detox_steer_options *options, detox_steer **steer);

/* Frees it; NULL is allowed. Callbacks made from it keep working and are freed separately. */
DETOX_API detox_status detox_steer_free(detox_steer *steer);

/* Sets the coefficient, a finite number. At 0 the callback leaves every bit unchanged. The program must fetch and set a
 * control vector again, between two decodes because llama.cpp's function is not thread-safe. */
DETOX_API detox_status detox_set_coefficient(detox_steer *steer, float coefficient);

DETOX_API detox_status detox_get_coefficient(detox_steer *steer, float *coefficient);

/* The arguments of llama_set_adapter_cvec, except the data. */
typedef struct detox_control_vector {
    size_t size;
    /* Floats in the buffer, n_embd * (n_layer - 1). 0 if there is nothing to add: then pass NULL and 0. */
    size_t len;
    /* Width of the residual stream. */
    int32_t n_embd;
    /* The first and last layer, both inclusive. */
    int32_t il_start;
    int32_t il_end;
    /* Whether this is the whole intervention; if not, the callback does the rest. */
    bool is_whole;
} detox_control_vector;

#define DETOX_CONTROL_VECTOR_INIT { sizeof(detox_control_vector), 0, 0, 0, 0, false }

/* Gets the control vector at the current coefficient. Fills `vector` and writes the floats, shape [n_layer - 1][n_embd]
 * with the row of layer 1 first, to `data`, which has room for `capacity` floats. Pass NULL as `data` to get only
 * `len`. A capacity below `len` is DETOX_INVALID_ARGUMENT. */
DETOX_API detox_status detox_steer_control_vector(detox_steer *steer, detox_control_vector *vector, float *data,
                                                  size_t capacity);

/* ---------------------------------------------------------------------------------------------------------------- */
/* The callback                                                                                                     */

/* A tensor's type and shape, as in struct ggml_tensor. */
typedef struct detox_shape {
    /* enum ggml_type. */
    int32_t type;
    /* Elements along each axis, fastest first. */
    int64_t ne[4];
    /* Stride in bytes along each axis. */
    size_t nb[4];
} detox_shape;

/* The functions of the program's llama.cpp that the library needs. Define DETOX_WITH_GGML before including this header
 * to get detox_ggml_host_table() below, which returns such a table. */
typedef struct detox_host_table {
    size_t size;
    /* ggml_get_name */
    const char *(*name)(const struct ggml_tensor *tensor);
    /* Fills in `type`, `ne` and `nb` of the tensor. */
    void (*shape)(const struct ggml_tensor *tensor, detox_shape *shape);
    /* ggml_backend_tensor_get: `offset` and `n_bytes` are bytes. */
    void (*get)(const struct ggml_tensor *tensor, void *data, size_t offset, size_t n_bytes);
    /* ggml_backend_tensor_set */
    void (*set)(struct ggml_tensor *tensor, const void *data, size_t offset, size_t n_bytes);
    /* ggml_op_desc. This and `source` may be NULL. Without them, the sequences of a context with one KV stream per
     * sequence (kv_unified = false, n_seq_max above 1) cannot be told apart, and detox_batch is refused there. */
    const char *(*op)(const struct ggml_tensor *tensor);
    /* tensor->src[index], or NULL if there is none. */
    const struct ggml_tensor *(*source)(const struct ggml_tensor *tensor, int32_t index);
} detox_host_table;

typedef struct detox_callback_options {
    size_t size;
    /* llama_n_seq_max of the context. */
    uint32_t n_seq_max;
    /* llama_context_params.kv_unified of the context. */
    bool kv_unified;
    /* The program's own callback, or NULL. It is called after the library's, with the edited values, and only for the
     * nodes it asked for. If it returns false to end the graph, the edits after that node are not made and detox_check
     * reports it. */
    detox_eval_fn next;
    void *next_user_data;
} detox_callback_options;

#define DETOX_CALLBACK_OPTIONS_INIT { sizeof(detox_callback_options), 1, false, NULL, NULL }

/* Makes the callback state of one context. Set detox_eval_callback as llama_context_params.cb_eval and the handle as
 * cb_eval_user_data. `table` and `options` are copied. `options` may be NULL: one sequence, no other callback. */
DETOX_API detox_status detox_steer_callback(detox_steer *steer, const detox_host_table *table,
                                            const detox_callback_options *options, detox_callback **callback);

/* Frees it; NULL is allowed. A context that still has it is no longer steered, and its `next` is not called after this
 * function returns. The function waits for a detox_eval_callback that is running in another thread, so that callback
 * must not need a lock that the caller holds. Refused inside `next` and the host table's functions. */
DETOX_API detox_status detox_callback_free(detox_callback *callback);

/* The function for llama_context_params.cb_eval, with a detox_callback as user data. */
DETOX_API bool detox_eval_callback(struct ggml_tensor *tensor, bool ask, void *user_data);

/* Checks that everything decoded since the last call was steered as it should be. Call it after each successful
 * llama_decode: a callback cannot stop a decode, so this is how faults are reported (DETOX_NOT_STEERED). After a fault
 * the logits are neither the steered ones nor the model's own, and nothing is steered until this function is called. An
 * announced batch that was not fully decoded is a fault, and is forgotten by this call. A context without the callback
 * (cb_eval not set) is only noticed if a batch was announced; otherwise it looks like one that decoded nothing. */
DETOX_API detox_status detox_check(detox_callback *callback);

/* Announces the batch of the next llama_decode. Needed in two cases only: the context has several sequences that are
 * steered differently or by a gate, or the intervention is for prompts only or for generated tokens only.
 *
 * The arrays have `n_tokens` entries in the batch's order:
 * - `sequences`: each token's sequence. NULL: all 0.
 * - `outputs`: whether the token's logits are requested. NULL: those of the last token, as in llama_batch. In a context
 *   with embeddings = true llama.cpp makes every token an output: pass 1 for each there.
 * - `generated`: whether the token was generated rather than part of the prompt. NULL: unknown.
 *
 * Do not announce a batch in which a token belongs to several sequences; its sequences must all be steered alike. A
 * batch of embeddings (llama_batch.embd) cannot be followed: detox_check reports it if its graph lacks the embedding's
 * node. If llama_decode refuses the batch before computing anything, announce the batch that you try instead. */
DETOX_API detox_status detox_batch(detox_callback *callback, size_t n_tokens, const int32_t *sequences,
                                   const int8_t *outputs, const int8_t *generated);

/* Turns steering of a sequence on or off; it is on for all at first. Refused if part of the intervention is a control
 * vector (use DETOX_ROUTE_CALLBACK). */
DETOX_API detox_status detox_set_sequence(detox_callback *callback, int32_t sequence, bool is_on);

/* ---------------------------------------------------------------------------------------------------------------- */
/* Gates: steer only while the text is turning toxic                                                                */

typedef struct detox_gate_options {
    size_t size;
    /* The lowest probability at which a sequence is steered, in [0, 1]. */
    double threshold;
    /* Tokens in the mean; 0 for all since the sequence began. */
    uint32_t window;
    /* Allow a probe made for another quantisation or fine-tune of the same model. */
    bool force;
} detox_gate_options;

#define DETOX_GATE_OPTIONS_INIT { sizeof(detox_gate_options), 0.5, 16, false }

/* Sets a gate from a file that `detox-gguf probe` wrote, and replaces any earlier gate. `options` may be NULL.
 *
 * The probe reads every token at its layer, before that layer's edits. Its product with the residual stream is
 * averaged: a plain mean over the first `window` tokens of a sequence, after which each new token counts 1 / window.
 * The sigmoid of that mean is the probability that the text is toxic.
 *
 * A micro-batch of a sequence is steered if the probability after the preceding tokens was at least the threshold. So a
 * prompt that fits into one micro-batch is never steered, and each generated token is judged by the text before it.
 *
 * A probe of the last block or after the final norm reads only tokens whose logits are requested, since llama.cpp
 * computes no others there. A product that is not finite is left out of the mean. */
DETOX_API detox_status detox_gate_set(detox_callback *callback, const char *probe_path,
                                      const detox_gate_options *options);

DETOX_API detox_status detox_gate_remove(detox_callback *callback);

DETOX_API detox_status detox_gate_set_threshold(detox_callback *callback, double threshold);

/* Gets the gate's state for a sequence. `probability` is negative before the first token. Either may be NULL. */
DETOX_API detox_status detox_gate_state(detox_callback *callback, int32_t sequence, double *probability,
                                        bool *is_open);

/* Resets the gate's mean for a sequence. Call it when the sequence begins a new text, and when llama_memory_seq_rm or
 * another function removes tokens from it: the mean would otherwise still include them. */
DETOX_API detox_status detox_gate_reset(detox_callback *callback, int32_t sequence);

/* ---------------------------------------------------------------------------------------------------------------- */
/* Scoring                                                                                                          */

/* Scores the toxicity of a text, in [0, 1], with the built-in scorer; its threshold is 0.5. `language` is one of ar cs
 * de en es fr hi id it ja ko nl pl pt ru sv zh, or NULL if unknown; any other is DETOX_UNSUPPORTED. */
DETOX_API detox_status detox_score(const char *text, const char *language, double *toxicity);

#ifdef __cplusplus
}
#endif

/* ---------------------------------------------------------------------------------------------------------------- */
/* The host table for a program that compiles with ggml's headers                                                   */

#ifdef DETOX_WITH_GGML
#include "ggml-backend.h"
#include "ggml.h"

static inline void detox_ggml_shape(const struct ggml_tensor *tensor, detox_shape *shape) {
    int i;
    shape->type = (int32_t) tensor->type;
    for (i = 0; i < 4; i++) {
        shape->ne[i] = tensor->ne[i];
        shape->nb[i] = tensor->nb[i];
    }
}

static inline const struct ggml_tensor *detox_ggml_source(const struct ggml_tensor *tensor, int32_t index) {
    return index >= 0 && index < GGML_MAX_SRC ? tensor->src[index] : NULL;
}

static inline detox_host_table detox_ggml_host_table(void) {
    detox_host_table table;
    table.size = sizeof table;
    table.name = ggml_get_name;
    table.shape = detox_ggml_shape;
    table.get = ggml_backend_tensor_get;
    table.set = ggml_backend_tensor_set;
    table.op = ggml_op_desc;
    table.source = detox_ggml_source;
    return table;
}
#endif

#endif

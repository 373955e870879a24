/*
 * detox_gguf.h: steer a model inside a program that runs llama.cpp itself.
 *
 * The library carries no llama.cpp. The program hands it the few functions that it needs (detox_host_table), and links
 * its own: any build and backend, and any revision whose graphs have the nodes that are known, which detox_check tells.
 *
 *     detox_steer *steer;
 *     detox_steer_load("model.gguf", "steer.json", NULL, &steer);
 *     // what a control vector can do:    detox_steer_control_vector -> llama_set_adapter_cvec
 *     // what it cannot do:               detox_steer_callback       -> llama_context_params.cb_eval
 *
 * Conventions
 * - Functions return a detox_status. Where it is not DETOX_OK, detox_last_error() says why, in the calling thread, and
 *   nothing was changed: out-parameters keep their values.
 * - Handles are numbers in the form of pointers: never dereference one. One that was freed, or is of another kind, is
 *   refused (DETOX_INVALID_HANDLE), never followed.
 * - Strings are UTF-8, end with NUL, and are copied. Strings that are returned belong to the library.
 * - Any function may be called from any thread, at any time, also while llama_decode runs; detox_batch and detox_check
 *   alone belong between two decodes of their context. What changes takes effect from the next micro-batch on: the
 *   callback steers no micro-batch in two ways. A control vector beside it has the coefficient it was fetched with, until
 *   the program sets it again.
 * - Structs begin with their size, so that they can grow: set it with sizeof, or use the *_INIT macros. Members that
 *   a program's older header has not are taken as zero.
 * - The functions in a host table are called only inside detox_eval_callback, in the thread of llama_decode. They must
 *   not call functions that take a detox_callback: those that need its lock are refused there (DETOX_REFUSED). Neither
 *   they nor `next` may throw or longjmp out.
 *
 * docs/plugin.md has recipes, the policy for this interface, and what cannot be checked.
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

/* The version of this interface. A library with another one is not for this header. */
#define DETOX_ABI_VERSION 1

/* What a function says. Values keep their meaning; new ones may be added. */
typedef enum detox_status {
    DETOX_OK = 0,
    /* A null pointer, a number out of its range, text that is not UTF-8, a struct too small. */
    DETOX_INVALID_ARGUMENT = 1,
    /* A handle that was freed, never was one, or is of another kind. */
    DETOX_INVALID_HANDLE = 2,
    /* The system could not open or read a file. */
    DETOX_IO_ERROR = 3,
    /* A file is not what it should be, or was made for another model. */
    DETOX_INVALID_FILE = 4,
    /* The model's architecture or the text's language is not known. */
    DETOX_UNSUPPORTED = 5,
    /* Not possible as things are set up; the message says what to set up otherwise. */
    DETOX_REFUSED = 6,
    /* detox_check: what was decoded was not steered as it should have been. */
    DETOX_NOT_STEERED = 7,
    /* A fault of the library, which stopped at its border. */
    DETOX_INTERNAL_ERROR = 8
} detox_status;

/* An intervention, checked against a model's file. Lives until detox_steer_free. */
typedef struct detox_steer detox_steer;

/* What the eval callback of one llama_context works with. Lives until detox_callback_free. */
typedef struct detox_callback detox_callback;

/* llama.cpp's own. */
struct ggml_tensor;

/* The type of llama_context_params.cb_eval. */
typedef bool (*detox_eval_fn)(struct ggml_tensor *tensor, bool ask, void *user_data);

/* ---------------------------------------------------------------------------------------------------------------- */
/* Version and errors                                                                                               */

/* DETOX_ABI_VERSION of the library. */
DETOX_API uint32_t detox_abi_version(void);

/* The library's version, such as "0.1.0 (0123456789ab)". */
DETOX_API const char *detox_version(void);

/* Why the last function that failed in this thread did, with a cure on a line of its own where there is one; "" if
 * none failed. Valid until the next function of this library is called in this thread. */
DETOX_API const char *detox_last_error(void);

/* ---------------------------------------------------------------------------------------------------------------- */
/* Interventions                                                                                                    */

typedef enum detox_route {
    /* A control vector for all that it can do exactly, at next to no cost; the callback for the rest. */
    DETOX_ROUTE_CHEAPEST = 0,
    /* The callback for everything: needed for gates, and to leave sequences out. Right under LoRA adapters on
     * ffn_down too, which a control vector made from the model's file alone does not know of. */
    DETOX_ROUTE_CALLBACK = 1
} detox_route;

typedef struct detox_steer_options {
    size_t size;
    /* What the file's own coefficients are multiplied by. */
    float coefficient;
    /* A detox_route. */
    int32_t route;
    /* Allow a file made for another quantisation or fine-tune of the same model, and a control vector without a
     * fingerprint whose controlvector.model_hint is not the model's architecture. */
    bool force;
} detox_steer_options;

#define DETOX_STEER_OPTIONS_INIT { sizeof(detox_steer_options), 1.0f, DETOX_ROUTE_CHEAPEST, false }

/* Reads an intervention file (JSON) or a control vector (GGUF), and checks it against the model's file. `options` may
 * be NULL: coefficient 1, the cheapest route, no force. The files are not looked at again afterwards. */
DETOX_API detox_status detox_steer_load(const char *model_path, const char *steer_path,
                                        const detox_steer_options *options, detox_steer **steer);

/* Frees it; NULL is allowed. Callbacks made from it go on working, and are freed apart. */
DETOX_API detox_status detox_steer_free(detox_steer *steer);

/* Changes the coefficient, a finite number; at 0 the callback changes nothing, to the bit. A control vector has to be
 * fetched and set again by the program: between two decodes, since llama.cpp's own function is not thread-safe. */
DETOX_API detox_status detox_set_coefficient(detox_steer *steer, float coefficient);

DETOX_API detox_status detox_get_coefficient(detox_steer *steer, float *coefficient);

/* What llama_set_adapter_cvec takes besides the numbers. */
typedef struct detox_control_vector {
    size_t size;
    /* Numbers in the buffer, n_embd * (n_layer - 1); 0 where nothing is to be added: pass NULL and 0 then. */
    size_t len;
    /* Width of the residual stream. */
    int32_t n_embd;
    /* The first and last layer, both included. */
    int32_t il_start;
    int32_t il_end;
    /* Whether this is the whole of the intervention; if not, the callback does the rest. */
    bool is_whole;
} detox_control_vector;

#define DETOX_CONTROL_VECTOR_INIT { sizeof(detox_control_vector), 0, 0, 0, 0, false }

/* The control vector at the coefficient of now. Fills `vector`, and writes its numbers, shape [n_layer - 1][n_embd]
 * with the row of layer 1 first, to `data`, which has room for `capacity` of them. `data` may be NULL, to learn `len`.
 * A capacity below `len` is DETOX_INVALID_ARGUMENT. */
DETOX_API detox_status detox_steer_control_vector(detox_steer *steer, detox_control_vector *vector, float *data,
                                                  size_t capacity);

/* ---------------------------------------------------------------------------------------------------------------- */
/* The callback                                                                                                     */

/* A tensor's type and extent, as in struct ggml_tensor. */
typedef struct detox_shape {
    /* enum ggml_type. */
    int32_t type;
    /* Numbers along each axis, fastest first. */
    int64_t ne[4];
    /* Bytes from one number to the next along each axis. */
    size_t nb[4];
} detox_shape;

/* What the library needs of the program's llama.cpp. With DETOX_WITH_GGML defined before this header is included,
 * detox_ggml_host_table() below gives one. */
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
    /* ggml_op_desc. This and `source` may be NULL; then sequences of a context with a KV stream each
     * (kv_unified = false, n_seq_max above 1) cannot be told apart, and detox_batch is refused there. */
    const char *(*op)(const struct ggml_tensor *tensor);
    /* tensor->src[index], NULL where there is none. */
    const struct ggml_tensor *(*source)(const struct ggml_tensor *tensor, int32_t index);
} detox_host_table;

typedef struct detox_callback_options {
    size_t size;
    /* Of the context: llama_n_seq_max. */
    uint32_t n_seq_max;
    /* Of the context: llama_context_params.kv_unified. */
    bool kv_unified;
    /* A callback that the program has already, or NULL: it is called too, after the library's, with the values as they
     * were edited, and only for the nodes that it asked for. Where it returns false to end the graph, the edits after
     * that node are not made, and detox_check tells so. */
    detox_eval_fn next;
    void *next_user_data;
} detox_callback_options;

#define DETOX_CALLBACK_OPTIONS_INIT { sizeof(detox_callback_options), 1, false, NULL, NULL }

/* Makes what one context's callback works with. Set detox_eval_callback as llama_context_params.cb_eval and the handle
 * as cb_eval_user_data. `table` and `options` are copied; `options` may be NULL: one sequence, no other callback. */
DETOX_API detox_status detox_steer_callback(detox_steer *steer, const detox_host_table *table,
                                            const detox_callback_options *options, detox_callback **callback);

/* Frees it; NULL is allowed. A context that still has it is no longer steered, and its `next` no longer called once
 * this has returned: it waits for a call of detox_eval_callback that runs in another thread, which must not need a lock
 * that the caller holds. Refused from within `next` and the host table's functions. */
DETOX_API detox_status detox_callback_free(detox_callback *callback);

/* For llama_context_params.cb_eval, with a detox_callback as its user data. */
DETOX_API bool detox_eval_callback(struct ggml_tensor *tensor, bool ask, void *user_data);

/* Whether everything that was decoded since the last call was steered as it should be: call it after each llama_decode
 * that succeeded. A callback cannot stop a decode, so that this is how a fault is told (DETOX_NOT_STEERED); the logits
 * are then neither the steered ones nor the model's own, and nothing is steered until this was called. A batch that was
 * announced and not wholly decoded is such a fault, and is forgotten then. A context without the callback (cb_eval not
 * set) is seen only where a batch was announced: otherwise it looks like one that decoded nothing. */
DETOX_API detox_status detox_check(detox_callback *callback);

/* Says what the next llama_decode is about. Needed where sequences are steered differently or by a gate, unless the
 * context has one sequence, and where an intervention is for prompts or generated tokens alone; else not.
 * `sequences`, `outputs` and `generated` have `n_tokens` entries in the batch's order: each token's sequence (NULL: all
 * 0), whether its logits are asked for (NULL: of the last one, as in llama_batch), and whether it was generated rather
 * than of the prompt (NULL: not known). In a context with embeddings = true llama.cpp makes every token an output: pass
 * `outputs` with 1 for each there. A batch in which a token belongs to several sequences is not announced; its sequences
 * have to be steered alike. A batch of embeddings (llama_batch.embd) cannot be followed: detox_check tells so where its
 * graph lacks the node of the embedding. Where llama_decode refused the batch before it computed anything, announce
 * again what is tried instead. */
DETOX_API detox_status detox_batch(detox_callback *callback, size_t n_tokens, const int32_t *sequences,
                                   const int8_t *outputs, const int8_t *generated);

/* Steers a sequence, or no longer; all are steered at first. Refused for interventions of which a part is a control
 * vector (use DETOX_ROUTE_CALLBACK). */
DETOX_API detox_status detox_set_sequence(detox_callback *callback, int32_t sequence, bool is_on);

/* ---------------------------------------------------------------------------------------------------------------- */
/* Gates: steer only while the text is turning toxic                                                                */

typedef struct detox_gate_options {
    size_t size;
    /* The least probability at which a sequence is steered, in [0, 1]. */
    double threshold;
    /* Tokens of the mean; 0 for all since the sequence began. */
    uint32_t window;
    /* Allow a probe made for another quantisation or fine-tune of the same model. */
    bool force;
} detox_gate_options;

#define DETOX_GATE_OPTIONS_INIT { sizeof(detox_gate_options), 0.5, 16, false }

/* Sets a gate, made from a file of `detox-gguf probe`, in place of one there was. `options` may be NULL.
 *
 * The probe reads every token at its place in the graph, before edits are made there. Its product with the residual
 * stream is averaged: as a plain mean over the first `window` tokens of a sequence, and from then on each new token
 * counts 1 / window. The sigmoid of that mean is the probability that the text is toxic. A micro-batch of a sequence is
 * steered if the probability after the tokens before it was at least the threshold: a prompt that fits into one
 * micro-batch never is, and each generated token is judged by what was written before it. A probe of the last block or
 * after the final norm reads only tokens whose logits were asked for, since llama.cpp computes no others there. A product
 * that is not a finite number is left out of the mean. */
DETOX_API detox_status detox_gate_set(detox_callback *callback, const char *probe_path,
                                      const detox_gate_options *options);

DETOX_API detox_status detox_gate_remove(detox_callback *callback);

DETOX_API detox_status detox_gate_set_threshold(detox_callback *callback, double threshold);

/* What the gate knows of a sequence. `probability` is negative before its first token; either may be NULL. */
DETOX_API detox_status detox_gate_state(detox_callback *callback, int32_t sequence, double *probability,
                                        bool *is_open);

/* Forgets what was read of a sequence: call it where a sequence begins a new text, and where llama_memory_seq_rm or
 * another function takes tokens out of it, since the mean keeps what was read of them. */
DETOX_API detox_status detox_gate_reset(detox_callback *callback, int32_t sequence);

/* ---------------------------------------------------------------------------------------------------------------- */
/* Scoring                                                                                                          */

/* How toxic a text is, in [0, 1], by the embedded scorer; 0.5 is its threshold. `language` is one of ar cs de en es fr
 * hi id it ja ko nl pl pt ru sv zh, or NULL where it is not known; any other is DETOX_UNSUPPORTED. */
DETOX_API detox_status detox_score(const char *text, const char *language, double *toxicity);

#ifdef __cplusplus
}
#endif

/* ---------------------------------------------------------------------------------------------------------------- */
/* The host table of a program that compiles with ggml's headers                                                    */

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

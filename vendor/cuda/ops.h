// The trainer's operations on NVIDIA GPUs, as a C interface. There is one function for each operation of the trait
// `Device` in the trainer; the trait's documentation is the contract. Narrow on purpose: this program is the only
// caller.
//
// Shapes are written slowest axis first, with these letters: R rows of a batch (one per token), C columns, I and O a
// matrix's inputs and outputs, H heads, K key and value heads, D head size, V vocabulary size, T tensors.
//
// Pointers point to GPU memory from `detox_cuda_allocate`, unless the comment says "host". Buffers are dense f32.
// Gradients are added to the buffer; all other results overwrite it. Operations on one device run in call order. Only
// functions that return numbers to the host wait for them to finish. Any thread may call any function.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "limits.h"

#ifdef __cplusplus
extern "C" {
#endif

// Result of a call. `detox_cuda_last_error` returns the message.
typedef enum {
    DETOX_CUDA_OK = 0,
    // The GPU is out of memory. Nothing was computed.
    DETOX_CUDA_OUT_OF_MEMORY = 1,
    // No GPU, no GPU with that number, or another process uses it exclusively.
    DETOX_CUDA_NO_DEVICE = 2,
    // The driver is missing or too old for this build.
    DETOX_CUDA_DRIVER = 3,
    // The program does not support this GPU or this shape, however it is built.
    DETOX_CUDA_UNSUPPORTED = 4,
    // An argument is out of range: a bug in the caller.
    DETOX_CUDA_INVALID = 5,
    // A kernel or the driver failed.
    DETOX_CUDA_FAILED = 6,
    // This build has no kernels for this GPU.
    DETOX_CUDA_BUILD = 7,
} detox_cuda_status;

// A GPU with a stream of operations.
typedef struct detox_cuda_device detox_cuda_device;
// A batch's tokens, positions, segments and outputs on the GPU.
typedef struct detox_cuda_rows detox_cuda_rows;

// The message of this thread's last failure. Valid until the thread's next call.
const char* detox_cuda_last_error(void);

// Devices.

typedef struct {
    // The driver's name for the GPU, null-terminated.
    char name[256];
    // Compute capability.
    int32_t major;
    int32_t minor;
    int32_t n_multiprocessors;
    // CUDA versions as 1000 major + 10 minor.
    int32_t driver_version;
    int32_t runtime_version;
} detox_cuda_properties;

detox_cuda_status detox_cuda_count(int32_t* n_devices);
detox_cuda_status detox_cuda_open(int32_t ordinal, detox_cuda_device** device);
void detox_cuda_close(detox_cuda_device* device);
detox_cuda_status detox_cuda_describe(detox_cuda_device* device, detox_cuda_properties* properties);
// Free bytes, including released memory kept for reuse, and total bytes.
detox_cuda_status detox_cuda_memory(detox_cuda_device* device, size_t* n_free, size_t* n_total);
// Returns released memory, which is kept for reuse, to the driver.
detox_cuda_status detox_cuda_trim(detox_cuda_device* device);

// Memory.

// Allocates uninitialised memory, aligned to 256 bytes.
detox_cuda_status detox_cuda_allocate(detox_cuda_device* device, size_t n_bytes, void** memory);
detox_cuda_status detox_cuda_release(detox_cuda_device* device, void* memory);
detox_cuda_status detox_cuda_clear(detox_cuda_device* device, size_t n_bytes, void* memory);
// Copies from host [n_bytes]. The host's memory may be reused when the call returns.
detox_cuda_status detox_cuda_write(detox_cuda_device* device, const void* host, size_t n_bytes, void* memory);
// Waits for all operations, then copies to host [n_bytes].
detox_cuda_status detox_cuda_read(detox_cuda_device* device, const void* memory, size_t n_bytes, void* host);

// Batches.

typedef struct {
    // Rows [first, end). Each row attends to itself and to the segment's earlier rows.
    int32_t first;
    int32_t end;
    // Earlier rows that every row of the segment attends to as well: its prefix.
    int32_t prefix_first;
    int32_t prefix_end;
} detox_cuda_segment;

typedef struct {
    int64_t n_rows;
    int64_t n_segments;
    int64_t n_outputs;
    int64_t n_answers;
    const int32_t* tokens;              // host [R]
    const int32_t* positions;           // host [R]
    const detox_cuda_segment* segments; // host [n_segments]; every row is in exactly one
    const int32_t* output_rows;         // host [n_outputs]
    const int32_t* output_tokens;       // host [n_outputs]
    const int32_t* answer_ends;         // host [n_answers], end of each answer's outputs; covers all outputs, or empty
} detox_cuda_batch;

detox_cuda_status
detox_cuda_rows_open(detox_cuda_device* device, const detox_cuda_batch* batch, detox_cuda_rows** rows);
void detox_cuda_rows_close(detox_cuda_rows* rows);

// How a batch's rows index a table.
typedef enum {
    DETOX_CUDA_TOKEN = 0,
    DETOX_CUDA_POSITION = 1,
    // The rows of outputs [first, first + n).
    DETOX_CUDA_OUTPUT = 2,
} detox_cuda_index;

// Frozen matrices.

typedef struct {
    // ggml's number for the type.
    int32_t type;
    int64_t n_in;
    int64_t n_out;
    // The file's blocks, row after row, [O][I]. Null if only the rounded copy is kept.
    const void* blocks;
    // The weights rounded to bf16, [O][I]. Null if each product dequantises the blocks again.
    const uint16_t* rounded;
} detox_cuda_matrix;

// Numbers and bytes per block of a type. UNSUPPORTED if no kernel reads the type.
detox_cuda_status detox_cuda_block(int32_t type, int32_t* n_numbers, int32_t* n_bytes);
// rounded[n] = the dequantised numbers of blocks [n], rounded to bf16. n is a whole number of blocks.
detox_cuda_status
detox_cuda_round_blocks(detox_cuda_device* device, int32_t type, const void* blocks, int64_t n, uint16_t* rounded);
// ys[i][R][O] = x[R][I] W_i^T for n matrices that read the same input, which is rounded only once. Operands are rounded
// to bf16, sums are in f32. ws and ys: host [n].
detox_cuda_status detox_cuda_products(
    detox_cuda_device* device, const detox_cuda_matrix* ws, int64_t n, const float* x, int64_t n_rows,
    float* const* ys);
// dx[R][I] += dy[R][O] W
detox_cuda_status detox_cuda_product_back(
    detox_cuda_device* device, const detox_cuda_matrix* w, const float* dy, int64_t n_rows, float* dx);

// For tests: how many bytes of bf16 weights a product dequantises at a time. Rounded down to a multiple of 256 rows, at
// least 256 rows. Default: 256 MiB.
detox_cuda_status detox_cuda_set_part(detox_cuda_device* device, size_t n_bytes);

typedef struct {
    int64_t m;
    int64_t n;
    int64_t k;
    // If set, A is [k][m] instead of [m][k], and B is [n][k] instead of [k][n].
    int32_t transpose_a;
    int32_t transpose_b;
    float alpha;
    // If 0, C is not read.
    float beta;
} detox_cuda_gemm;

// c[m][n] = beta c + alpha op(a) op(b); operands rounded to TF32 (10 bits of fraction), sums in f32.
detox_cuda_status
detox_cuda_multiply(detox_cuda_device* device, const detox_cuda_gemm* gemm, const float* a, const float* b, float* c);

// Rows of tables.

// y[R][I] = scale W[token of the row]. W must have its blocks.
detox_cuda_status detox_cuda_embed(
    detox_cuda_device* device, const detox_cuda_matrix* w, const detox_cuda_rows* rows, float scale, float* y);
// y[n][C] = scale table[index of the row][C]
detox_cuda_status detox_cuda_gather(
    detox_cuda_device* device, const float* table, int64_t n_cols, detox_cuda_index index, int64_t first, int64_t n,
    const detox_cuda_rows* rows, float scale, float* y);
// dtable[index of the row][C] += scale dy[n][C]. Rows are added in order.
detox_cuda_status detox_cuda_scatter_add(
    detox_cuda_device* device, const float* dy, int64_t n_cols, detox_cuda_index index, int64_t first, int64_t n,
    const detox_cuda_rows* rows, float scale, float* dtable);

// Norms.

typedef struct {
    // LayerNorm (subtract the mean, divide by the standard deviation) if nonzero, else RMSNorm (divide by the root mean
    // square).
    int32_t is_layer;
    float epsilon;
} detox_cuda_norm_kind;

// y[R][C] = norm(x[R][C]) weight[C] + bias[C]; bias may be null.
detox_cuda_status detox_cuda_norm(
    detox_cuda_device* device, const detox_cuda_norm_kind* kind, const float* x, const float* weight, const float* bias,
    int64_t n_rows, int64_t n_cols, float* y);
// dx[R][C] += …. dweight[C] and dbias[C] += … if they are not null.
detox_cuda_status detox_cuda_norm_back(
    detox_cuda_device* device, const detox_cuda_norm_kind* kind, const float* x, const float* weight, const float* dy,
    int64_t n_rows, int64_t n_cols, float* dx, float* dweight, float* dbias);

// Rotary position embedding.

// Rotates each head of x[R][heads][D] by its row's position, with `back` by the opposite angle. A pair is (2i, 2i + 1),
// with `halves` (i, i + n_pairs). frequencies: host [n_pairs].
detox_cuda_status detox_cuda_rope(
    detox_cuda_device* device, const detox_cuda_rows* rows, const float* frequencies, int32_t n_pairs, int32_t halves,
    int32_t back, int64_t n_heads, int64_t head_dim, float* x);

// Attention.

typedef struct {
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_dim;
    // Multiplies the scores.
    float scale;
    // A row attends to positions less than `window` before its own. 0: no limit.
    int32_t window;
    // ALiBi slope of each head: host [H], or null for no ALiBi.
    const float* slopes;
} detox_cuda_attention_kind;

// out[R][H][D] from q[R][H][D], k[R][K][D], v[R][K][D]. lse[R][H] = log of the sum of the exponentiated scores.
detox_cuda_status detox_cuda_attention(
    detox_cuda_device* device, const detox_cuda_attention_kind* kind, const detox_cuda_rows* rows, const float* q,
    const float* k, const float* v, float* out, float* lse);
// dq[R][H][D] += …, dk[R][K][D] += …, dv[R][K][D] += …
detox_cuda_status detox_cuda_attention_back(
    detox_cuda_device* device, const detox_cuda_attention_kind* kind, const detox_cuda_rows* rows, const float* q,
    const float* k, const float* v, const float* out, const float* lse, const float* dout, float* dq, float* dk,
    float* dv);

// Activations.

typedef enum {
    DETOX_CUDA_SILU = 0,
    // The tanh approximation.
    DETOX_CUDA_GELU = 1,
} detox_cuda_activation;

// y[n] = f(gate[n]) up[n], or f(gate[n]) if up is null.
detox_cuda_status detox_cuda_activate(
    detox_cuda_device* device, detox_cuda_activation activation, const float* gate, const float* up, int64_t n,
    float* y);
// dgate[n] += …, dup[n] += …. up and dup are either both null or both not null.
detox_cuda_status detox_cuda_activate_back(
    detox_cuda_device* device, detox_cuda_activation activation, const float* gate, const float* up, const float* dy,
    int64_t n, float* dgate, float* dup);

// Sums and copies.

// y[n] += scale x[n]
detox_cuda_status detox_cuda_add(detox_cuda_device* device, float scale, const float* x, int64_t n, float* y);
// y[n] = x[n]
detox_cuda_status detox_cuda_copy(detox_cuda_device* device, const float* x, int64_t n, float* y);
// y[R][C] += bias[C]
detox_cuda_status
detox_cuda_add_to_rows(detox_cuda_device* device, const float* bias, int64_t n_rows, int64_t n_cols, float* y);
// dbias[C] += the sum over the rows of dy[R][C]
detox_cuda_status
detox_cuda_sum_rows(detox_cuda_device* device, const float* dy, int64_t n_rows, int64_t n_cols, float* dbias);
// x[R][C] *= factors[R]
detox_cuda_status
detox_cuda_scale_rows(detox_cuda_device* device, const float* factors, int64_t n_rows, int64_t n_cols, float* x);
// dst[r][to .. to + n] += src[r][from .. from + n], src[R][src_cols], dst[R][dst_cols].
detox_cuda_status detox_cuda_add_columns(
    detox_cuda_device* device, const float* src, int64_t src_cols, int64_t from, int64_t n_rows, float* dst,
    int64_t dst_cols, int64_t to, int64_t n);

// Log-probabilities.

// logps[n] = log-probabilities of outputs [first, first + n) under logits[n][V] * scale. With `gradient`, overwrites
// logits with scale (onehot - softmax).
detox_cuda_status detox_cuda_logprobs(
    detox_cuda_device* device, const detox_cuda_rows* rows, int64_t first, int64_t n, float scale, int64_t n_vocab,
    int32_t gradient, float* logits, float* logps);

// Losses on preference pairs.

typedef enum {
    DETOX_CUDA_SIGMOID = 0,
    DETOX_CUDA_IPO = 1,
    DETOX_CUDA_HINGE = 2,
} detox_cuda_loss;

typedef struct {
    detox_cuda_loss loss;
    double beta;
    // For the sigmoid loss.
    double label_smoothing;
    // Pairs that the loss is averaged over. The batch may hold only some of them.
    int64_t n_pairs;
} detox_cuda_preference;

typedef struct {
    // Sums of the answers' log-probabilities.
    double policy_chosen;
    double policy_rejected;
    // The loss of this pair alone, and its derivatives with respect to the two sums.
    double loss;
    double dchosen;
    double drejected;
} detox_cuda_pair_cost;

// dlogps[n_outputs] = derivatives of the mean loss with respect to logps[n_outputs]. references: host [pairs][2], chosen
// before rejected. costs: host [pairs].
detox_cuda_status detox_cuda_preference_loss(
    detox_cuda_device* device, const detox_cuda_preference* preference, const detox_cuda_rows* rows,
    const double* references, const float* logps, float* dlogps, detox_cuda_pair_cost* costs);

// Optimizers.

// A trained tensor. Each array has n numbers.
typedef struct {
    int64_t n;
    const float* gradient;
    // Unused by RMSprop.
    float* mean;
    float* mean_square;
    float* value;
} detox_cuda_parameter;

typedef struct {
    float learning_rate;
    float alpha;
    float epsilon;
    float gradient_scale;
} detox_cuda_rmsprop_step;

typedef struct {
    float learning_rate;
    float beta1;
    float beta2;
    float epsilon;
    float weight_decay;
    float gradient_scale;
    // correction1 = 1 - beta1^step, correction2 = sqrt(1 - beta2^step).
    float correction1;
    float correction2;
} detox_cuda_adamw_step;

// sum: host, the sum of the squares of all x[T][n[t]]. x and n: host [T].
detox_cuda_status detox_cuda_square_sum(
    detox_cuda_device* device, const float* const* x, const int64_t* n, int64_t n_tensors, double* sum);
// parameters: host [T].
detox_cuda_status detox_cuda_rmsprop(
    detox_cuda_device* device, const detox_cuda_rmsprop_step* step, const detox_cuda_parameter* parameters,
    int64_t n_tensors);
detox_cuda_status detox_cuda_adamw(
    detox_cuda_device* device, const detox_cuda_adamw_step* step, const detox_cuda_parameter* parameters,
    int64_t n_tensors);

#ifdef __cplusplus
}
#endif

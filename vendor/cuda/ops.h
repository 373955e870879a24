// What the trainer asks of an NVIDIA GPU, as a C interface: one function an operation of the trait `Device` in
// src/train/device/mod.rs, whose documentation is the contract. Narrow on purpose: this program is the only caller.
//
// Letters of shapes, slowest axis first: R rows of a batch (one a token), C columns, I and O a matrix's inputs and
// outputs, H heads, K key and value heads, D a head's size, V the vocabulary, T tensors.
//
// Pointers are to the GPU's memory, from `detox_cuda_allocate`, unless the comment says "host". Numbers are f32, dense.
// Gradients are added to what a buffer holds; everything else overwrites. Operations of one device are carried out in
// the order they were called in; only those that give numbers to the host wait for them. Any thread may call.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Limits of the kernels: heads of a block, numbers of a head, and pairs of a head's numbers that are rotated.
#define DETOX_CUDA_MOST_HEADS 256
#define DETOX_CUDA_MOST_HEAD_DIM 256
#define DETOX_CUDA_MOST_ROPE_PAIRS 256

// What came of a call. `detox_cuda_last_error` has the words.
typedef enum {
    DETOX_CUDA_OK = 0,
    // The GPU's memory does not suffice; nothing was computed.
    DETOX_CUDA_OUT_OF_MEMORY = 1,
    // There is no GPU, or none of that number, or another process holds it alone.
    DETOX_CUDA_NO_DEVICE = 2,
    // The driver is missing, or too old for this build.
    DETOX_CUDA_DRIVER = 3,
    // This GPU, or this shape, is one that the program has nothing for, however it is built.
    DETOX_CUDA_UNSUPPORTED = 4,
    // An argument is out of its range: a fault of the caller.
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

// The words of this thread's last status other than OK; valid until its next call.
const char* detox_cuda_last_error(void);

// Devices.

typedef struct {
    // As the driver calls it, ends with 0.
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
// Bytes that a process could still have, and bytes in all.
detox_cuda_status detox_cuda_memory(detox_cuda_device* device, size_t* n_free, size_t* n_total);
// Gives back to the driver what is kept of released memory for later.
detox_cuda_status detox_cuda_trim(detox_cuda_device* device);
// Waits for all that was asked for.
detox_cuda_status detox_cuda_wait(detox_cuda_device* device);

// Memory.

// Not initialised. Aligned to 256 bytes.
detox_cuda_status detox_cuda_allocate(detox_cuda_device* device, size_t n_bytes, void** memory);
detox_cuda_status detox_cuda_release(detox_cuda_device* device, void* memory);
detox_cuda_status detox_cuda_clear(detox_cuda_device* device, size_t n_bytes, void* memory);
// From host [n_bytes]; the host's memory is free when the call returns.
detox_cuda_status detox_cuda_write(detox_cuda_device* device, const void* host, size_t n_bytes, void* memory);
// To host [n_bytes].
detox_cuda_status detox_cuda_read(detox_cuda_device* device, const void* memory, size_t n_bytes, void* host);

// Batches.

typedef struct {
    // Rows [first, end), each of which sees those of them before it and itself.
    int32_t first;
    int32_t end;
    // Rows before it that all of them see.
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
    const detox_cuda_segment* segments; // host [n_segments], together all rows once
    const int32_t* output_rows;         // host [n_outputs]
    const int32_t* output_tokens;       // host [n_outputs]
    const int32_t* answer_ends;         // host [n_answers], outputs up to the end of each answer; all, if any
} detox_cuda_batch;

detox_cuda_status
detox_cuda_rows_open(detox_cuda_device* device, const detox_cuda_batch* batch, detox_cuda_rows** rows);
void detox_cuda_rows_close(detox_cuda_rows* rows);

// Which row of a table a row of a batch looks at.
typedef enum {
    DETOX_CUDA_TOKEN = 0,
    DETOX_CUDA_POSITION = 1,
    // The rows of outputs [first, first + n).
    DETOX_CUDA_OUTPUT = 2,
} detox_cuda_index;

// Frozen matrices.

typedef struct {
    // ggml's number of the type.
    int32_t type;
    int64_t n_in;
    int64_t n_out;
    // The file's blocks, row after row, [O][I]; null where only the copy is kept.
    const void* blocks;
    // The numbers rounded to bf16, [O][I]; null where each product makes them again.
    const uint16_t* rounded;
} detox_cuda_matrix;

// Whether there is a kernel that reads blocks of this type, and how many numbers and bytes are in one.
detox_cuda_status detox_cuda_block(int32_t type, int32_t* n_numbers, int32_t* n_bytes);
// rounded[n] = the numbers of blocks [n], n a whole number of blocks.
detox_cuda_status
detox_cuda_round_blocks(detox_cuda_device* device, int32_t type, const void* blocks, int64_t n, uint16_t* rounded);
// y[R][O] = x[R][I] W^T; both operands rounded to bf16, sums in f32.
detox_cuda_status
detox_cuda_product(detox_cuda_device* device, const detox_cuda_matrix* w, const float* x, int64_t n_rows, float* y);
// ys[i][R][O] = x[R][I] W^T for n matrices that read one input: x is rounded once. ws and ys: host [n].
detox_cuda_status detox_cuda_products(
    detox_cuda_device* device, const detox_cuda_matrix* ws, int64_t n, const float* x, int64_t n_rows,
    float* const* ys);
// dx[R][I] += dy[R][O] W
detox_cuda_status detox_cuda_product_back(
    detox_cuda_device* device, const detox_cuda_matrix* w, const float* dy, int64_t n_rows, float* dx);

// For tests: bytes of rounded numbers that a product of blocks makes at a time, rounded down to a multiple of 256 rows,
// but not below 256 rows. 256 MiB at first.
detox_cuda_status detox_cuda_set_part(detox_cuda_device* device, size_t n_bytes);

typedef struct {
    int64_t m;
    int64_t n;
    int64_t k;
    // A is [k][m], not [m][k]; B is [n][k], not [k][n].
    int32_t transpose_a;
    int32_t transpose_b;
    float alpha;
    // At 0 what C held is not read.
    float beta;
} detox_cuda_gemm;

// c[m][n] = beta c + alpha op(a) op(b); operands rounded to TF32 (10 bits of fraction), sums in f32.
detox_cuda_status
detox_cuda_multiply(detox_cuda_device* device, const detox_cuda_gemm* gemm, const float* a, const float* b, float* c);

// Rows of tables.

// y[R][I] = scale W[token of the row]; W must have its blocks.
detox_cuda_status detox_cuda_embed(
    detox_cuda_device* device, const detox_cuda_matrix* w, const detox_cuda_rows* rows, float scale, float* y);
// y[n][C] = scale table[index of the row][C]
detox_cuda_status detox_cuda_gather(
    detox_cuda_device* device, const float* table, int64_t n_cols, detox_cuda_index index, int64_t first, int64_t n,
    const detox_cuda_rows* rows, float scale, float* y);
// dtable[index of the row][C] += scale dy[n][C], rows in their order.
detox_cuda_status detox_cuda_scatter_add(
    detox_cuda_device* device, const float* dy, int64_t n_cols, detox_cuda_index index, int64_t first, int64_t n,
    const detox_cuda_rows* rows, float scale, float* dtable);

// Norms.

typedef struct {
    // The mean is taken away, and the deviation divided by; else the root of the mean square.
    int32_t is_layer;
    float epsilon;
} detox_cuda_norm_kind;

// y[R][C] = norm(x[R][C]) weight[C] + bias[C]; bias may be null.
detox_cuda_status detox_cuda_norm(
    detox_cuda_device* device, const detox_cuda_norm_kind* kind, const float* x, const float* weight, const float* bias,
    int64_t n_rows, int64_t n_cols, float* y);
// dx[R][C] += …; dweight[C] and dbias[C] += … where they are not null.
detox_cuda_status detox_cuda_norm_back(
    detox_cuda_device* device, const detox_cuda_norm_kind* kind, const float* x, const float* weight, const float* dy,
    int64_t n_rows, int64_t n_cols, float* dx, float* dweight, float* dbias);

// Rotary position embedding.

// Rotates each head of x[R][heads][D] by its row's position; back, by the opposite angle. A pair is (2i, 2i + 1), or
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
    // A row sees positions that are less than so many before its own; 0 for all.
    int32_t window;
    // ALiBi's slope of each head: host [H], or null for none.
    const float* slopes;
} detox_cuda_attention_kind;

// out[R][H][D] from q[R][H][D], k[R][K][D], v[R][K][D]; lse[R][H].
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
    // By tanh.
    DETOX_CUDA_GELU = 1,
} detox_cuda_activation;

// y[n] = f(gate[n]) up[n], or f(gate) where up is null.
detox_cuda_status detox_cuda_activate(
    detox_cuda_device* device, detox_cuda_activation activation, const float* gate, const float* up, int64_t n,
    float* y);
// dgate[n] += …, dup[n] += …; up and dup are null together.
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

// logps[n] of outputs [first, first + n) under logits[n][V] * scale; with `gradient`, logits become
// scale (onehot - softmax).
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
    // Of the sigmoid.
    double label_smoothing;
    // The loss is the mean over so many pairs, of which the batch may be a part.
    int64_t n_pairs;
} detox_cuda_preference;

typedef struct {
    // Sums of the answers' log-probabilities.
    double policy_chosen;
    double policy_rejected;
    // Of this pair alone, and its derivatives with respect to the two sums.
    double loss;
    double dchosen;
    double drejected;
} detox_cuda_pair_cost;

// dlogps[n_outputs] = the derivatives of the mean loss; costs: host [pairs]. logps[n_outputs]; references: host
// [pairs][2], chosen before rejected.
detox_cuda_status detox_cuda_preference_loss(
    detox_cuda_device* device, const detox_cuda_preference* preference, const detox_cuda_rows* rows,
    const double* references, const float* logps, float* dlogps, detox_cuda_pair_cost* costs);

// Optimizers.

// A trained tensor: all have n numbers.
typedef struct {
    int64_t n;
    const float* gradient;
    // RMSprop has none.
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
    // 1 - beta1^step, and the root of 1 - beta2^step.
    float correction1;
    float correction2;
} detox_cuda_adamw_step;

// sum: host, the squares of x[T][n[t]]; x and n: host [T].
detox_cuda_status detox_cuda_square_sum(
    detox_cuda_device* device, const float* const* x, const int64_t* n, int64_t n_tensors, double* sum);
// parameters: host [T]
detox_cuda_status detox_cuda_rmsprop(
    detox_cuda_device* device, const detox_cuda_rmsprop_step* step, const detox_cuda_parameter* parameters,
    int64_t n_tensors);
detox_cuda_status detox_cuda_adamw(
    detox_cuda_device* device, const detox_cuda_adamw_step* step, const detox_cuda_parameter* parameters,
    int64_t n_tensors);

#ifdef __cplusplus
}
#endif

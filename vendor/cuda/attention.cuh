// Shared by attention's forward and backward: tiles of rows in shared memory, and the attention mask.
//
// A thread block has 128 threads: 16 rows of 8. A tile has `TILE` rows of D numbers. Thread (y, x) computes rows y,
// y + 16, … and columns x, x + 8, …. That is TILE / 16 by TILE / 8 scores, and TILE / 16 by `COLS` numbers of a head,
// where `COLS` is D / 8 rounded up.
#pragma once

#include "device.cuh"
#include "reduce.cuh"
#include "rows.cuh"

constexpr int ATTENTION_THREADS = 128;
constexpr int THREAD_ROWS = 16;
constexpr int THREAD_COLS = 8;

struct AttentionShape {
    int n_head, n_head_kv, dim;
    float scale;
    int window;
    // An array of fixed size, so that the struct can be passed as a kernel argument.
    float slopes[DETOX_CUDA_MOST_HEADS];

    // Distance between rows of a tile, in numbers. Odd, so that threads reading a column have no bank conflicts.
    __host__ __device__ int stride() const { return dim | 1; }
};

struct RowView {
    const int32_t* positions;
    const int32_t* prefix_first;
    const int32_t* prefix_end;
    const int32_t* segment_first;
};

// Copies rows [first, first + n) of one head of x[R][n_heads][D] to tile[TILE][stride]. Fills the other rows with zeros.
template <int TILE>
__device__ inline void
load_tile(const float* x, int first, int n, int n_heads, int head, int dim, int stride, float* tile) {
    for (int i = threadIdx.x; i < TILE * dim; i += ATTENTION_THREADS) {
        int row = i / dim, col = i % dim;
        tile[row * stride + col] = row < n ? x[((int64_t)(first + row) * n_heads + head) * dim + col] : 0.0f;
    }
}

// sums[i][j] = dot product of row y + 16 i of a and row x + 8 j of b. a and b are [TILE][stride].
template <int TILE>
__device__ inline void multiply_tiles(
    const float* a, const float* b, int dim, int stride, float (&sums)[TILE / THREAD_ROWS][TILE / THREAD_COLS]) {
    int y = threadIdx.x / THREAD_COLS, x = threadIdx.x % THREAD_COLS;
    for (int i = 0; i < TILE / THREAD_ROWS; i++)
        for (int j = 0; j < TILE / THREAD_COLS; j++) sums[i][j] = 0.0f;
    for (int d = 0; d < dim; d++) {
        float of_a[TILE / THREAD_ROWS], of_b[TILE / THREAD_COLS];
        for (int i = 0; i < TILE / THREAD_ROWS; i++) of_a[i] = a[(y + THREAD_ROWS * i) * stride + d];
        for (int j = 0; j < TILE / THREAD_COLS; j++) of_b[j] = b[(x + THREAD_COLS * j) * stride + d];
        for (int i = 0; i < TILE / THREAD_ROWS; i++)
            for (int j = 0; j < TILE / THREAD_COLS; j++) sums[i][j] = fmaf(of_a[i], of_b[j], sums[i][j]);
    }
}

// sums[i][j] += sum over n rows of factors[y + 16 i][row] tile[row][x + 8 j]. factors is [TILE][TILE + 1].
template <int TILE, int COLS>
__device__ inline void add_weighted(
    const float* factors, const float* tile, int n, int dim, int stride, float (&sums)[TILE / THREAD_ROWS][COLS]) {
    int y = threadIdx.x / THREAD_COLS, x = threadIdx.x % THREAD_COLS;
    for (int row = 0; row < n; row++) {
        float factor[TILE / THREAD_ROWS];
        for (int i = 0; i < TILE / THREAD_ROWS; i++) factor[i] = factors[(y + THREAD_ROWS * i) * (TILE + 1) + row];
        for (int j = 0; j < COLS; j++) {
            int col = x + THREAD_COLS * j;
            float number = col < dim ? tile[row * stride + col] : 0.0f;
            for (int i = 0; i < TILE / THREAD_ROWS; i++) sums[i][j] = fmaf(factor[i], number, sums[i][j]);
        }
    }
}

// Whether row `query` attends to row `key`.
__device__ inline bool sees(const AttentionShape& shape, const RowView& rows, int query, int key) {
    bool is_prefix = key >= rows.prefix_first[query] && key < rows.prefix_end[query];
    bool is_own = key >= rows.segment_first[query] && key <= query;
    if (!is_prefix && !is_own) return false;
    return shape.window == 0 || rows.positions[query] - rows.positions[key] < shape.window;
}

__device__ inline float
score_of(const AttentionShape& shape, const RowView& rows, int head, int query, int key, float product) {
    float distance = (float)(rows.positions[query] - rows.positions[key]);
    return product * shape.scale - shape.slopes[head] * distance;
}

// Checks the arguments and returns the kernel's parameters.
AttentionShape attention_shape(const detox_cuda_attention_kind* kind, const detox_cuda_rows* rows);

inline RowView row_view(const detox_cuda_rows& rows) {
    return {rows.positions, rows.prefix_first, rows.prefix_end, rows.segment_first};
}

// Requests shared memory for a kernel. Without a request, a kernel gets at most 48 KiB.
template <typename... Parameters>
void allow_shared(detox_cuda_device& device, void (*kernel)(Parameters...), size_t n_bytes) {
    if (n_bytes > device.properties.sharedMemPerBlockOptin)
        throw Failure(
            DETOX_CUDA_UNSUPPORTED, "attention needs " + std::to_string(n_bytes) +
                                        " bytes of shared memory; this GPU has " +
                                        std::to_string(device.properties.sharedMemPerBlockOptin));
    check(
        cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)n_bytes),
        "requesting shared memory");
}

// Calls `work` with the tiles, tile size and `COLS` for heads of size `dim`. Large heads use smaller tiles, so that four
// tiles fit into the 99 KiB of shared memory of desktop GPUs.
template <typename Work>
void with_tiles(const detox_cuda_rows& rows, int dim, Work work) {
    if (dim <= 64)
        work(rows.large, std::integral_constant<int, LARGE_TILE>{}, std::integral_constant<int, 8>{});
    else if (dim <= 128)
        work(rows.large, std::integral_constant<int, LARGE_TILE>{}, std::integral_constant<int, 16>{});
    else
        work(rows.small, std::integral_constant<int, SMALL_TILE>{}, std::integral_constant<int, 32>{});
}

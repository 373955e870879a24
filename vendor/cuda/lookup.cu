// Table lookups by token, position and output.
#include "blocks.cuh"
#include "device.cuh"
#include "rows.cuh"

namespace {

template <int TYPE>
__global__ void
embed_kernel(const uint8_t* blocks, int64_t n_in, const int32_t* tokens, int64_t n_rows, float scale, float* y) {
    int64_t n_groups = (n_in + GROUP - 1) / GROUP;
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_rows * n_groups) return;
    int64_t row = i / n_groups, col = i % n_groups * GROUP;
    int n_here = n_in - col < GROUP ? (int)(n_in - col) : GROUP;
    float x[GROUP];
    read_numbers<TYPE>(blocks, tokens[row] * n_in + col, n_here, x);
    for (int j = 0; j < n_here; j++) y[row * n_in + col + j] = scale * x[j];
}

__global__ void gather_kernel(
    const float* table, int64_t n_cols, const int32_t* index, int64_t first, int64_t n, float scale, float* y) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n * n_cols) return;
    y[i] = scale * table[index[first + i / n_cols] * n_cols + i % n_cols];
}

// Among the rows with the same index, the first adds up all of them, in order.
__global__ void
scatter_add_kernel(const float* dy, int64_t n_cols, Chain chain, int64_t first, int64_t n, float scale, float* dtable) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n * n_cols) return;
    int64_t row = first + i / n_cols, col = i % n_cols;
    if (chain.previous[row] >= first) return;
    float* to = dtable + chain.index[row] * n_cols + col;
    float sum = *to;
    for (int64_t other = row; other >= 0 && other < first + n; other = chain.next[other])
        sum += scale * dy[(other - first) * n_cols + col];
    *to = sum;
}

Chain chain_of(const detox_cuda_rows* rows, detox_cuda_index index, int64_t first, int64_t n) {
    require(rows != nullptr && first >= 0 && n >= 0, "rows of a batch");
    if (index == DETOX_CUDA_OUTPUT) {
        require(first + n <= rows->n_outputs, "outputs of the batch");
        return rows->outputs;
    }
    require(first == 0 && n == rows->n_rows, "all rows of the batch");
    return index == DETOX_CUDA_TOKEN ? rows->tokens : rows->of_positions;
}

} // namespace

detox_cuda_status detox_cuda_embed(
    detox_cuda_device* device, const detox_cuda_matrix* w, const detox_cuda_rows* rows, float scale, float* y) {
    return on_device(device, [&] {
        require(w != nullptr && rows != nullptr && w->n_in > 0, "a matrix with rows");
        require(w->blocks != nullptr, "a matrix with its blocks");
        if (rows->n_rows == 0) return;
        int64_t n = rows->n_rows * ((w->n_in + GROUP - 1) / GROUP);
        bool known = with_type(w->type, [&](auto, auto id) {
            launch(
                embed_kernel<id()>, dim3(blocks_of(n, THREADS)), dim3(THREADS), 0, device->stream,
                (const uint8_t*)w->blocks, w->n_in, rows->tokens.index, rows->n_rows, scale, y);
        });
        require(known, "a supported type");
        check_launch("reading embeddings");
    });
}

detox_cuda_status detox_cuda_gather(
    detox_cuda_device* device, const float* table, int64_t n_cols, detox_cuda_index index, int64_t first, int64_t n,
    const detox_cuda_rows* rows, float scale, float* y) {
    return on_device(device, [&] {
        Chain chain = chain_of(rows, index, first, n);
        if (n == 0 || n_cols == 0) return;
        launch(
            gather_kernel, dim3(blocks_of(n * n_cols, THREADS)), dim3(THREADS), 0, device->stream, table, n_cols,
            chain.index, first, n, scale, y);
        check_launch("gathering rows");
    });
}

detox_cuda_status detox_cuda_scatter_add(
    detox_cuda_device* device, const float* dy, int64_t n_cols, detox_cuda_index index, int64_t first, int64_t n,
    const detox_cuda_rows* rows, float scale, float* dtable) {
    return on_device(device, [&] {
        Chain chain = chain_of(rows, index, first, n);
        if (n == 0 || n_cols == 0) return;
        launch(
            scatter_add_kernel, dim3(blocks_of(n * n_cols, THREADS)), dim3(THREADS), 0, device->stream, dy, n_cols,
            chain, first, n, scale, dtable);
        check_launch("scattering gradients");
    });
}

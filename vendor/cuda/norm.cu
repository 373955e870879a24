// Norms over rows: RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450).
#include "device.cuh"
#include "reduce.cuh"
#include "sums.cuh"

namespace {

// Short rows, such as heads, use one warp each, eight to a thread block. Longer rows use one block each.
constexpr int SHORT = 1024;

struct Geometry {
    dim3 grid, block;
    size_t shared_bytes;
};

Geometry geometry(int64_t n_rows, int64_t n_cols) {
    if (n_cols <= SHORT) return {dim3(blocks_of(n_rows, THREADS / WARP)), dim3(WARP, THREADS / WARP), 0};
    return {dim3((unsigned)n_rows), dim3(THREADS), WARP * sizeof(float)};
}

// The mean to subtract (0 for RMSNorm), and the factor to multiply by: one over the deviation or root mean square.
__device__ void
statistics(detox_cuda_norm_kind kind, const float* x, int64_t n_cols, float* shared, float& mean, float& inverse) {
    mean = 0.0f;
    if (kind.is_layer) {
        float sum = 0.0f;
        for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x) sum += x[c];
        mean = row_sum(sum, shared) / (float)n_cols;
    }
    float square = 0.0f;
    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x) square += (x[c] - mean) * (x[c] - mean);
    square = row_sum(square, shared) / (float)n_cols;
    inverse = 1.0f / sqrtf(square + kind.epsilon);
}

__global__ void norm_kernel(
    detox_cuda_norm_kind kind, const float* x, const float* weight, const float* bias, int64_t n_rows, int64_t n_cols,
    float* y) {
    SHARED_FLOATS(shared);
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    // Only whole warps or whole blocks return here.
    if (row >= n_rows) return;
    x += row * n_cols;
    y += row * n_cols;
    float mean, inverse;
    statistics(kind, x, n_cols, shared, mean, inverse);
    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x) {
        float normed = (x[c] - mean) * inverse * weight[c];
        y[c] = bias != nullptr ? normed + bias[c] : normed;
    }
}

// With r one over the deviation, n = (x - mean) r and g = dy weight: dx = r (g - mean(g) - n mean(g n)). RMSNorm has no
// mean(g) term. Stores mean and r of each row in kept[R][2], unless it is null.
__global__ void norm_back_kernel(
    detox_cuda_norm_kind kind, const float* x, const float* weight, const float* dy, int64_t n_rows, int64_t n_cols,
    float* dx, float* kept) {
    SHARED_FLOATS(shared);
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= n_rows) return;
    x += row * n_cols;
    dy += row * n_cols;
    dx += row * n_cols;
    float mean, inverse;
    statistics(kind, x, n_cols, shared, mean, inverse);
    float sum_g = 0.0f, sum_gn = 0.0f;
    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x) {
        float g = dy[c] * weight[c];
        sum_g += g;
        sum_gn += g * ((x[c] - mean) * inverse);
    }
    float mean_g = kind.is_layer ? row_sum(sum_g, shared) / (float)n_cols : 0.0f;
    float mean_gn = row_sum(sum_gn, shared) / (float)n_cols;
    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x)
        dx[c] += inverse * (dy[c] * weight[c] - mean_g - (x[c] - mean) * inverse * mean_gn);
    if (kept != nullptr && threadIdx.x == 0) {
        kept[2 * row] = mean;
        kept[2 * row + 1] = inverse;
    }
}

// A row's contribution to the gradient of a weight.
struct OfWeight {
    const float* x;
    const float* dy;
    const float* kept;
    int64_t n_cols;
    __device__ float operator()(int64_t row, int64_t col) const {
        int64_t at = row * n_cols + col;
        return dy[at] * (x[at] - kept[2 * row]) * kept[2 * row + 1];
    }
};

} // namespace

detox_cuda_status detox_cuda_norm(
    detox_cuda_device* device, const detox_cuda_norm_kind* kind, const float* x, const float* weight, const float* bias,
    int64_t n_rows, int64_t n_cols, float* y) {
    return on_device(device, [&] {
        require(kind != nullptr && n_cols > 0 && n_rows >= 0, "a norm kind and at least one column");
        if (n_rows == 0) return;
        Geometry g = geometry(n_rows, n_cols);
        launch(norm_kernel, g.grid, g.block, g.shared_bytes, device->stream, *kind, x, weight, bias, n_rows, n_cols, y);
        check_launch("a norm");
    });
}

detox_cuda_status detox_cuda_norm_back(
    detox_cuda_device* device, const detox_cuda_norm_kind* kind, const float* x, const float* weight, const float* dy,
    int64_t n_rows, int64_t n_cols, float* dx, float* dweight, float* dbias) {
    return on_device(device, [&] {
        require(kind != nullptr && n_cols > 0 && n_rows >= 0, "a norm kind and at least one column");
        if (n_rows == 0) return;
        Geometry g = geometry(n_rows, n_cols);
        Scratch<float> kept(*device, dweight != nullptr ? (size_t)(2 * n_rows) : 0);
        launch(
            norm_back_kernel, g.grid, g.block, g.shared_bytes, device->stream, *kind, x, weight, dy, n_rows, n_cols, dx,
            dweight != nullptr ? (float*)kept : nullptr);
        check_launch("a norm's gradient");
        if (dweight != nullptr) sum_over_rows(*device, OfWeight{x, dy, kept, n_cols}, n_rows, n_cols, dweight);
        if (dbias != nullptr) sum_over_rows(*device, Plain{dy, n_cols}, n_rows, n_cols, dbias);
    });
}

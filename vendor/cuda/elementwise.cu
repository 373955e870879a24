// Sums and copies of buffers, rows and columns.
#include "device.cuh"
#include "sums.cuh"

namespace {

__global__ void add_kernel(float scale, const float* x, int64_t n, float* y) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += scale * x[i];
}

__global__ void add_to_rows_kernel(const float* bias, int64_t n, int64_t n_cols, float* y) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += bias[i % n_cols];
}

__global__ void scale_rows_kernel(const float* factors, int64_t n, int64_t n_cols, float* x) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= factors[i / n_cols];
}

__global__ void add_columns_kernel(
    const float* src, int64_t src_cols, int64_t from, int64_t n_rows, float* dst, int64_t dst_cols, int64_t to,
    int64_t n) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_rows * n) return;
    int64_t row = i / n, col = i % n;
    dst[row * dst_cols + to + col] += src[row * src_cols + from + col];
}

} // namespace

detox_cuda_status detox_cuda_add(detox_cuda_device* device, float scale, const float* x, int64_t n, float* y) {
    return on_device(device, [&] {
        if (n == 0) return;
        launch(add_kernel, dim3(blocks_of(n, THREADS)), dim3(THREADS), 0, device->stream, scale, x, n, y);
        check_launch("a sum");
    });
}

detox_cuda_status detox_cuda_copy(detox_cuda_device* device, const float* x, int64_t n, float* y) {
    return on_device(device, [&] {
        if (n == 0) return;
        check(
            cudaMemcpyAsync(y, x, (size_t)n * sizeof(float), cudaMemcpyDeviceToDevice, device->stream),
            "copying numbers");
    });
}

detox_cuda_status
detox_cuda_add_to_rows(detox_cuda_device* device, const float* bias, int64_t n_rows, int64_t n_cols, float* y) {
    return on_device(device, [&] {
        int64_t n = n_rows * n_cols;
        if (n == 0) return;
        launch(add_to_rows_kernel, dim3(blocks_of(n, THREADS)), dim3(THREADS), 0, device->stream, bias, n, n_cols, y);
        check_launch("adding a bias to rows");
    });
}

detox_cuda_status
detox_cuda_sum_rows(detox_cuda_device* device, const float* dy, int64_t n_rows, int64_t n_cols, float* dbias) {
    return on_device(device, [&] {
        if (n_rows == 0 || n_cols == 0) return;
        sum_over_rows(*device, Plain{dy, n_cols}, n_rows, n_cols, dbias);
    });
}

detox_cuda_status
detox_cuda_scale_rows(detox_cuda_device* device, const float* factors, int64_t n_rows, int64_t n_cols, float* x) {
    return on_device(device, [&] {
        int64_t n = n_rows * n_cols;
        if (n == 0) return;
        launch(
            scale_rows_kernel, dim3(blocks_of(n, THREADS)), dim3(THREADS), 0, device->stream, factors, n, n_cols, x);
        check_launch("multiplying rows");
    });
}

detox_cuda_status detox_cuda_add_columns(
    detox_cuda_device* device, const float* src, int64_t src_cols, int64_t from, int64_t n_rows, float* dst,
    int64_t dst_cols, int64_t to, int64_t n) {
    return on_device(device, [&] {
        require(from >= 0 && from + n <= src_cols && to >= 0 && to + n <= dst_cols, "columns within both buffers");
        if (n_rows == 0 || n == 0) return;
        launch(
            add_columns_kernel, dim3(blocks_of(n_rows * n, THREADS)), dim3(THREADS), 0, device->stream, src, src_cols,
            from, n_rows, dst, dst_cols, to, n);
        check_launch("adding columns");
    });
}

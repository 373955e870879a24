// Column sums over the rows of a batch. Sums parts of the rows first, then the parts, both in a fixed order.
#pragma once

#include "device.cuh"

// Rows per part.
constexpr int64_t PART_ROWS = DETOX_CUDA_SUM_ROWS;

// x[R][C] itself.
struct Plain {
    const float* x;
    int64_t n_cols;
    __device__ float operator()(int64_t row, int64_t col) const { return x[row * n_cols + col]; }
};

// parts[n_parts][C] = sum of of(row, col) over the rows of each part.
template <typename Of>
__global__ void sum_parts_kernel(Of of, int64_t n_rows, int64_t n_cols, float* parts) {
    int64_t col = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= n_cols) return;
    int64_t first = (int64_t)blockIdx.y * PART_ROWS;
    int64_t end = first + PART_ROWS < n_rows ? first + PART_ROWS : n_rows;
    float sum = 0.0f;
    for (int64_t row = first; row < end; row++) sum += of(row, col);
    parts[(int64_t)blockIdx.y * n_cols + col] = sum;
}

// sums[C] += sum of parts[n_parts][C].
static __global__ void add_parts_kernel(const float* parts, int64_t n_parts, int64_t n_cols, float* sums) {
    int64_t col = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= n_cols) return;
    float sum = 0.0f;
    for (int64_t part = 0; part < n_parts; part++) sum += parts[part * n_cols + col];
    sums[col] += sum;
}

// sums[C] += sum over the rows of of(row, col).
template <typename Of>
void sum_over_rows(detox_cuda_device& device, Of of, int64_t n_rows, int64_t n_cols, float* sums) {
    int64_t n_parts = (n_rows + PART_ROWS - 1) / PART_ROWS;
    // A grid has at most 65535 blocks along y.
    require(n_parts <= 65535, "at most 4 million rows");
    Scratch<float> parts(device, (size_t)(n_parts * n_cols));
    launch(
        sum_parts_kernel<Of>, dim3(blocks_of(n_cols, THREADS), (unsigned)n_parts), dim3(THREADS), 0, device.stream, of,
        n_rows, n_cols, (float*)parts);
    check_launch("sums of parts of rows");
    launch(
        add_parts_kernel, dim3(blocks_of(n_cols, THREADS)), dim3(THREADS), 0, device.stream, (const float*)parts,
        n_parts, n_cols, sums);
    check_launch("sums over rows");
}

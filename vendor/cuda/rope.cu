// Rotary position embedding (arXiv 2104.09864).
#include "device.cuh"
#include "rows.cuh"

namespace {

// Passed by value, as a kernel argument.
struct Frequencies {
    float of_pair[DETOX_CUDA_MOST_ROPE_PAIRS];
};

// One thread rotates one pair in all heads of a row, so that the angle's sine and cosine are computed once.
__global__ void rope_kernel(
    Frequencies frequencies, const int32_t* positions, int64_t n_rows, int n_pairs, int halves, int back,
    int64_t n_heads, int64_t head_dim, float* x) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_rows * n_pairs) return;
    int64_t row = i / n_pairs;
    int pair = (int)(i % n_pairs);
    float sine, cosine;
    sincosf((float)positions[row] * frequencies.of_pair[pair], &sine, &cosine);
    if (back) sine = -sine;
    int a = halves ? pair : 2 * pair, b = halves ? pair + n_pairs : 2 * pair + 1;
    for (int64_t head = 0; head < n_heads; head++) {
        float* of_head = x + (row * n_heads + head) * head_dim;
        float x0 = of_head[a], x1 = of_head[b];
        of_head[a] = x0 * cosine - x1 * sine;
        of_head[b] = x0 * sine + x1 * cosine;
    }
}

} // namespace

detox_cuda_status detox_cuda_rope(
    detox_cuda_device* device, const detox_cuda_rows* rows, const float* frequencies, int32_t n_pairs, int32_t halves,
    int32_t back, int64_t n_heads, int64_t head_dim, float* x) {
    return on_device(device, [&] {
        require(rows != nullptr && n_pairs >= 0 && 2 * (int64_t)n_pairs <= head_dim, "pairs that fit into a head");
        if (n_pairs > DETOX_CUDA_MOST_ROPE_PAIRS)
            throw Failure(
                DETOX_CUDA_UNSUPPORTED, "rope: expected up to " + std::to_string(2 * DETOX_CUDA_MOST_ROPE_PAIRS) +
                                            " rotated numbers a head, found " + std::to_string(2 * n_pairs));
        if (rows->n_rows == 0 || n_pairs == 0) return;
        Frequencies all{};
        for (int i = 0; i < n_pairs; i++) all.of_pair[i] = frequencies[i];
        launch(
            rope_kernel, dim3(blocks_of(rows->n_rows * n_pairs, THREADS)), dim3(THREADS), 0, device->stream, all,
            rows->positions, rows->n_rows, n_pairs, halves, back, n_heads, head_dim, x);
        check_launch("rotating heads");
    });
}

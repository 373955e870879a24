// Log-probabilities of the predicted tokens.
#include "device.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace {

// A running softmax: the maximum so far, and the sum of exp(x - maximum) (arXiv 1805.02867).
struct Softmax {
    float most;
    float sum;
};

__device__ Softmax join(Softmax a, Softmax b) {
    // An empty side has maximum -inf, and -inf - -inf would be NaN.
    if (a.sum == 0.0f) return b;
    if (b.sum == 0.0f) return a;
    float most = fmaxf(a.most, b.most);
    return {most, a.sum * expf(a.most - most) + b.sum * expf(b.most - most)};
}

__device__ Softmax join_warp(Softmax x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        Softmax other = {__shfl_xor_sync(ALL_LANES, x.most, offset), __shfl_xor_sync(ALL_LANES, x.sum, offset)};
        x = join(x, other);
    }
    return x;
}

// One thread block per output: one pass for the softmax, a second one for the gradient.
__global__ void
logprobs_kernel(const int32_t* tokens, float scale, int64_t n_vocab, int gradient, float* logits, float* logps) {
    SHARED_FLOATS(shared);
    logits += (int64_t)blockIdx.x * n_vocab;
    int token = tokens[blockIdx.x];
    float chosen = logits[token] * scale;
    Softmax softmax = {-INFINITY, 0.0f};
    for (int64_t i = threadIdx.x; i < n_vocab; i += blockDim.x) {
        float x = logits[i] * scale;
        if (x > softmax.most) {
            softmax.sum = softmax.sum * expf(softmax.most - x) + 1.0f;
            softmax.most = x;
        } else if (x != -INFINITY) {
            // NaN also takes this branch and makes the sum NaN.
            softmax.sum += expf(x - softmax.most);
        }
    }
    softmax = join_warp(softmax);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    if (lane == 0) {
        shared[2 * warp] = softmax.most;
        shared[2 * warp + 1] = softmax.sum;
    }
    // This also ensures that every thread has read the token's logit before it is overwritten.
    __syncthreads();
    softmax = {-INFINITY, 0.0f};
    if (lane < n_warps) softmax = {shared[2 * lane], shared[2 * lane + 1]};
    softmax = join_warp(softmax);
    if (threadIdx.x == 0) logps[blockIdx.x] = (float)((double)chosen - (double)softmax.most - log((double)softmax.sum));
    if (!gradient) return;
    float factor = -scale / softmax.sum;
    for (int64_t i = threadIdx.x; i < n_vocab; i += blockDim.x) {
        float slope = factor * expf(logits[i] * scale - softmax.most);
        logits[i] = i == token ? slope + scale : slope;
    }
}

} // namespace

detox_cuda_status detox_cuda_logprobs(
    detox_cuda_device* device, const detox_cuda_rows* rows, int64_t first, int64_t n, float scale, int64_t n_vocab,
    int32_t gradient, float* logits, float* logps) {
    return on_device(device, [&] {
        require(rows != nullptr && first >= 0 && n >= 0 && first + n <= rows->n_outputs, "outputs of the batch");
        require(n_vocab > 0, "a vocabulary");
        if (n == 0) return;
        launch(
            logprobs_kernel, dim3((unsigned)n), dim3(THREADS), 2 * WARP * sizeof(float), device->stream,
            rows->output_tokens + first, scale, n_vocab, gradient, logits, logps);
        check_launch("log-probabilities");
    });
}

// The FFN's activation functions: SiLU, and GELU in its tanh approximation (arXiv 1606.08415).
#include "device.cuh"

namespace {

constexpr float SQRT_2_OVER_PI = 0.7978845608028654f;
constexpr float GELU_CUBIC = 0.044715f;

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ float gelu_tanh(float x) { return tanhf(SQRT_2_OVER_PI * (x + GELU_CUBIC * x * x * x)); }

__device__ float value_at(int activation, float x) {
    return activation == DETOX_CUDA_SILU ? x * sigmoid(x) : 0.5f * x * (1.0f + gelu_tanh(x));
}

// f(x) and f'(x).
__device__ void value_and_slope(int activation, float x, float& value, float& slope) {
    if (activation == DETOX_CUDA_SILU) {
        float s = sigmoid(x);
        value = x * s;
        slope = s * (1.0f + x * (1.0f - s));
    } else {
        float t = gelu_tanh(x);
        float inner = SQRT_2_OVER_PI * (1.0f + 3.0f * GELU_CUBIC * x * x);
        value = 0.5f * x * (1.0f + t);
        slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
    }
}

__global__ void activate_kernel(int activation, const float* gate, const float* up, int64_t n, float* y) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float value = value_at(activation, gate[i]);
    y[i] = up != nullptr ? value * up[i] : value;
}

__global__ void activate_back_kernel(
    int activation, const float* gate, const float* up, const float* dy, int64_t n, float* dgate, float* dup) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float value, slope;
    value_and_slope(activation, gate[i], value, slope);
    if (up != nullptr) {
        dgate[i] += dy[i] * up[i] * slope;
        dup[i] += dy[i] * value;
    } else {
        dgate[i] += dy[i] * slope;
    }
}

void check_activation(detox_cuda_activation activation) {
    require(activation == DETOX_CUDA_SILU || activation == DETOX_CUDA_GELU, "an activation");
}

} // namespace

detox_cuda_status detox_cuda_activate(
    detox_cuda_device* device, detox_cuda_activation activation, const float* gate, const float* up, int64_t n,
    float* y) {
    return on_device(device, [&] {
        check_activation(activation);
        if (n == 0) return;
        launch(
            activate_kernel, dim3(blocks_of(n, THREADS)), dim3(THREADS), 0, device->stream, (int)activation, gate, up,
            n, y);
        check_launch("an activation");
    });
}

detox_cuda_status detox_cuda_activate_back(
    detox_cuda_device* device, detox_cuda_activation activation, const float* gate, const float* up, const float* dy,
    int64_t n, float* dgate, float* dup) {
    return on_device(device, [&] {
        check_activation(activation);
        require((up == nullptr) == (dup == nullptr), "both up and dup, or neither");
        if (n == 0) return;
        launch(
            activate_back_kernel, dim3(blocks_of(n, THREADS)), dim3(THREADS), 0, device->stream, (int)activation, gate,
            up, dy, n, dgate, dup);
        check_launch("an activation's gradient");
    });
}

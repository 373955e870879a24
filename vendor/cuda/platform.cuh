// The subset of CUDA that the kernels use. Both nvcc and the emulation (emulation/cuda.h) compile it. Kernels are started
// with `launch`. All shared memory of a kernel is one array of floats, declared with `SHARED_FLOATS`.
#pragma once

#ifdef DETOX_CUDA_EMULATION
#include "emulation/cuda.h"
#else
#include <cuda_runtime.h>

// The thread block's shared memory, of the size given to `launch`. Aligned for doubles and wide loads too.
#define SHARED_FLOATS(name) extern __shared__ __align__(16) float name[]

template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
    Arguments... arguments) {
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
}
#endif

#include <stdint.h>

// Conversions between floats and bit patterns. Written out, so that the emulation rounds exactly as a GPU does.

union FloatBits {
    float number;
    uint32_t bits;
};

__host__ __device__ inline float float_of_bits(uint32_t bits) {
    FloatBits both;
    both.bits = bits;
    return both.number;
}

__host__ __device__ inline uint32_t bits_of_float(float number) {
    FloatBits both;
    both.number = number;
    return both.bits;
}

__host__ __device__ inline float float_of_bf16(uint16_t half) { return float_of_bits((uint32_t)half << 16); }

// Rounds to nearest, ties to even. NaN stays NaN.
__host__ __device__ inline uint16_t bf16_of_float(float number) {
    uint32_t bits = bits_of_float(number);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__host__ __device__ inline float float_of_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t rest = (uint32_t)(half & 0x7fffu) << 13;
    if (rest >= 0x0f800000u) return float_of_bits(sign | (rest + 0x70000000u)); // infinity or NaN
    // The exponent biases differ by 112. Multiplying by 2^112 also converts subnormal numbers correctly.
    return float_of_bits(sign | bits_of_float(float_of_bits(rest) * float_of_bits(0x77800000u)));
}

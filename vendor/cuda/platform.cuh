// The dialect of CUDA that the kernels are written in: what nvcc and the emulation (emulation/cuda.h) both compile.
// Kernels are launched by `launch`, and all their shared memory is one array of floats, by `SHARED_FLOATS`.
#pragma once

#ifdef DETOX_CUDA_EMULATION
#include "emulation/cuda.h"
#else
#include <cuda_runtime.h>

// The block's shared memory, as many floats as the launch asked for, aligned for doubles and wide loads too.
#define SHARED_FLOATS(name) extern __shared__ __align__(16) float name[]

template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
    Arguments... arguments) {
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
}
#endif

#include <stdint.h>

// The floats of bit patterns, and back. Written out, so that the emulation rounds exactly as a GPU does.

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

// To nearest, ties to even; what is no number stays none.
__host__ __device__ inline uint16_t bf16_of_float(float number) {
    uint32_t bits = bits_of_float(number);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__host__ __device__ inline float float_of_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t rest = (uint32_t)(half & 0x7fffu) << 13;
    if (rest >= 0x0f800000u) return float_of_bits(sign | (rest + 0x70000000u)); // infinity, or no number
    // The exponents' biases differ by 112; a product with 2^112 makes subnormals right too.
    return float_of_bits(sign | bits_of_float(float_of_bits(rest) * float_of_bits(0x77800000u)));
}

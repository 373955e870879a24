// Sums and maxima over threads, in an order that does not depend on thread timing.
#pragma once

#include "platform.cuh"

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum over the warp. Every lane gets it.
template <typename T>
__device__ inline T warp_sum(T x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// The sum over the threads with the same threadIdx.y. Each of them gets it. Either these threads are one warp, or the
// block has only one y, all its threads call this function, and `shared` is [WARP].
__device__ inline float row_sum(float x, float* shared) {
    x = warp_sum(x);
    if (blockDim.x == WARP) return x;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // Wait until all threads have read the previous sum.
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < (int)blockDim.x / WARP ? shared[lane] : 0.0f);
}

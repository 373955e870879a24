// Sums and maxima over threads, in an order that does not depend on which thread is faster.
#pragma once

#include "platform.cuh"

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum over the warp, in every lane.
template <typename T>
__device__ inline T warp_sum(T x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// The sum over the threads of one y, in each of them. Either a y is one warp, or the block has one y and `shared` is
// [WARP]; then all its threads must call.
__device__ inline float row_sum(float x, float* shared) {
    x = warp_sum(x);
    if (blockDim.x == WARP) return x;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // What was summed before has been read by all.
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < (int)blockDim.x / WARP ? shared[lane] : 0.0f);
}

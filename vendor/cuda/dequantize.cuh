// Rounds operands of products to bf16.
#pragma once

#include "device.cuh"

// rounded[n] = the numbers of `blocks` from number `first` on. `first` and `n` must be whole numbers of blocks.
void round_blocks(
    detox_cuda_device& device, int32_t type, const void* blocks, int64_t first, int64_t n, uint16_t* rounded);
// rounded[n] = x[n]
void round_numbers(detox_cuda_device& device, const float* x, int64_t n, uint16_t* rounded);

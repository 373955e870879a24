// Limits of the extension that Rust needs too, also in builds without CUDA: build.rs reads every line of the form
// `#define DETOX_CUDA_NAME INTEGER` into a Rust constant NAME.
#pragma once

// Limits of the attention kernels: query heads in a block, and the size of a head.
#define DETOX_CUDA_MOST_HEADS 256
#define DETOX_CUDA_MOST_HEAD_DIM 256
// The most pairs of a head that RoPE can rotate.
#define DETOX_CUDA_MOST_ROPE_PAIRS 256

// A product with a matrix whose bf16 copy is not kept rounds it in parts of at most this many bytes. A part is a
// multiple of PART_ROWS rows, and at least that many, so that every part of y and dy is aligned like the first.
// 256 MiB is large enough for full-rate products, and small beside a model.
#define DETOX_CUDA_PART_BYTES 268435456
#define DETOX_CUDA_PART_ROWS 256

// Workspace that cuBLASLt may use for one product: 32 MiB, NVIDIA's advice for Hopper and enough for older GPUs.
#define DETOX_CUDA_WORKSPACE_BYTES 33554432

// Sums over the rows of a batch are first taken over parts of this many rows.
#define DETOX_CUDA_SUM_ROWS 64

// Most blocks of threads that share one tensor in a sum of squares; each writes one f64.
#define DETOX_CUDA_SQUARE_SUM_BLOCKS 64

// Rows in attention's tiles.
#define DETOX_CUDA_LARGE_TILE 32
#define DETOX_CUDA_SMALL_TILE 16

// ggml's numbers of the types that have kernels. build.rs lists them as KERNEL_TYPES.
#define DETOX_CUDA_TYPE_F32 0
#define DETOX_CUDA_TYPE_F16 1
#define DETOX_CUDA_TYPE_Q4_0 2
#define DETOX_CUDA_TYPE_Q4_1 3
#define DETOX_CUDA_TYPE_Q5_0 6
#define DETOX_CUDA_TYPE_Q5_1 7
#define DETOX_CUDA_TYPE_Q8_0 8
#define DETOX_CUDA_TYPE_Q4_K 12
#define DETOX_CUDA_TYPE_Q5_K 13
#define DETOX_CUDA_TYPE_Q6_K 14
#define DETOX_CUDA_TYPE_BF16 30

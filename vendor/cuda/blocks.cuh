// Dequantises a GGUF's blocks, eight numbers at a time. The layouts are those of the ggml types with the same names.
#pragma once

#include <type_traits>

#include "limits.h"
#include "platform.cuh"

// ggml's numbers for the supported types.
enum BlockType {
    TYPE_F32 = DETOX_CUDA_TYPE_F32,
    TYPE_F16 = DETOX_CUDA_TYPE_F16,
    TYPE_Q4_0 = DETOX_CUDA_TYPE_Q4_0,
    TYPE_Q4_1 = DETOX_CUDA_TYPE_Q4_1,
    TYPE_Q5_0 = DETOX_CUDA_TYPE_Q5_0,
    TYPE_Q5_1 = DETOX_CUDA_TYPE_Q5_1,
    TYPE_Q8_0 = DETOX_CUDA_TYPE_Q8_0,
    TYPE_Q4_K = DETOX_CUDA_TYPE_Q4_K,
    TYPE_Q5_K = DETOX_CUDA_TYPE_Q5_K,
    TYPE_Q6_K = DETOX_CUDA_TYPE_Q6_K,
    TYPE_BF16 = DETOX_CUDA_TYPE_BF16,
};

// Numbers that one thread reads. Every block length is a multiple of it.
constexpr int GROUP = 8;

__device__ inline float f16_at(const uint8_t* bytes) { return float_of_f16((uint16_t)(bytes[0] | bytes[1] << 8)); }

// Scale and minimum of part j in Q4_K and Q5_K, six bits each. The first four parts use the low bits of bytes 0 to 7. The
// other four use bytes 8 to 11 and the two high bits of bytes 0 to 7.
__device__ inline void scale_and_minimum(const uint8_t* scales, int j, int& scale, int& minimum) {
    if (j < 4) {
        scale = scales[j] & 63;
        minimum = scales[j + 4] & 63;
    } else {
        scale = (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4;
        minimum = (scales[j + 4] >> 4) | (scales[j] >> 6) << 4;
    }
}

// A block of a type: its numbers (`LEN`), its bytes (`BYTES`), and `read`, which dequantises numbers `at` to `at + GROUP`.
template <int TYPE>
struct Block;

template <>
struct Block<TYPE_F32> {
    static constexpr int LEN = 1, BYTES = 4;
    __device__ static float one(const uint8_t* bytes, int64_t i) { return ((const float*)bytes)[i]; }
};

template <>
struct Block<TYPE_F16> {
    static constexpr int LEN = 1, BYTES = 2;
    __device__ static float one(const uint8_t* bytes, int64_t i) { return float_of_f16(((const uint16_t*)bytes)[i]); }
};

template <>
struct Block<TYPE_BF16> {
    static constexpr int LEN = 1, BYTES = 2;
    __device__ static float one(const uint8_t* bytes, int64_t i) { return float_of_bf16(((const uint16_t*)bytes)[i]); }
};

// In blocks of 32 with 4-bit codes, the low halves of 16 bytes hold the first 16 numbers, the high halves the others.
__device__ inline int low_or_high(const uint8_t* codes, int at, int i) {
    return at < 16 ? codes[at + i] & 15 : codes[at - 16 + i] >> 4;
}

// d (code - 8)
template <>
struct Block<TYPE_Q4_0> {
    static constexpr int LEN = 32, BYTES = 18;
    __device__ static void read(const uint8_t* block, int at, float* x) {
        float d = f16_at(block);
        for (int i = 0; i < GROUP; i++) x[i] = (float)(low_or_high(block + 2, at, i) - 8) * d;
    }
};

// d code + m
template <>
struct Block<TYPE_Q4_1> {
    static constexpr int LEN = 32, BYTES = 20;
    __device__ static void read(const uint8_t* block, int at, float* x) {
        float d = f16_at(block), m = f16_at(block + 2);
        for (int i = 0; i < GROUP; i++) x[i] = fmaf((float)low_or_high(block + 4, at, i), d, m);
    }
};

// The fifth bit of number i is bit i of four bytes.
__device__ inline int fifth_bit(const uint8_t* bits, int i) { return (bits[i / 8] >> (i % 8) & 1) << 4; }

// d (code - 16)
template <>
struct Block<TYPE_Q5_0> {
    static constexpr int LEN = 32, BYTES = 22;
    __device__ static void read(const uint8_t* block, int at, float* x) {
        float d = f16_at(block);
        for (int i = 0; i < GROUP; i++)
            x[i] = (float)((low_or_high(block + 6, at, i) | fifth_bit(block + 2, at + i)) - 16) * d;
    }
};

// d code + m
template <>
struct Block<TYPE_Q5_1> {
    static constexpr int LEN = 32, BYTES = 24;
    __device__ static void read(const uint8_t* block, int at, float* x) {
        float d = f16_at(block), m = f16_at(block + 2);
        for (int i = 0; i < GROUP; i++)
            x[i] = fmaf((float)(low_or_high(block + 8, at, i) | fifth_bit(block + 4, at + i)), d, m);
    }
};

// d code
template <>
struct Block<TYPE_Q8_0> {
    static constexpr int LEN = 32, BYTES = 34;
    __device__ static void read(const uint8_t* block, int at, float* x) {
        float d = f16_at(block);
        for (int i = 0; i < GROUP; i++) x[i] = (float)(int8_t)block[2 + at + i] * d;
    }
};

// Eight parts of 32: d scale code - dmin minimum. Parts 2j and 2j + 1 are the low and high halves of the 32 bytes from 32j.
template <>
struct Block<TYPE_Q4_K> {
    static constexpr int LEN = 256, BYTES = 144;
    __device__ static void read(const uint8_t* block, int at, float* x) {
        int part = at / 32, scale, minimum;
        scale_and_minimum(block + 4, part, scale, minimum);
        float d = f16_at(block) * (float)scale, m = f16_at(block + 2) * (float)minimum;
        const uint8_t* codes = block + 16 + part / 2 * 32 + at % 32;
        int shift = part % 2 * 4;
        for (int i = 0; i < GROUP; i++) x[i] = fmaf(d, (float)(codes[i] >> shift & 15), -m);
    }
};

// As Q4_K, with a fifth bit: for number l of part j it is bit j of byte l.
template <>
struct Block<TYPE_Q5_K> {
    static constexpr int LEN = 256, BYTES = 176;
    __device__ static void read(const uint8_t* block, int at, float* x) {
        int part = at / 32, scale, minimum;
        scale_and_minimum(block + 4, part, scale, minimum);
        float d = f16_at(block) * (float)scale, m = f16_at(block + 2) * (float)minimum;
        const uint8_t* bits = block + 16 + at % 32;
        const uint8_t* codes = block + 48 + part / 2 * 32 + at % 32;
        int shift = part % 2 * 4;
        for (int i = 0; i < GROUP; i++) {
            int code = (codes[i] >> shift & 15) | (bits[i] >> part & 1) << 4;
            x[i] = fmaf(d, (float)code, -m);
        }
    }
};

// Sixteen parts of 16 with one scale each: d scale (code - 32). Each half of 128 numbers has four quarters of 32. The low
// four bits of quarters 0 and 2 are in bytes 0 to 31, those of quarters 1 and 3 in bytes 32 to 63. The high two bits of
// all four quarters share a byte.
template <>
struct Block<TYPE_Q6_K> {
    static constexpr int LEN = 256, BYTES = 210;
    __device__ static void read(const uint8_t* block, int at, float* x) {
        int half = at / 128, quarter = at % 128 / 32, l = at % 32;
        const uint8_t* low = block + half * 64 + quarter % 2 * 32 + l;
        const uint8_t* high = block + 128 + half * 32 + l;
        float d = f16_at(block + 208) * (float)(int8_t)block[192 + at / 16];
        for (int i = 0; i < GROUP; i++) {
            int code = (low[i] >> quarter / 2 * 4 & 15) | (high[i] >> quarter * 2 & 3) << 4;
            x[i] = d * (float)(code - 32);
        }
    }
};

// Reads numbers `at` to `at + n` of an array of blocks, n <= GROUP. For quantised types, `at` must be a multiple of GROUP
// and n must be GROUP.
template <int TYPE>
__device__ inline void read_numbers(const uint8_t* blocks, int64_t at, int n, float* x) {
    if constexpr (Block<TYPE>::LEN == 1) {
        for (int i = 0; i < n; i++) x[i] = Block<TYPE>::one(blocks, at + i);
    } else {
        Block<TYPE>::read(blocks + at / Block<TYPE>::LEN * Block<TYPE>::BYTES, (int)(at % Block<TYPE>::LEN), x);
    }
}

// Calls `work` with the type as a compile-time constant. Returns false if the type is not supported.
template <typename Work>
bool with_type(int32_t type, Work work) {
    switch (type) {
    case TYPE_F32: work(Block<TYPE_F32>{}, std::integral_constant<int, TYPE_F32>{}); return true;
    case TYPE_F16: work(Block<TYPE_F16>{}, std::integral_constant<int, TYPE_F16>{}); return true;
    case TYPE_BF16: work(Block<TYPE_BF16>{}, std::integral_constant<int, TYPE_BF16>{}); return true;
    case TYPE_Q4_0: work(Block<TYPE_Q4_0>{}, std::integral_constant<int, TYPE_Q4_0>{}); return true;
    case TYPE_Q4_1: work(Block<TYPE_Q4_1>{}, std::integral_constant<int, TYPE_Q4_1>{}); return true;
    case TYPE_Q5_0: work(Block<TYPE_Q5_0>{}, std::integral_constant<int, TYPE_Q5_0>{}); return true;
    case TYPE_Q5_1: work(Block<TYPE_Q5_1>{}, std::integral_constant<int, TYPE_Q5_1>{}); return true;
    case TYPE_Q8_0: work(Block<TYPE_Q8_0>{}, std::integral_constant<int, TYPE_Q8_0>{}); return true;
    case TYPE_Q4_K: work(Block<TYPE_Q4_K>{}, std::integral_constant<int, TYPE_Q4_K>{}); return true;
    case TYPE_Q5_K: work(Block<TYPE_Q5_K>{}, std::integral_constant<int, TYPE_Q5_K>{}); return true;
    case TYPE_Q6_K: work(Block<TYPE_Q6_K>{}, std::integral_constant<int, TYPE_Q6_K>{}); return true;
    default: return false;
    }
}

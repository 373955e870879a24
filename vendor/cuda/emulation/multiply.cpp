// Products by plain loops, instead of cuBLASLt. Operands are rounded as there, sums are in f32.
#include <algorithm>
#include <vector>

#include "../device.cuh"
#include "state.h"

struct Multiplier {};

Multiplier* multiplier_open() { return new Multiplier; }

void multiplier_close(Multiplier* multiplier) noexcept { delete multiplier; }

namespace {

// Rounds to 10 bits of fraction, ties to even. NaN stays NaN.
float tf32_of_float(float number) {
    uint32_t bits = bits_of_float(number);
    if ((bits & 0x7f800000u) == 0x7f800000u) return number;
    return float_of_bits((bits + 0xfffu + ((bits >> 13) & 1u)) & ~0x1fffu);
}

float number_at(Operands operands, const void* matrix, int64_t at) {
    return operands == Operands::BF16 ? float_of_bf16(((const uint16_t*)matrix)[at])
                                      : tf32_of_float(((const float*)matrix)[at]);
}

} // namespace

void multiply(detox_cuda_device&, Operands operands, const Product& p, const void* a, const void* b, float* c) {
    emulation::count_launch();
    // op(a)[m][k] and op(b)[k][n], dense.
    std::vector<float> left((size_t)(p.m * p.k)), right((size_t)(p.k * p.n)), sums((size_t)p.n);
    for (int64_t i = 0; i < p.m; i++)
        for (int64_t l = 0; l < p.k; l++)
            left[i * p.k + l] = number_at(operands, a, p.transpose_a ? l * p.a_stride + i : i * p.a_stride + l);
    for (int64_t l = 0; l < p.k; l++)
        for (int64_t j = 0; j < p.n; j++)
            right[l * p.n + j] = number_at(operands, b, p.transpose_b ? j * p.b_stride + l : l * p.b_stride + j);
    for (int64_t i = 0; i < p.m; i++) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t l = 0; l < p.k; l++) {
            float x = left[i * p.k + l];
            for (int64_t j = 0; j < p.n; j++) sums[j] += x * right[l * p.n + j];
        }
        for (int64_t j = 0; j < p.n; j++) {
            float* to = c + i * p.c_stride + j;
            *to = p.alpha * sums[j] + (p.beta == 0.0f ? 0.0f : p.beta * *to);
        }
    }
}

// Products with frozen matrices, forward and backward, and products of dense matrices.
#include "blocks.cuh"
#include "dequantize.cuh"
#include "device.cuh"

namespace {

constexpr int64_t PART_ROWS = DETOX_CUDA_PART_ROWS;

// Calls `work` with rounded rows [first, first + n) of W, one part at a time.
template <typename Work>
void for_parts(detox_cuda_device& device, const detox_cuda_matrix& w, Work work) {
    if (w.rounded != nullptr) {
        work(w.rounded, (int64_t)0, w.n_out);
        return;
    }
    require(w.blocks != nullptr, "a matrix with blocks or rounded numbers");
    int64_t n = device.part_bytes / 2 / w.n_in / PART_ROWS * PART_ROWS;
    if (n < PART_ROWS) n = PART_ROWS;
    if (n > w.n_out) n = w.n_out;
    Scratch<uint16_t> part(device, (size_t)(n * w.n_in));
    for (int64_t first = 0; first < w.n_out; first += n) {
        int64_t n_here = w.n_out - first < n ? w.n_out - first : n;
        round_blocks(device, w.type, w.blocks, first * w.n_in, n_here * w.n_in, part);
        work((const uint16_t*)part, first, n_here);
    }
}

void check_matrix(const detox_cuda_matrix* w) {
    require(w != nullptr && w->n_in > 0 && w->n_out > 0, "a matrix with rows and columns");
}

} // namespace

detox_cuda_status detox_cuda_set_part(detox_cuda_device* device, size_t n_bytes) {
    return on_device(device, [&] {
        require(n_bytes <= INT64_MAX, "a part size below 2^63");
        device->part_bytes = (int64_t)n_bytes;
    });
}

detox_cuda_status detox_cuda_products(
    detox_cuda_device* device, const detox_cuda_matrix* ws, int64_t n, const float* x, int64_t n_rows,
    float* const* ys) {
    return on_device(device, [&] {
        require(n >= 0 && (n == 0 || ys != nullptr), "an output for each product");
        for (int64_t i = 0; i < n; i++) {
            check_matrix(ws == nullptr ? nullptr : ws + i);
            require(ws[i].n_in == ws[0].n_in, "matrices of the same input size");
        }
        if (n == 0 || n_rows == 0) return;
        int64_t n_in = ws[0].n_in;
        Scratch<uint16_t> rounded(*device, (size_t)(n_rows * n_in));
        round_numbers(*device, x, n_rows * n_in, rounded);
        for (int64_t i = 0; i < n; i++)
            for_parts(*device, ws[i], [&](const uint16_t* part, int64_t first, int64_t n_out) {
                Product product = {n_rows, n_out, n_in, false, true, 1.0f, 0.0f, n_in, n_in, ws[i].n_out};
                multiply(*device, Operands::BF16, product, (const uint16_t*)rounded, part, ys[i] + first);
            });
    });
}

detox_cuda_status detox_cuda_product_back(
    detox_cuda_device* device, const detox_cuda_matrix* w, const float* dy, int64_t n_rows, float* dx) {
    return on_device(device, [&] {
        check_matrix(w);
        if (n_rows == 0) return;
        Scratch<uint16_t> rounded(*device, (size_t)(n_rows * w->n_out));
        round_numbers(*device, dy, n_rows * w->n_out, rounded);
        for_parts(*device, *w, [&](const uint16_t* part, int64_t first, int64_t n) {
            Product product = {n_rows, w->n_in, n, false, false, 1.0f, 1.0f, w->n_out, w->n_in, w->n_in};
            multiply(*device, Operands::BF16, product, (const uint16_t*)rounded + first, part, dx);
        });
    });
}

detox_cuda_status
detox_cuda_multiply(detox_cuda_device* device, const detox_cuda_gemm* gemm, const float* a, const float* b, float* c) {
    return on_device(device, [&] {
        require(gemm != nullptr && gemm->m >= 0 && gemm->n >= 0 && gemm->k > 0, "sizes of a product");
        if (gemm->m == 0 || gemm->n == 0) return;
        bool transpose_a = gemm->transpose_a != 0, transpose_b = gemm->transpose_b != 0;
        Product product = {
            gemm->m,
            gemm->n,
            gemm->k,
            transpose_a,
            transpose_b,
            gemm->alpha,
            gemm->beta,
            transpose_a ? gemm->m : gemm->k,
            transpose_b ? gemm->k : gemm->n,
            gemm->n};
        multiply(*device, Operands::TF32, product, a, b, c);
    });
}

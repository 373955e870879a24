// Products by cuBLASLt. The emulation has emulation/multiply.cpp in its place.
#include <cublasLt.h>

#include "device.cuh"

namespace {

// What cuBLASLt may use beside the operands; 32 MiB is NVIDIA's advice for Hopper, and more than others need.
constexpr size_t WORKSPACE_BYTES = 32 << 20;

void check_blas(cublasStatus_t status, const char* what) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    detox_cuda_status mapped = status == CUBLAS_STATUS_ALLOC_FAILED    ? DETOX_CUDA_OUT_OF_MEMORY
                               : status == CUBLAS_STATUS_NOT_SUPPORTED ? DETOX_CUDA_UNSUPPORTED
                               : status == CUBLAS_STATUS_ARCH_MISMATCH ? DETOX_CUDA_UNSUPPORTED
                               : status == CUBLAS_STATUS_INVALID_VALUE ? DETOX_CUDA_INVALID
                                                                       : DETOX_CUDA_FAILED;
    throw Failure(mapped, std::string(what) + ": cuBLASLt says " + cublasLtGetStatusName(status));
}

// How one product is computed, owned.
struct Plan {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t left = nullptr, right = nullptr, result = nullptr;
    cublasLtMatmulAlgo_t algorithm{};

    Plan() = default;
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;
    ~Plan() {
        if (result != nullptr) cublasLtMatrixLayoutDestroy(result);
        if (right != nullptr) cublasLtMatrixLayoutDestroy(right);
        if (left != nullptr) cublasLtMatrixLayoutDestroy(left);
        if (operation != nullptr) cublasLtMatmulDescDestroy(operation);
    }
};

using Shape = std::tuple<
    int, int64_t, int64_t, int64_t, bool, bool, bool, int64_t, int64_t, int64_t, unsigned, unsigned, unsigned>;

// The largest power of two up to 256 that divides an address.
unsigned alignment_of(const void* address) {
    unsigned alignment = 256;
    while ((uintptr_t)address % alignment != 0) alignment /= 2;
    return alignment;
}

} // namespace

struct Multiplier {
    cublasLtHandle_t handle = nullptr;
    // Choosing an algorithm takes tens of microseconds: once a shape.
    std::map<Shape, Plan> plans;
};

Multiplier* multiplier_open() {
    Multiplier* multiplier = new Multiplier;
    cublasStatus_t status = cublasLtCreate(&multiplier->handle);
    if (status != CUBLAS_STATUS_SUCCESS) {
        delete multiplier;
        check_blas(status, "starting cuBLASLt");
    }
    return multiplier;
}

void multiplier_close(Multiplier* multiplier) noexcept {
    if (multiplier == nullptr) return;
    multiplier->plans.clear();
    cublasLtDestroy(multiplier->handle);
    delete multiplier;
}

namespace {

// cuBLASLt counts columns first: its result is c^T = op(b)^T op(a)^T, so b is its left operand.
void make_plan(
    Multiplier& multiplier, Plan& plan, Operands operands, const Product& p, unsigned a_alignment, unsigned b_alignment,
    unsigned c_alignment) {
    cudaDataType_t type = operands == Operands::BF16 ? CUDA_R_16BF : CUDA_R_32F;
    cublasComputeType_t compute = operands == Operands::BF16 ? CUBLAS_COMPUTE_32F : CUBLAS_COMPUTE_32F_FAST_TF32;
    check_blas(cublasLtMatmulDescCreate(&plan.operation, compute, CUDA_R_32F), "describing a product");
    cublasOperation_t of_left = p.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t of_right = p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    check_blas(
        cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, &of_left, sizeof of_left),
        "describing a product");
    check_blas(
        cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, &of_right, sizeof of_right),
        "describing a product");
    // A matrix with rows [k][n] is one with columns of n numbers.
    uint64_t left_rows = p.transpose_b ? p.k : p.n, left_cols = p.transpose_b ? p.n : p.k;
    uint64_t right_rows = p.transpose_a ? p.m : p.k, right_cols = p.transpose_a ? p.k : p.m;
    check_blas(cublasLtMatrixLayoutCreate(&plan.left, type, left_rows, left_cols, p.b_stride), "describing b");
    check_blas(cublasLtMatrixLayoutCreate(&plan.right, type, right_rows, right_cols, p.a_stride), "describing a");
    check_blas(cublasLtMatrixLayoutCreate(&plan.result, CUDA_R_32F, p.n, p.m, p.c_stride), "describing c");

    cublasLtMatmulPreference_t preference;
    check_blas(cublasLtMatmulPreferenceCreate(&preference), "choosing a product");
    size_t workspace = WORKSPACE_BYTES;
    // Sums over parts go through the workspace in a fixed order; in place, they would be added up as they come.
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
    cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions);
    uint32_t left = b_alignment, right = a_alignment, result = c_alignment;
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &left, sizeof left);
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &right, sizeof right);
    cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &result, sizeof result);
    cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &result, sizeof result);
    cublasLtMatmulHeuristicResult_t found;
    int n_found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        multiplier.handle, plan.operation, plan.left, plan.right, plan.result, plan.result, preference, 1, &found,
        &n_found);
    cublasLtMatmulPreferenceDestroy(preference);
    check_blas(status, "choosing a product");
    if (n_found == 0) check_blas(CUBLAS_STATUS_NOT_SUPPORTED, "choosing a product");
    plan.algorithm = found.algo;
}

} // namespace

void multiply(detox_cuda_device& device, Operands operands, const Product& p, const void* a, const void* b, float* c) {
    Multiplier& multiplier = *device.multiplier;
    unsigned a_alignment = alignment_of(a), b_alignment = alignment_of(b), c_alignment = alignment_of(c);
    Shape shape(
        (int)operands, p.m, p.n, p.k, p.transpose_a, p.transpose_b, p.beta != 0.0f, p.a_stride, p.b_stride, p.c_stride,
        a_alignment, b_alignment, c_alignment);
    auto place = multiplier.plans.find(shape);
    if (place == multiplier.plans.end()) {
        place = multiplier.plans.try_emplace(shape).first;
        try {
            make_plan(multiplier, place->second, operands, p, a_alignment, b_alignment, c_alignment);
        } catch (...) {
            multiplier.plans.erase(place);
            throw;
        }
    }
    Plan& plan = place->second;
    Scratch<uint8_t> workspace(device, WORKSPACE_BYTES);
    check_blas(
        cublasLtMatmul(
            multiplier.handle, plan.operation, &p.alpha, b, plan.left, a, plan.right, &p.beta, c, plan.result, c,
            plan.result, &plan.algorithm, workspace, WORKSPACE_BYTES, device.stream),
        "multiplying matrices");
}

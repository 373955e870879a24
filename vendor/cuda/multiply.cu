// Products with cuBLASLt. The emulation uses emulation/multiply.cpp instead.
#include <cublasLt.h>

#include "device.cuh"

namespace {

constexpr size_t WORKSPACE_BYTES = DETOX_CUDA_WORKSPACE_BYTES;

void check_blas(cublasStatus_t status, const char* what) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    detox_cuda_status mapped = status == CUBLAS_STATUS_ALLOC_FAILED    ? DETOX_CUDA_OUT_OF_MEMORY
                               : status == CUBLAS_STATUS_NOT_SUPPORTED ? DETOX_CUDA_UNSUPPORTED
                               : status == CUBLAS_STATUS_ARCH_MISMATCH ? DETOX_CUDA_UNSUPPORTED
                               : status == CUBLAS_STATUS_INVALID_VALUE ? DETOX_CUDA_INVALID
                                                                       : DETOX_CUDA_FAILED;
    throw Failure(mapped, std::string(what) + ": cuBLASLt returned " + cublasLtGetStatusName(status));
}

// How one product is computed. Owns its descriptors.
struct Plan {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t left = nullptr, right = nullptr, result = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
    size_t workspace_bytes = 0;

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

// Criteria for choosing an algorithm. Owns its descriptor.
struct Preference {
    cublasLtMatmulPreference_t raw = nullptr;

    Preference() { check_blas(cublasLtMatmulPreferenceCreate(&raw), "choosing an algorithm"); }
    Preference(const Preference&) = delete;
    Preference& operator=(const Preference&) = delete;
    ~Preference() { cublasLtMatmulPreferenceDestroy(raw); }

    template <typename T>
    void set(cublasLtMatmulPreferenceAttributes_t attribute, T value) {
        check_blas(cublasLtMatmulPreferenceSetAttribute(raw, attribute, &value, sizeof value), "choosing an algorithm");
    }
};

using Shape = std::tuple<
    int, int64_t, int64_t, int64_t, bool, bool, bool, int64_t, int64_t, int64_t, unsigned, unsigned, unsigned>;

// Limit of cached plans. The number of rows varies from batch to batch, so a long run has too many shapes to keep all.
constexpr size_t MOST_PLANS = 4096;

// The largest power of two up to 256 that divides an address.
unsigned alignment_of(const void* address) {
    unsigned alignment = 256;
    while ((uintptr_t)address % alignment != 0) alignment /= 2;
    return alignment;
}

} // namespace

struct Multiplier {
    cublasLtHandle_t handle = nullptr;
    // Choosing an algorithm takes tens of microseconds, so it is done once per shape.
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

std::string in_words(Operands operands, const Product& p) {
    auto matrix = [](int64_t n_rows, int64_t n_cols, bool is_transposed, int64_t stride) {
        return "[" + std::to_string(n_rows) + "][" + std::to_string(n_cols) + "]" +
               (is_transposed ? " transposed" : "") + " with stride " + std::to_string(stride);
    };
    return "a product of " + matrix(p.m, p.k, p.transpose_a, p.a_stride) + " and " +
           matrix(p.k, p.n, p.transpose_b, p.b_stride) + " in " + (operands == Operands::BF16 ? "bf16" : "TF32");
}

// cuBLASLt is column-major. It computes c^T = op(b)^T op(a)^T, so b is its left operand.
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
    // A row-major [k][n] matrix is a column-major matrix with columns of n numbers.
    uint64_t left_rows = p.transpose_b ? p.k : p.n, left_cols = p.transpose_b ? p.n : p.k;
    uint64_t right_rows = p.transpose_a ? p.m : p.k, right_cols = p.transpose_a ? p.k : p.m;
    check_blas(cublasLtMatrixLayoutCreate(&plan.left, type, left_rows, left_cols, p.b_stride), "describing b");
    check_blas(cublasLtMatrixLayoutCreate(&plan.right, type, right_rows, right_cols, p.a_stride), "describing a");
    check_blas(cublasLtMatrixLayoutCreate(&plan.result, CUDA_R_32F, p.n, p.m, p.c_stride), "describing c");

    Preference preference;
    preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE_BYTES);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (uint32_t)b_alignment);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (uint32_t)a_alignment);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (uint32_t)c_alignment);
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (uint32_t)c_alignment);
    // Only allow split sums that go through the workspace and are added in a separate step, in a fixed order. In-place
    // reductions are documented to keep an order too, by counters; we neither need nor rely on that.
    const uint32_t in_workspace = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
    cublasLtMatmulHeuristicResult_t found{};
    bool is_found = false;
    for (uint32_t reductions : {in_workspace, (uint32_t)CUBLASLT_REDUCTION_SCHEME_NONE}) {
        preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
        int n_found = 0;
        cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
            multiplier.handle, plan.operation, plan.left, plan.right, plan.result, plan.result, preference.raw, 1,
            &found, &n_found);
        if (status != CUBLAS_STATUS_NOT_SUPPORTED) check_blas(status, "choosing an algorithm");
        is_found = status == CUBLAS_STATUS_SUCCESS && n_found > 0 && found.state == CUBLAS_STATUS_SUCCESS;
        if (is_found) break;
    }
    if (!is_found) throw Failure(DETOX_CUDA_UNSUPPORTED, "cuBLASLt has no algorithm for " + in_words(operands, p));
    plan.workspace_bytes = found.workspaceSize;
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
        if (multiplier.plans.size() >= MOST_PLANS) multiplier.plans.clear();
        place = multiplier.plans.try_emplace(shape).first;
        try {
            make_plan(multiplier, place->second, operands, p, a_alignment, b_alignment, c_alignment);
        } catch (...) {
            multiplier.plans.erase(place);
            throw;
        }
    }
    Plan& plan = place->second;
    Scratch<uint8_t> workspace(device, plan.workspace_bytes);
    check_blas(
        cublasLtMatmul(
            multiplier.handle, plan.operation, &p.alpha, b, plan.left, a, plan.right, &p.beta, c, plan.result, c,
            plan.result, &plan.algorithm, workspace, plan.workspace_bytes, device.stream),
        "multiplying matrices");
}

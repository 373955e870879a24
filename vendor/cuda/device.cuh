// A GPU, its errors, and memory that is released at the end of a scope.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "ops.h"
#include "platform.cuh"

// Thrown by a failing operation. Converted to a status at the C boundary.
struct Failure : std::runtime_error {
    detox_cuda_status status;
    Failure(detox_cuda_status status, const std::string& message) : std::runtime_error(message), status(status) {}
};

// Multiplies matrices and caches a plan for each shape. Implemented with cuBLASLt, or by the emulation.
struct Multiplier;

struct detox_cuda_device {
    int ordinal = 0;
    cudaStream_t stream = nullptr;
    // Owned by the process: all its devices with this ordinal share it.
    cudaMemPool_t pool = nullptr;
    Multiplier* multiplier = nullptr;
    cudaDeviceProp properties{};
    // If only a matrix's blocks are kept, products dequantise this many bytes of bf16 at a time.
    int64_t part_bytes = DETOX_CUDA_PART_BYTES;
    // Held during each operation, because its kernels may share scratch memory.
    std::mutex mutex;
};

// Throws unless `error` is success. `what` names the action for the message.
void check(cudaError_t error, const char* what);

// Throws INVALID unless `holds`. `what` is the expectation that the caller violated.
void require(bool holds, const char* what);

// Call after a launch. Throws if the launch failed.
inline void check_launch(const char* what) { check(cudaGetLastError(), what); }

// Stores the message for `detox_cuda_last_error` and returns the status.
detox_cuda_status keep_error(detox_cuda_status status, const char* message) noexcept;

// Calls `work` and converts exceptions to a status.
template <typename Work>
detox_cuda_status guarded(Work work) noexcept {
    try {
        work();
        return DETOX_CUDA_OK;
    } catch (const Failure& failure) {
        return keep_error(failure.status, failure.what());
    } catch (const std::bad_alloc&) {
        return keep_error(DETOX_CUDA_FAILED, "the host is out of memory");
    } catch (const std::exception& error) {
        return keep_error(DETOX_CUDA_FAILED, error.what());
    } catch (...) {
        return keep_error(DETOX_CUDA_FAILED, "an unknown exception");
    }
}

// As `guarded`, with the device selected and locked.
template <typename Work>
detox_cuda_status on_device(detox_cuda_device* device, Work work) noexcept {
    return guarded([&] {
        require(device != nullptr, "a device");
        std::lock_guard<std::mutex> turn(device->mutex);
        check(cudaSetDevice(device->ordinal), "selecting the GPU");
        work();
    });
}

void* allocate(detox_cuda_device& device, size_t n_bytes);
void release(detox_cuda_device& device, void* memory) noexcept;

// Temporary memory [n] for one operation. Returned to the stream's pool, where the next operation may reuse it.
template <typename T>
class Scratch {
public:
    Scratch(detox_cuda_device& device, size_t n) : device(device), memory((T*)allocate(device, n * sizeof(T))) {}
    ~Scratch() { release(device, memory); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() const { return memory; }

private:
    detox_cuda_device& device;
    T* memory;
};

// Number of thread blocks of `size` that cover n.
inline unsigned blocks_of(int64_t n, int64_t size) { return (unsigned)((n + size - 1) / size); }

// Threads per block in elementwise kernels.
constexpr int THREADS = 256;

Multiplier* multiplier_open();
void multiplier_close(Multiplier* multiplier) noexcept;

// How the operands of a product are rounded. Sums are always in f32.
enum class Operands {
    // Arrays of uint16_t.
    BF16,
    // Arrays of float, rounded to TF32 by the product.
    TF32,
};

// c[m][n] = beta c + alpha op(a) op(b), as in `detox_cuda_gemm`. The strides are the distances between rows of a, b and c
// as stored, in numbers.
struct Product {
    int64_t m, n, k;
    bool transpose_a, transpose_b;
    float alpha, beta;
    int64_t a_stride, b_stride, c_stride;
};

void multiply(
    detox_cuda_device& device, Operands operands, const Product& product, const void* a, const void* b, float* c);

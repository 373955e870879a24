// A GPU, its errors, and memory that is given back at the end of a scope.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "ops.h"
#include "platform.cuh"

// What ends an operation; becomes a status at the boundary.
struct Failure : std::runtime_error {
    detox_cuda_status status;
    Failure(detox_cuda_status status, const std::string& message) : std::runtime_error(message), status(status) {}
};

// What multiplies matrices, with what it has learnt about shapes: cuBLASLt's, or the emulation's.
struct Multiplier;

struct detox_cuda_device {
    int ordinal = 0;
    cudaStream_t stream = nullptr;
    // The process's: all its devices of this number share it.
    cudaMemPool_t pool = nullptr;
    Multiplier* multiplier = nullptr;
    cudaDeviceProp properties{};
    // Bytes of a matrix in bf16 that are made at a time, where only its blocks are kept: large enough that the products
    // over the parts run at full rate, small beside a model.
    int64_t part_bytes = 256 << 20;
    // One operation is asked for at a time: several kernels may share memory between them.
    std::mutex mutex;
};

// Throws where `error` is none but success: `what` was being done.
void check(cudaError_t error, const char* what);

// Throws INVALID unless `holds`: the caller has not kept to the contract.
void require(bool holds, const char* what);

// After a launch: whether it could be made.
inline void check_launch(const char* what) { check(cudaGetLastError(), what); }

// Keeps the words for `detox_cuda_last_error`, and gives the status.
detox_cuda_status keep_error(detox_cuda_status status, const char* message) noexcept;

// Calls `work`; no exception leaves it.
template <typename Work>
detox_cuda_status guarded(Work work) noexcept {
    try {
        work();
        return DETOX_CUDA_OK;
    } catch (const Failure& failure) {
        return keep_error(failure.status, failure.what());
    } catch (const std::bad_alloc&) {
        return keep_error(DETOX_CUDA_FAILED, "no memory on the host");
    } catch (const std::exception& error) {
        return keep_error(DETOX_CUDA_FAILED, error.what());
    } catch (...) {
        return keep_error(DETOX_CUDA_FAILED, "an unknown exception");
    }
}

// The same on a device, whose turn it is until the end.
template <typename Work>
detox_cuda_status on_device(detox_cuda_device* device, Work work) noexcept {
    return guarded([&] {
        require(device != nullptr, "a device");
        std::lock_guard<std::mutex> turn(device->mutex);
        check(cudaSetDevice(device->ordinal), "choosing the device");
        work();
    });
}

void* allocate(detox_cuda_device& device, size_t n_bytes);
void release(detox_cuda_device& device, void* memory) noexcept;

// [n] for one operation: memory goes back to the stream's pool, where the next operation may have it.
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

// Blocks of `size` for n, as a launch's first number.
inline unsigned blocks_of(int64_t n, int64_t size) { return (unsigned)((n + size - 1) / size); }

// Threads in a block of a kernel that takes one number a thread.
constexpr int THREADS = 256;

Multiplier* multiplier_open();
void multiplier_close(Multiplier* multiplier) noexcept;

// How the operands of a product are rounded; sums are always in f32.
enum class Operands {
    // [..] of uint16_t
    BF16,
    // [..] of float, rounded to TF32 on the way
    TF32,
};

// c[m][n] = beta c + alpha op(a) op(b), as in `detox_cuda_gemm`, with numbers from row to row of a, b and c as they
// lie.
struct Product {
    int64_t m, n, k;
    bool transpose_a, transpose_b;
    float alpha, beta;
    int64_t a_stride, b_stride, c_stride;
};

void multiply(
    detox_cuda_device& device, Operands operands, const Product& product, const void* a, const void* b, float* c);

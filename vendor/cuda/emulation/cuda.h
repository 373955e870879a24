// Emulates CUDA's execution model on a CPU, for tests without a GPU. Covers only the features that the kernels use.
//
// The threads of a block are fibers of one host thread, so a barrier or an exchange within a warp switches to the next
// fiber. Blocks run one after the other. The "GPU's" memory is host memory. It is filled with NaN when allocated, and its
// size can be limited. README.md explains what such tests can and cannot show.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// The indices of the running fiber.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// The block's shared memory.
float* shared_memory();
// Yields until all threads of the block have reached this call.
void wait_for_block();
// Yields until all lanes of the warp have called this, each with eight bytes. Returns the bytes of lane `lane ^ mask`.
uint64_t exchange(uint64_t bytes, int mask);
// Runs `thread` once for each thread of the grid.
void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

} // namespace emulation

#define SHARED_FLOATS(name) float* name = emulation::shared_memory()

inline void __syncthreads() { emulation::wait_for_block(); }

template <typename T>
T __shfl_xor_sync(unsigned lanes, T x, int mask) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a number");
    (void)lanes;
    uint64_t bytes = 0;
    std::memcpy(&bytes, &x, sizeof x);
    bytes = emulation::exchange(bytes, mask);
    std::memcpy(&x, &bytes, sizeof x);
    return x;
}

inline void __syncwarp() { emulation::exchange(0, 0); }

// The runtime.

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorStubLibrary = 34,
    cudaErrorInsufficientDriver = 35,
    cudaErrorDevicesUnavailable = 46,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorLaunchFailure = 719,
    cudaErrorSystemNotReady = 802,
    cudaErrorSystemDriverMismatch = 803,
    cudaErrorCompatNotSupportedOnDevice = 804,
};

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t sharedMemPerBlockOptin;
};

struct EmulatedStream;
typedef EmulatedStream* cudaStream_t;
struct EmulatedPool;
typedef EmulatedPool* cudaMemPool_t;

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaDeviceAttr { cudaDevAttrMemoryPoolsSupported = 115 };
enum cudaMemPoolAttr {
    cudaMemPoolAttrReleaseThreshold = 4,
    cudaMemPoolAttrReservedMemCurrent = 5,
    cudaMemPoolAttrUsedMemCurrent = 7,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* n);
cudaError_t cudaSetDevice(int ordinal);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int ordinal);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int ordinal);
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value);
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value);
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t n_bytes);
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaMallocAsync(void** memory, size_t n_bytes, cudaStream_t stream);
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream);
cudaError_t cudaMemGetInfo(size_t* n_free, size_t* n_total);
cudaError_t cudaMemsetAsync(void* memory, int byte, size_t n_bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n_bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Arguments... arguments) {
    emulation::run(
        (const void*)kernel, grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

// The emulated CUDA runtime: memory and errors.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

#include "control.h"
#include "state.h"

namespace {

// Shared memory of a kernel: the default limit, and the limit on request of a desktop GPU.
constexpr size_t SHARED_BYTES = 48 << 10;
constexpr size_t MOST_SHARED_BYTES = 99 << 10;

std::mutex memory_turn;
std::map<void*, size_t> taken;
size_t n_taken = 0, n_peak = 0, n_total = (size_t)4 << 30;
// Sizes of the released pieces that the pool keeps. A piece is only reused for an allocation of exactly its size, which
// is the worst case of fragmentation.
std::multiset<size_t> kept;
size_t n_kept = 0;

void trim() {
    kept.clear();
    n_kept = 0;
}

std::mutex kernels_turn;
std::map<const void*, size_t> shared_bytes_of;

thread_local cudaError_t last_error = cudaSuccess;
std::atomic<int> next_error{0};
std::atomic<int> next_launch_error{0};
// The sticky error of a dead context.
std::atomic<int> lasting_error{0};
std::atomic<bool> launch_error_stays{false};
std::atomic<bool> reverse{false};
std::atomic<size_t> n_launched{0};

cudaError_t failed(cudaError_t error) {
    last_error = error;
    return error;
}

// Fails if the context is dead: after a sticky error nothing works any more.
#define IF_ALIVE                                                                                                       \
    if (int error = lasting_error.load(); error != 0) return failed((cudaError_t)error)

// Whether [at, at + n) lies within allocated memory.
bool is_taken(const void* at, size_t n) {
    std::lock_guard<std::mutex> lock(memory_turn);
    auto place = taken.upper_bound((void*)at);
    if (place == taken.begin()) return false;
    --place;
    return (const char*)at + n <= (const char*)place->first + place->second;
}

} // namespace

namespace emulation {

void fail(cudaError_t error) { last_error = error; }

size_t allowed_shared_bytes(const void* kernel) {
    std::lock_guard<std::mutex> lock(kernels_turn);
    auto place = shared_bytes_of.find(kernel);
    return place == shared_bytes_of.end() ? SHARED_BYTES : place->second;
}

bool runs_in_reverse() { return reverse; }

void count_launch() { n_launched++; }

cudaError_t launch_error() {
    int error = next_launch_error.exchange(0);
    if (error != 0 && launch_error_stays) lasting_error = error;
    return (cudaError_t)(error != 0 ? error : lasting_error.load());
}

} // namespace emulation

void detox_cuda_emulation_set_memory(size_t n_bytes) {
    std::lock_guard<std::mutex> lock(memory_turn);
    trim();
    n_total = n_bytes;
}

size_t detox_cuda_emulation_taken(void) {
    std::lock_guard<std::mutex> lock(memory_turn);
    return n_taken;
}

size_t detox_cuda_emulation_peak(void) {
    std::lock_guard<std::mutex> lock(memory_turn);
    size_t peak = n_peak;
    n_peak = n_taken;
    return peak;
}

size_t detox_cuda_emulation_launched(void) { return n_launched.exchange(0); }

void detox_cuda_emulation_set_reverse(int32_t is_reverse) { reverse = is_reverse != 0; }

void detox_cuda_emulation_set_error(int32_t error) { next_error = error; }

void detox_cuda_emulation_set_launch_error(int32_t error, int32_t stays) {
    lasting_error = 0;
    launch_error_stays = stays != 0;
    next_launch_error = error;
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorDevicesUnavailable: return "CUDA-capable device(s) is/are busy or unavailable";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    default: return "an error of the emulated GPU";
    }
}

cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaGetDeviceCount(int* n) {
    int error = next_error.exchange(0);
    if (error != 0) return failed((cudaError_t)error);
    *n = 1;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int ordinal) { return ordinal == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int ordinal) {
    if (ordinal != 0) return failed(cudaErrorInvalidDevice);
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "emulated GPU");
    properties->major = 8;
    properties->minor = 6;
    properties->multiProcessorCount = 1;
    properties->sharedMemPerBlockOptin = MOST_SHARED_BYTES;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 1;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
    *pool = nullptr;
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr attribute, void* value) {
    std::lock_guard<std::mutex> lock(memory_turn);
    switch (attribute) {
    case cudaMemPoolAttrReservedMemCurrent: *(uint64_t*)value = n_taken + n_kept; return cudaSuccess;
    case cudaMemPoolAttrUsedMemCurrent: *(uint64_t*)value = n_taken; return cudaSuccess;
    default: return failed(cudaErrorInvalidValue);
    }
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) {
    std::lock_guard<std::mutex> lock(memory_turn);
    trim();
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    // Any address that is not null. It is never read.
    static char somewhere;
    *stream = (cudaStream_t)&somewhere;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t) {
    IF_ALIVE;
    return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** memory, size_t n_bytes, cudaStream_t) {
    IF_ALIVE;
    std::lock_guard<std::mutex> lock(memory_turn);
    auto again = kept.find(n_bytes);
    if (again != kept.end()) {
        n_kept -= n_bytes;
        kept.erase(again);
    }
    if (n_bytes > n_total || n_taken + n_kept > n_total - n_bytes) return failed(cudaErrorMemoryAllocation);
    void* made = nullptr;
    // Not rounded up, so that AddressSanitizer finds reads beyond the end.
    if (posix_memalign(&made, 256, n_bytes) != 0) return failed(cudaErrorMemoryAllocation);
    std::memset(made, 0xff, n_bytes);
    taken[made] = n_bytes;
    n_taken += n_bytes;
    if (n_taken > n_peak) n_peak = n_taken;
    *memory = made;
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
    std::lock_guard<std::mutex> lock(memory_turn);
    auto place = taken.find(memory);
    if (place == taken.end()) return failed(cudaErrorInvalidValue);
    n_taken -= place->second;
    n_kept += place->second;
    kept.insert(place->second);
    taken.erase(place);
    std::free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* n_free, size_t* n) {
    std::lock_guard<std::mutex> lock(memory_turn);
    *n = n_total;
    *n_free = n_taken + n_kept < n_total ? n_total - n_taken - n_kept : 0;
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t n_bytes, cudaStream_t) {
    IF_ALIVE;
    if (!is_taken(memory, n_bytes)) return failed(cudaErrorInvalidValue);
    emulation::count_launch();
    std::memset(memory, byte, n_bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n_bytes, cudaMemcpyKind kind, cudaStream_t) {
    IF_ALIVE;
    bool to_device = kind != cudaMemcpyDeviceToHost, from_device = kind != cudaMemcpyHostToDevice;
    if ((to_device && !is_taken(to, n_bytes)) || (from_device && !is_taken(from, n_bytes)))
        return failed(cudaErrorInvalidValue);
    std::memcpy(to, from, n_bytes);
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    if (value < 0 || (size_t)value > MOST_SHARED_BYTES) return failed(cudaErrorInvalidValue);
    std::lock_guard<std::mutex> lock(kernels_turn);
    shared_bytes_of[kernel] = (size_t)value > SHARED_BYTES ? (size_t)value : SHARED_BYTES;
    return cudaSuccess;
}

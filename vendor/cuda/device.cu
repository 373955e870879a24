// Devices, memory, and error messages.
#include "device.cuh"

#include <cstdio>
#include <cstring>
#include <new>

namespace {

thread_local std::string last_error;

// Ampere is the first architecture whose tensor cores support bf16.
constexpr int LEAST_MAJOR = 8;

detox_cuda_status status_of(cudaError_t error) {
    switch (error) {
    case cudaErrorMemoryAllocation: return DETOX_CUDA_OUT_OF_MEMORY;
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorDevicesUnavailable: return DETOX_CUDA_NO_DEVICE;
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
    case cudaErrorSystemNotReady:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice: return DETOX_CUDA_DRIVER;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion: return DETOX_CUDA_BUILD;
    default: return DETOX_CUDA_FAILED;
    }
}

// Advice for driver errors that a newer driver does not fix.
const char* cure_of(cudaError_t error) {
    switch (error) {
    case cudaErrorStubLibrary:
        return " (the toolkit's stub was loaded instead of the driver's libcuda.so: take its folder off LD_LIBRARY_PATH)";
    case cudaErrorSystemNotReady: return " (start NVIDIA's services, such as nvidia-fabricmanager)";
    case cudaErrorSystemDriverMismatch: return " (the driver was updated while it was running: restart the machine)";
    case cudaErrorCompatNotSupportedOnDevice:
        return " (this GPU does not support cuda-compat's libcuda.so: take its folder off LD_LIBRARY_PATH)";
    default: return "";
    }
}

__global__ void nothing_kernel() {}

std::string megabytes(size_t n_bytes) { return std::to_string(n_bytes >> 20) + " MiB"; }

// Opens the memory pool and lets this process keep released memory between operations.
cudaMemPool_t open_pool(int ordinal) {
    int has_pools = 0;
    check(cudaDeviceGetAttribute(&has_pools, cudaDevAttrMemoryPoolsSupported, ordinal), "checking for memory pools");
    if (!has_pools) throw Failure(DETOX_CUDA_UNSUPPORTED, "the driver does not support memory pools on this GPU");
    cudaMemPool_t pool;
    check(cudaDeviceGetDefaultMemPool(&pool, ordinal), "opening the memory pool");
    uint64_t all = UINT64_MAX;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all), "setting up the memory pool");
    return pool;
}

// Returns the pool's unused memory to the driver.
void close_pool(cudaMemPool_t pool) noexcept {
    uint64_t zero = 0;
    bool is_reset = cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &zero) == cudaSuccess;
    if (cudaMemPoolTrimTo(pool, 0) != cudaSuccess || !is_reset) (void)cudaGetLastError();
}

// Free memory: what the driver has left, plus the pool's unused memory.
cudaError_t free_memory(const detox_cuda_device& device, size_t* n_free, size_t* n_total) {
    uint64_t reserved = 0, used = 0;
    cudaError_t error = cudaMemGetInfo(n_free, n_total);
    if (error == cudaSuccess)
        error = cudaMemPoolGetAttribute(device.pool, cudaMemPoolAttrReservedMemCurrent, &reserved);
    if (error == cudaSuccess) error = cudaMemPoolGetAttribute(device.pool, cudaMemPoolAttrUsedMemCurrent, &used);
    if (error == cudaSuccess && reserved > used) *n_free += (size_t)(reserved - used);
    return error;
}

} // namespace

detox_cuda_status keep_error(detox_cuda_status status, const char* message) noexcept {
    try {
        last_error = message;
    } catch (...) {
        last_error.clear();
    }
    return status;
}

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    // Clear the error, unless it is sticky, so that the next call does not report it.
    cudaGetLastError();
    throw Failure(status_of(error), std::string(what) + ": " + cudaGetErrorString(error) + cure_of(error));
}

void require(bool holds, const char* what) {
    if (!holds) throw Failure(DETOX_CUDA_INVALID, std::string("expected ") + what);
}

void* allocate(detox_cuda_device& device, size_t n_bytes) {
    // An empty allocation still gets a unique address.
    if (n_bytes == 0) n_bytes = 1;
    void* memory = nullptr;
    cudaError_t error = cudaMallocAsync(&memory, n_bytes, device.stream);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        // The pool may hold unused pieces of other sizes. Return them and try again.
        check(cudaStreamSynchronize(device.stream), "allocating memory");
        check(cudaMemPoolTrimTo(device.pool, 0), "allocating memory");
        error = cudaMallocAsync(&memory, n_bytes, device.stream);
    }
    if (error == cudaSuccess) return memory;
    cudaGetLastError();
    if (error != cudaErrorMemoryAllocation) check(error, "allocating memory");
    size_t n_free = 0, n_total = 0;
    if (free_memory(device, &n_free, &n_total) != cudaSuccess) cudaGetLastError();
    throw Failure(
        DETOX_CUDA_OUT_OF_MEMORY, "the GPU has no room for " + megabytes(n_bytes) + " more: " + megabytes(n_free) +
                                      " of its " + megabytes(n_total) + " are free");
}

void release(detox_cuda_device& device, void* memory) noexcept {
    // A failure here comes from an earlier operation. If it is sticky, the next call reports it. Otherwise clear it, so
    // that the next launch does not report it.
    if (memory != nullptr && cudaFreeAsync(memory, device.stream) != cudaSuccess) (void)cudaGetLastError();
}

const char* detox_cuda_last_error(void) { return last_error.c_str(); }

detox_cuda_status detox_cuda_count(int32_t* n_devices) {
    return guarded([&] {
        require(n_devices != nullptr, "an address for the number");
        int n = 0;
        cudaError_t error = cudaGetDeviceCount(&n);
        if (error == cudaErrorNoDevice) {
            cudaGetLastError();
            n = 0;
        } else {
            check(error, "looking for GPUs");
        }
        *n_devices = n;
    });
}

detox_cuda_status detox_cuda_open(int32_t ordinal, detox_cuda_device** device) {
    return guarded([&] {
        require(device != nullptr, "an address for the device");
        *device = nullptr;
        int n = 0;
        check(cudaGetDeviceCount(&n), "looking for GPUs");
        if (ordinal < 0 || ordinal >= n)
            throw Failure(
                DETOX_CUDA_NO_DEVICE, "there is no GPU " + std::to_string(ordinal) +
                                          ": GPUs are numbered from 0, and this machine has " + std::to_string(n));
        detox_cuda_device* made = new detox_cuda_device;
        try {
            made->ordinal = ordinal;
            check(cudaGetDeviceProperties(&made->properties, ordinal), "reading the GPU's properties");
            if (made->properties.major < LEAST_MAJOR)
                throw Failure(
                    DETOX_CUDA_UNSUPPORTED, std::string(made->properties.name) + " has compute capability " +
                                                std::to_string(made->properties.major) + "." +
                                                std::to_string(made->properties.minor) + "; at least 8.0 is required");
            check(cudaSetDevice(ordinal), "selecting the GPU");
            made->pool = open_pool(ordinal);
            check(cudaStreamCreate(&made->stream), "creating a stream");
            // A build without kernels for this GPU fails here, before anything is loaded.
            launch(nothing_kernel, dim3(1), dim3(1), 0, made->stream);
            check_launch("trying a kernel");
            check(cudaStreamSynchronize(made->stream), "trying a kernel");
            made->multiplier = multiplier_open();
        } catch (...) {
            if (made->stream != nullptr) (void)cudaStreamDestroy(made->stream);
            delete made;
            throw;
        }
        *device = made;
    });
}

void detox_cuda_close(detox_cuda_device* device) {
    if (device == nullptr) return;
    (void)cudaSetDevice(device->ordinal);
    (void)cudaStreamSynchronize(device->stream);
    close_pool(device->pool);
    multiplier_close(device->multiplier);
    (void)cudaStreamDestroy(device->stream);
    delete device;
}

detox_cuda_status detox_cuda_describe(detox_cuda_device* device, detox_cuda_properties* properties) {
    return on_device(device, [&] {
        require(properties != nullptr, "an address for the properties");
        *properties = {};
        std::snprintf(properties->name, sizeof properties->name, "%s", device->properties.name);
        properties->major = device->properties.major;
        properties->minor = device->properties.minor;
        properties->n_multiprocessors = device->properties.multiProcessorCount;
        check(cudaDriverGetVersion(&properties->driver_version), "reading the driver's version");
        check(cudaRuntimeGetVersion(&properties->runtime_version), "reading the runtime's version");
    });
}

detox_cuda_status detox_cuda_memory(detox_cuda_device* device, size_t* n_free, size_t* n_total) {
    return on_device(device, [&] {
        require(n_free != nullptr && n_total != nullptr, "an address for each number");
        check(free_memory(*device, n_free, n_total), "reading the free memory");
    });
}

detox_cuda_status detox_cuda_trim(detox_cuda_device* device) {
    return on_device(device, [&] {
        // Released memory reaches the pool only when the stream has executed the release.
        check(cudaStreamSynchronize(device->stream), "releasing memory");
        check(cudaMemPoolTrimTo(device->pool, 0), "releasing memory");
    });
}

detox_cuda_status detox_cuda_allocate(detox_cuda_device* device, size_t n_bytes, void** memory) {
    return on_device(device, [&] {
        require(memory != nullptr, "an address for the pointer");
        *memory = nullptr;
        *memory = allocate(*device, n_bytes);
    });
}

detox_cuda_status detox_cuda_release(detox_cuda_device* device, void* memory) {
    return on_device(device, [&] {
        if (memory != nullptr) check(cudaFreeAsync(memory, device->stream), "releasing memory");
    });
}

detox_cuda_status detox_cuda_clear(detox_cuda_device* device, size_t n_bytes, void* memory) {
    return on_device(device, [&] {
        if (n_bytes > 0) check(cudaMemsetAsync(memory, 0, n_bytes, device->stream), "clearing memory");
    });
}

detox_cuda_status detox_cuda_write(detox_cuda_device* device, const void* host, size_t n_bytes, void* memory) {
    return on_device(device, [&] {
        if (n_bytes == 0) return;
        check(cudaMemcpyAsync(memory, host, n_bytes, cudaMemcpyHostToDevice, device->stream), "writing to the GPU");
        check(cudaStreamSynchronize(device->stream), "writing to the GPU");
    });
}

detox_cuda_status detox_cuda_read(detox_cuda_device* device, const void* memory, size_t n_bytes, void* host) {
    return on_device(device, [&] {
        if (n_bytes > 0)
            check(
                cudaMemcpyAsync(host, memory, n_bytes, cudaMemcpyDeviceToHost, device->stream), "reading from the GPU");
        check(cudaStreamSynchronize(device->stream), "reading from the GPU");
    });
}

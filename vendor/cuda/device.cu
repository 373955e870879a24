// Devices, memory, and errors in words.
#include "device.cuh"

#include <cstdio>
#include <cstring>
#include <new>

namespace {

thread_local std::string last_error;

// Tensor cores that take bf16 came with Ampere.
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

// The cure of an error of drivers that a newer one does not cure.
const char* cure_of(cudaError_t error) {
    switch (error) {
    case cudaErrorStubLibrary:
        return " (that is the toolkit's, in place of the driver's libcuda.so: take its folder off LD_LIBRARY_PATH)";
    case cudaErrorSystemNotReady: return " (start NVIDIA's services, such as nvidia-fabricmanager)";
    case cudaErrorSystemDriverMismatch: return " (the driver was changed while it ran: start the machine again)";
    case cudaErrorCompatNotSupportedOnDevice:
        return " (this GPU takes no libcuda.so of cuda-compat: take its folder off LD_LIBRARY_PATH)";
    default: return "";
    }
}

__global__ void nothing_kernel() {}

std::string megabytes(size_t n_bytes) { return std::to_string(n_bytes >> 20) + " MiB"; }

// Memory of the pool stays with this process between operations.
cudaMemPool_t keep_pool(int ordinal) {
    int has_pools = 0;
    check(cudaDeviceGetAttribute(&has_pools, cudaDevAttrMemoryPoolsSupported, ordinal), "asking for memory pools");
    if (!has_pools) throw Failure(DETOX_CUDA_UNSUPPORTED, "the driver of this GPU has no memory pools");
    cudaMemPool_t pool;
    check(cudaDeviceGetDefaultMemPool(&pool, ordinal), "asking for the memory pool");
    uint64_t all = UINT64_MAX;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all), "setting up the memory pool");
    return pool;
}

// Gives back to the driver what the pool keeps for later.
void end_pool(cudaMemPool_t pool) noexcept {
    uint64_t none = 0;
    bool ended = cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &none) == cudaSuccess;
    if (cudaMemPoolTrimTo(pool, 0) != cudaSuccess || !ended) (void)cudaGetLastError();
}

// What the driver has left, and what the pool keeps for later.
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
    // An error that does not stick is taken off, so that the next call is not blamed for it.
    cudaGetLastError();
    throw Failure(status_of(error), std::string(what) + ": " + cudaGetErrorString(error) + cure_of(error));
}

void require(bool holds, const char* what) {
    if (!holds) throw Failure(DETOX_CUDA_INVALID, std::string("expected ") + what);
}

void* allocate(detox_cuda_device& device, size_t n_bytes) {
    // Nothing still has an address of its own.
    if (n_bytes == 0) n_bytes = 1;
    void* memory = nullptr;
    cudaError_t error = cudaMallocAsync(&memory, n_bytes, device.stream);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        // The pool may keep pieces of other sizes: once more without them.
        check(cudaStreamSynchronize(device.stream), "taking memory");
        check(cudaMemPoolTrimTo(device.pool, 0), "taking memory");
        error = cudaMallocAsync(&memory, n_bytes, device.stream);
    }
    if (error == cudaSuccess) return memory;
    cudaGetLastError();
    if (error != cudaErrorMemoryAllocation) check(error, "taking memory");
    size_t n_free = 0, n_total = 0;
    if (free_memory(device, &n_free, &n_total) != cudaSuccess) cudaGetLastError();
    throw Failure(
        DETOX_CUDA_OUT_OF_MEMORY, "the GPU has no room for " + megabytes(n_bytes) + " more: " + megabytes(n_free) +
                                      " of its " + megabytes(n_total) + " are free");
}

void release(detox_cuda_device& device, void* memory) noexcept {
    // A failure here was a failure of an operation before. Where it sticks, the next call reports it; otherwise it is
    // taken off, so that the next launch is not blamed for it.
    if (memory != nullptr && cudaFreeAsync(memory, device.stream) != cudaSuccess) (void)cudaGetLastError();
}

const char* detox_cuda_last_error(void) { return last_error.c_str(); }

detox_cuda_status detox_cuda_count(int32_t* n_devices) {
    return guarded([&] {
        require(n_devices != nullptr, "somewhere to write the number");
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
        require(device != nullptr, "somewhere to write the device");
        *device = nullptr;
        int n = 0;
        check(cudaGetDeviceCount(&n), "looking for GPUs");
        if (ordinal < 0 || ordinal >= n)
            throw Failure(
                DETOX_CUDA_NO_DEVICE, "there is no GPU " + std::to_string(ordinal) +
                                          ": they are counted from 0, and there are " + std::to_string(n));
        detox_cuda_device* made = new detox_cuda_device;
        try {
            made->ordinal = ordinal;
            check(cudaGetDeviceProperties(&made->properties, ordinal), "asking for the GPU's properties");
            if (made->properties.major < LEAST_MAJOR)
                throw Failure(
                    DETOX_CUDA_UNSUPPORTED, std::string(made->properties.name) + " has compute capability " +
                                                std::to_string(made->properties.major) + "." +
                                                std::to_string(made->properties.minor) + ", and 8.0 is the least");
            check(cudaSetDevice(ordinal), "choosing the GPU");
            made->pool = keep_pool(ordinal);
            check(cudaStreamCreate(&made->stream), "making a stream");
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
    end_pool(device->pool);
    multiplier_close(device->multiplier);
    (void)cudaStreamDestroy(device->stream);
    delete device;
}

detox_cuda_status detox_cuda_describe(detox_cuda_device* device, detox_cuda_properties* properties) {
    return on_device(device, [&] {
        require(properties != nullptr, "somewhere to write the properties");
        *properties = {};
        std::snprintf(properties->name, sizeof properties->name, "%s", device->properties.name);
        properties->major = device->properties.major;
        properties->minor = device->properties.minor;
        properties->n_multiprocessors = device->properties.multiProcessorCount;
        check(cudaDriverGetVersion(&properties->driver_version), "asking for the driver's version");
        check(cudaRuntimeGetVersion(&properties->runtime_version), "asking for the runtime's version");
    });
}

detox_cuda_status detox_cuda_memory(detox_cuda_device* device, size_t* n_free, size_t* n_total) {
    return on_device(device, [&] {
        require(n_free != nullptr && n_total != nullptr, "somewhere to write the numbers");
        check(free_memory(*device, n_free, n_total), "asking for free memory");
    });
}

detox_cuda_status detox_cuda_trim(detox_cuda_device* device) {
    return on_device(device, [&] {
        // What was released is the pool's once the stream has come to it.
        check(cudaStreamSynchronize(device->stream), "giving memory back");
        check(cudaMemPoolTrimTo(device->pool, 0), "giving memory back");
    });
}

detox_cuda_status detox_cuda_wait(detox_cuda_device* device) {
    return on_device(device, [&] { check(cudaStreamSynchronize(device->stream), "waiting for the GPU"); });
}

detox_cuda_status detox_cuda_allocate(detox_cuda_device* device, size_t n_bytes, void** memory) {
    return on_device(device, [&] {
        require(memory != nullptr, "somewhere to write the address");
        *memory = nullptr;
        *memory = allocate(*device, n_bytes);
    });
}

detox_cuda_status detox_cuda_release(detox_cuda_device* device, void* memory) {
    return on_device(device, [&] {
        if (memory != nullptr) check(cudaFreeAsync(memory, device->stream), "giving memory back");
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

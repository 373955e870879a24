// Rounds numbers to bf16, from a GGUF's blocks or from f32.
#include "dequantize.cuh"

#include "blocks.cuh"

namespace {

template <int TYPE>
__global__ void round_blocks_kernel(const uint8_t* blocks, int64_t first, int64_t n, uint16_t* rounded) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * GROUP;
    if (at >= n) return;
    int n_here = n - at < GROUP ? (int)(n - at) : GROUP;
    float x[GROUP];
    read_numbers<TYPE>(blocks, first + at, n_here, x);
    if (n_here == GROUP) {
        // A wide store is aligned: `rounded` starts at a multiple of 256 bytes, and a group has 16 bytes.
        uint4 packed;
        packed.x = bf16_of_float(x[0]) | (uint32_t)bf16_of_float(x[1]) << 16;
        packed.y = bf16_of_float(x[2]) | (uint32_t)bf16_of_float(x[3]) << 16;
        packed.z = bf16_of_float(x[4]) | (uint32_t)bf16_of_float(x[5]) << 16;
        packed.w = bf16_of_float(x[6]) | (uint32_t)bf16_of_float(x[7]) << 16;
        *(uint4*)(rounded + at) = packed;
    } else {
        for (int i = 0; i < n_here; i++) rounded[at + i] = bf16_of_float(x[i]);
    }
}

} // namespace

void round_blocks(
    detox_cuda_device& device, int32_t type, const void* blocks, int64_t first, int64_t n, uint16_t* rounded) {
    if (n == 0) return;
    bool known = with_type(type, [&](auto block, auto id) {
        require(first % block.LEN == 0 && n % block.LEN == 0, "whole blocks");
        launch(
            round_blocks_kernel<id()>, dim3(blocks_of(n, (int64_t)GROUP * THREADS)), dim3(THREADS), 0, device.stream,
            (const uint8_t*)blocks, first, n, rounded);
    });
    require(known, "a supported type");
    check_launch("dequantising");
}

void round_numbers(detox_cuda_device& device, const float* x, int64_t n, uint16_t* rounded) {
    round_blocks(device, TYPE_F32, x, 0, n, rounded);
}

detox_cuda_status detox_cuda_block(int32_t type, int32_t* n_numbers, int32_t* n_bytes) {
    return guarded([&] {
        require(n_numbers != nullptr && n_bytes != nullptr, "an address for each number");
        bool known = with_type(type, [&](auto block, auto) { *n_numbers = block.LEN, *n_bytes = block.BYTES; });
        if (!known) throw Failure(DETOX_CUDA_UNSUPPORTED, "no kernel reads type " + std::to_string(type));
    });
}

detox_cuda_status
detox_cuda_round_blocks(detox_cuda_device* device, int32_t type, const void* blocks, int64_t n, uint16_t* rounded) {
    return on_device(device, [&] { round_blocks(*device, type, blocks, 0, n, rounded); });
}

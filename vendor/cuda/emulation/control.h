// Controls of the emulated GPU, for tests.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Sets the total size of the memory in bytes, including memory in use.
void detox_cuda_emulation_set_memory(size_t n_bytes);
// Bytes in use.
size_t detox_cuda_emulation_taken(void);
// Peak bytes in use since the last call.
size_t detox_cuda_emulation_peak(void);
// Number of kernels, products and memory clears launched since the last call.
size_t detox_cuda_emulation_launched(void);
// Runs threads and blocks from last to first instead of first to last. If a result changes, there is a race.
void detox_cuda_emulation_set_reverse(int32_t reverse);
// Makes the next call that looks for GPUs fail with this CUDA runtime error. 0: no failure.
void detox_cuda_emulation_set_error(int32_t error);
// Makes the next kernel launch fail with this error. If `stays`, everything after it fails too, until the next call of
// this function.
void detox_cuda_emulation_set_launch_error(int32_t error, int32_t stays);

#ifdef __cplusplus
}
#endif

// What tests may set of the emulated GPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// How many bytes of memory it has from now on, what is taken included.
void detox_cuda_emulation_set_memory(size_t n_bytes);
// Bytes that are taken.
size_t detox_cuda_emulation_taken(void);
// The largest number of bytes that were taken at once since the last call.
size_t detox_cuda_emulation_peak(void);
// Kernels, products and clearings of memory that were launched since the last call.
size_t detox_cuda_emulation_launched(void);
// Threads and blocks from the last to the first, instead of from the first: a result that depends on it is a race.
void detox_cuda_emulation_set_reverse(int32_t reverse);
// What the next call that looks for GPUs says instead: one of the runtime's numbers for errors; 0 for nothing.
void detox_cuda_emulation_set_error(int32_t error);
// What the next launch of a kernel says instead; where it `stays`, everything after it too, until the next call of
// this.
void detox_cuda_emulation_set_launch_error(int32_t error, int32_t stays);

#ifdef __cplusplus
}
#endif

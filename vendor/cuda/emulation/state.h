// What the emulated runtime and its fibers tell each other.
#pragma once

#include "cuda.h"

namespace emulation {

// What `cudaGetLastError` is to give.
void fail(cudaError_t error);
// Bytes of shared memory that a kernel may be launched with.
size_t allowed_shared_bytes(const void* kernel);
bool runs_in_reverse();
// Counts what is launched: a kernel, a product, or memory that is cleared.
void count_launch();
// The error that was made up for a launch, or success.
cudaError_t launch_error();

} // namespace emulation

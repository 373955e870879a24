// Interface between the emulated runtime and the fibers.
#pragma once

#include "cuda.h"

namespace emulation {

// Sets the error that `cudaGetLastError` returns.
void fail(cudaError_t error);
// Bytes of shared memory that a kernel may use.
size_t allowed_shared_bytes(const void* kernel);
bool runs_in_reverse();
// Counts a launch: a kernel, a product, or a memory clear.
void count_launch();
// The injected error of a launch, or success.
cudaError_t launch_error();

} // namespace emulation

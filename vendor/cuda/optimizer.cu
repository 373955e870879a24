// Gradient norms and optimizer steps. One launch handles many tensors.
#include <vector>

#include "device.cuh"
#include "reduce.cuh"

namespace {

// Tensors per launch. They are passed as one kernel argument, which is limited to 4 KiB.
constexpr int TENSORS = 64;

// Limit of thread blocks per tensor.
constexpr int64_t MOST_BLOCKS = DETOX_CUDA_SQUARE_SUM_BLOCKS;

int blocks_for(int64_t most_numbers) {
    int64_t n = blocks_of(most_numbers, THREADS);
    return (int)(n < 1 ? 1 : n < MOST_BLOCKS ? n : MOST_BLOCKS);
}

struct ParameterList {
    detox_cuda_parameter of[TENSORS];
};

struct VectorList {
    const float* x[TENSORS];
    int64_t n[TENSORS];
};

// sums[T][blocks]. In f64, because gradients have millions of numbers.
__global__ void square_sum_kernel(VectorList list, double* sums) {
    const float* x = list.x[blockIdx.y];
    int64_t n = list.n[blockIdx.y];
    double sum = 0.0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x)
        sum += (double)x[i] * (double)x[i];
    sum = warp_sum(sum);
    SHARED_FLOATS(shared);
    double* of_warps = (double*)shared;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (lane == 0) of_warps[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0.0;
        for (int i = 0; i < (int)blockDim.x / WARP; i++) sum += of_warps[i];
        sums[blockIdx.y * gridDim.x + blockIdx.x] = sum;
    }
}

__global__ void rmsprop_kernel(detox_cuda_rmsprop_step step, ParameterList list) {
    detox_cuda_parameter p = list.of[blockIdx.y];
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += (int64_t)gridDim.x * blockDim.x) {
        float g = p.gradient[i] * step.gradient_scale;
        float mean_square = step.alpha * p.mean_square[i] + (1.0f - step.alpha) * g * g;
        p.mean_square[i] = mean_square;
        p.value[i] -= step.learning_rate * g / (sqrtf(mean_square) + step.epsilon);
    }
}

__global__ void adamw_kernel(detox_cuda_adamw_step step, ParameterList list) {
    detox_cuda_parameter p = list.of[blockIdx.y];
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += (int64_t)gridDim.x * blockDim.x) {
        float g = p.gradient[i] * step.gradient_scale;
        float value = p.value[i];
        value -= step.learning_rate * step.weight_decay * value;
        float mean = step.beta1 * p.mean[i] + (1.0f - step.beta1) * g;
        float mean_square = step.beta2 * p.mean_square[i] + (1.0f - step.beta2) * g * g;
        p.mean[i] = mean;
        p.mean_square[i] = mean_square;
        value -= step.learning_rate / step.correction1 * mean / (sqrtf(mean_square) / step.correction2 + step.epsilon);
        p.value[i] = value;
    }
}

// Calls `step` with lists of at most TENSORS parameters and the grid for each list.
template <typename Step>
void for_lists(const detox_cuda_parameter* parameters, int64_t n_tensors, Step step) {
    require(n_tensors >= 0 && (n_tensors == 0 || parameters != nullptr), "parameters");
    for (int64_t first = 0; first < n_tensors; first += TENSORS) {
        ParameterList list{};
        int n = n_tensors - first < TENSORS ? (int)(n_tensors - first) : TENSORS;
        int64_t most = 0;
        for (int i = 0; i < n; i++) {
            list.of[i] = parameters[first + i];
            if (list.of[i].n > most) most = list.of[i].n;
        }
        step(list, dim3(blocks_for(most), (unsigned)n));
    }
}

} // namespace

detox_cuda_status detox_cuda_square_sum(
    detox_cuda_device* device, const float* const* x, const int64_t* n, int64_t n_tensors, double* sum) {
    return on_device(device, [&] {
        require(n_tensors >= 0 && sum != nullptr, "an address for the sum");
        *sum = 0.0;
        if (n_tensors == 0) return;
        int64_t most = 0;
        for (int64_t i = 0; i < n_tensors; i++) most = n[i] > most ? n[i] : most;
        int n_blocks = blocks_for(most);
        std::vector<double> sums((size_t)n_tensors * n_blocks);
        Scratch<double> there(*device, sums.size());
        for (int64_t first = 0; first < n_tensors; first += TENSORS) {
            VectorList list{};
            int n_here = n_tensors - first < TENSORS ? (int)(n_tensors - first) : TENSORS;
            for (int i = 0; i < n_here; i++) list.x[i] = x[first + i], list.n[i] = n[first + i];
            launch(
                square_sum_kernel, dim3(n_blocks, (unsigned)n_here), dim3(THREADS), THREADS / WARP * sizeof(double),
                device->stream, list, (double*)there + first * n_blocks);
            check_launch("a sum of squares");
        }
        check(
            cudaMemcpyAsync(
                sums.data(), (double*)there, sums.size() * sizeof(double), cudaMemcpyDeviceToHost, device->stream),
            "reading a sum of squares");
        check(cudaStreamSynchronize(device->stream), "reading a sum of squares");
        for (double part : sums) *sum += part;
    });
}

detox_cuda_status detox_cuda_rmsprop(
    detox_cuda_device* device, const detox_cuda_rmsprop_step* step, const detox_cuda_parameter* parameters,
    int64_t n_tensors) {
    return on_device(device, [&] {
        require(step != nullptr, "a step");
        for_lists(parameters, n_tensors, [&](const ParameterList& list, dim3 grid) {
            launch(rmsprop_kernel, grid, dim3(THREADS), 0, device->stream, *step, list);
            check_launch("a step of RMSprop");
        });
    });
}

detox_cuda_status detox_cuda_adamw(
    detox_cuda_device* device, const detox_cuda_adamw_step* step, const detox_cuda_parameter* parameters,
    int64_t n_tensors) {
    return on_device(device, [&] {
        require(step != nullptr, "a step");
        for_lists(parameters, n_tensors, [&](const ParameterList& list, dim3 grid) {
            launch(adamw_kernel, grid, dim3(THREADS), 0, device->stream, *step, list);
            check_launch("a step of AdamW");
        });
    });
}

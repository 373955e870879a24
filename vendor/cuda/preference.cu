// Losses on preference pairs and their gradients. The CPU's implementation cites the equations and papers.
//
// A pair is only a few numbers, so everything is in f64. The sums have the same order as on the CPU; the last bits can
// differ, because nvcc fuses a product and a sum into one operation that rounds once.
#include "device.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace {

constexpr double LN_2 = 0.69314718055994530942;

__device__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// log(sigmoid(x)), without overflow for large negative x.
__device__ double log_sigmoid(double x) {
    // If policy and reference are equal, the loss must be exactly ln 2. A GPU's logarithm may be off in the last bit.
    if (x == 0.0) return -LN_2;
    return fmin(x, 0.0) - log1p(exp(-fabs(x)));
}

struct Slope {
    double loss;
    // The loss's derivative with respect to h.
    double slope;
};

__device__ Slope loss_of(const detox_cuda_preference& preference, double h) {
    double beta = preference.beta, smoothing = preference.label_smoothing;
    switch (preference.loss) {
    case DETOX_CUDA_SIGMOID: {
        double x = beta * h;
        return {
            -(1.0 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x),
            beta * (smoothing * sigmoid(x) - (1.0 - smoothing) * sigmoid(-x))};
    }
    case DETOX_CUDA_IPO: {
        double distance = h - 1.0 / (2.0 * beta);
        return {distance * distance, 2.0 * distance};
    }
    default: {
        double missing = 1.0 - beta * h;
        if (missing > 0.0) return {missing, -beta};
        return {0.0, 0.0};
    }
    }
}

// One thread block of one warp per pair. references[pairs][2], chosen before rejected.
__global__ void preference_kernel(
    detox_cuda_preference preference, const int32_t* answer_ends, const double* references, const float* logps,
    float* dlogps, detox_cuda_pair_cost* costs) {
    SHARED_FLOATS(shared);
    double* sums = (double*)shared; // [2], then the derivatives, [2]
    double* slopes = sums + 2;
    const int64_t pair = blockIdx.x;
    const int32_t first = pair == 0 ? 0 : answer_ends[2 * pair - 1];
    const int32_t middle = answer_ends[2 * pair], end = answer_ends[2 * pair + 1];
    if (threadIdx.x < 2) {
        double sum = 0.0;
        for (int32_t i = threadIdx.x == 0 ? first : middle; i < (threadIdx.x == 0 ? middle : end); i++) sum += logps[i];
        sums[threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        bool by_token = preference.loss == DETOX_CUDA_IPO;
        double weight_chosen = by_token ? 1.0 / (middle - first) : 1.0;
        double weight_rejected = by_token ? 1.0 / (end - middle) : 1.0;
        double chosen = sums[0] - references[2 * pair], rejected = sums[1] - references[2 * pair + 1];
        Slope of_h = loss_of(preference, chosen * weight_chosen - rejected * weight_rejected);
        detox_cuda_pair_cost cost = {
            sums[0], sums[1], of_h.loss, of_h.slope * weight_chosen, -of_h.slope * weight_rejected};
        costs[pair] = cost;
        slopes[0] = cost.dchosen / (double)preference.n_pairs;
        slopes[1] = cost.drejected / (double)preference.n_pairs;
    }
    __syncthreads();
    for (int32_t i = first + (int32_t)threadIdx.x; i < end; i += WARP) dlogps[i] = (float)slopes[i < middle ? 0 : 1];
}

} // namespace

detox_cuda_status detox_cuda_preference_loss(
    detox_cuda_device* device, const detox_cuda_preference* preference, const detox_cuda_rows* rows,
    const double* references, const float* logps, float* dlogps, detox_cuda_pair_cost* costs) {
    return on_device(device, [&] {
        require(preference != nullptr && preference->n_pairs > 0, "a loss over pairs");
        require(
            preference->loss == DETOX_CUDA_SIGMOID || preference->loss == DETOX_CUDA_IPO ||
                preference->loss == DETOX_CUDA_HINGE,
            "a known loss");
        require(rows != nullptr && rows->n_answers % 2 == 0, "pairs of answers");
        size_t n = (size_t)rows->n_answers / 2;
        if (n == 0) return;
        Scratch<double> of_references(*device, 2 * n);
        Scratch<detox_cuda_pair_cost> there(*device, n);
        check(
            cudaMemcpyAsync(
                (double*)of_references, references, 2 * n * sizeof(double), cudaMemcpyHostToDevice, device->stream),
            "writing references to the GPU");
        launch(
            preference_kernel, dim3((unsigned)n), dim3(WARP), 4 * sizeof(double), device->stream, *preference,
            rows->answer_ends, (const double*)of_references, logps, dlogps, (detox_cuda_pair_cost*)there);
        check_launch("losses of pairs");
        check(
            cudaMemcpyAsync(
                costs, (detox_cuda_pair_cost*)there, n * sizeof(detox_cuda_pair_cost), cudaMemcpyDeviceToHost,
                device->stream),
            "reading losses of pairs");
        // This also ensures that the host's references may be freed when this function returns.
        check(cudaStreamSynchronize(device->stream), "reading losses of pairs");
    });
}

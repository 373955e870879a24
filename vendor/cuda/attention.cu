// Attention over packed pairs, forward. As in FlashAttention (arXiv 2205.14135), scores are computed one tile at a time
// with running maxima and sums: the [R][R] score matrix never exists in memory.
#include <type_traits>

#include "attention.cuh"

AttentionShape attention_shape(const detox_cuda_attention_kind* kind, const detox_cuda_rows* rows) {
    require(kind != nullptr && rows != nullptr, "an attention kind and rows");
    require(
        kind->n_head > 0 && kind->n_head_kv > 0 && kind->n_head % kind->n_head_kv == 0 && kind->head_dim > 0,
        "heads that share key and value heads evenly");
    require(kind->window >= 0, "a window from 0 up");
    if (kind->head_dim > DETOX_CUDA_MOST_HEAD_DIM || kind->n_head > DETOX_CUDA_MOST_HEADS)
        throw Failure(
            DETOX_CUDA_UNSUPPORTED, "attention: expected up to " + std::to_string(DETOX_CUDA_MOST_HEADS) +
                                        " heads of size up to " + std::to_string(DETOX_CUDA_MOST_HEAD_DIM) +
                                        ", found " + std::to_string(kind->n_head) + " heads of size " +
                                        std::to_string(kind->head_dim));
    AttentionShape shape{};
    shape.n_head = kind->n_head;
    shape.n_head_kv = kind->n_head_kv;
    shape.dim = kind->head_dim;
    shape.scale = kind->scale;
    shape.window = kind->window;
    if (kind->slopes != nullptr)
        for (int head = 0; head < kind->n_head; head++) shape.slopes[head] = kind->slopes[head];
    return shape;
}

namespace {

// One thread block computes one tile of queries of one head.
template <int TILE, int COLS>
__global__ void attention_kernel(
    AttentionShape shape, RowView rows, const QueryTile* tiles, const float* q, const float* k, const float* v,
    float* out, float* lse) {
    SHARED_FLOATS(shared);
    const int stride = shape.stride();
    float* q_tile = shared;                   // [TILE][stride]
    float* k_tile = q_tile + TILE * stride;   // [TILE][stride]
    float* v_tile = k_tile + TILE * stride;   // [TILE][stride]
    float* scores = v_tile + TILE * stride;   // [TILE][TILE + 1]
    float* most = scores + TILE * (TILE + 1); // [TILE], the largest score of each row so far
    float* sums = most + TILE;                // [TILE], sums of exp(score - most)
    float* rescale = sums + TILE;             // [TILE], factor for earlier sums after the maximum has grown
    const QueryTile tile = tiles[blockIdx.x];
    const int head = blockIdx.y, kv_head = head / (shape.n_head / shape.n_head_kv);
    const int y = threadIdx.x / THREAD_COLS, x = threadIdx.x % THREAD_COLS;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    load_tile<TILE>(q, tile.first, tile.end - tile.first, shape.n_head, head, shape.dim, stride, q_tile);
    for (int i = threadIdx.x; i < TILE; i += ATTENTION_THREADS) {
        most[i] = -INFINITY;
        sums[i] = 0.0f;
    }
    float of_out[TILE / THREAD_ROWS][COLS];
    for (int i = 0; i < TILE / THREAD_ROWS; i++)
        for (int j = 0; j < COLS; j++) of_out[i][j] = 0.0f;

    for (int part = 0; part < 2; part++) {
        const int part_first = part == 0 ? tile.prefix_first : tile.segment_first;
        const int part_end = part == 0 ? tile.prefix_end : tile.end;
        for (int first = part_first; first < part_end; first += TILE) {
            const int n = part_end - first < TILE ? part_end - first : TILE;
            // Wait until every thread has read the previous tiles.
            __syncthreads();
            load_tile<TILE>(k, first, n, shape.n_head_kv, kv_head, shape.dim, stride, k_tile);
            load_tile<TILE>(v, first, n, shape.n_head_kv, kv_head, shape.dim, stride, v_tile);
            __syncthreads();
            float products[TILE / THREAD_ROWS][TILE / THREAD_COLS];
            multiply_tiles<TILE>(q_tile, k_tile, shape.dim, stride, products);
            for (int i = 0; i < TILE / THREAD_ROWS; i++)
                for (int j = 0; j < TILE / THREAD_COLS; j++) {
                    int row = y + THREAD_ROWS * i, col = x + THREAD_COLS * j;
                    int query = tile.first + row, key = first + col;
                    bool counts = query < tile.end && col < n && sees(shape, rows, query, key);
                    scores[row * (TILE + 1) + col] =
                        counts ? score_of(shape, rows, head, query, key, products[i][j]) : -INFINITY;
                }
            __syncthreads();
            for (int row = warp; row < TILE; row += ATTENTION_THREADS / WARP) {
                float score = lane < TILE ? scores[row * (TILE + 1) + lane] : -INFINITY;
                float before = most[row];
                float now = fmaxf(before, warp_max(score));
                // If the row has seen no key yet, its maximum is -inf and cannot be subtracted.
                float p = score == -INFINITY ? 0.0f : expf(score - now);
                float sum = warp_sum(p);
                if (lane < TILE) scores[row * (TILE + 1) + lane] = p;
                // Wait until all lanes have read the values that lane 0 overwrites.
                __syncwarp();
                if (lane == 0) {
                    float factor = before == -INFINITY ? 0.0f : expf(before - now);
                    sums[row] = sums[row] * factor + sum;
                    most[row] = now;
                    rescale[row] = factor;
                }
            }
            __syncthreads();
            for (int i = 0; i < TILE / THREAD_ROWS; i++)
                for (int j = 0; j < COLS; j++) of_out[i][j] *= rescale[y + THREAD_ROWS * i];
            add_weighted<TILE, COLS>(scores, v_tile, n, shape.dim, stride, of_out);
        }
    }

    for (int i = 0; i < TILE / THREAD_ROWS; i++) {
        int row = y + THREAD_ROWS * i, query = tile.first + row;
        if (query >= tile.end) continue;
        int64_t at = (int64_t)query * shape.n_head + head;
        for (int j = 0; j < COLS; j++) {
            int col = x + THREAD_COLS * j;
            if (col < shape.dim) out[at * shape.dim + col] = of_out[i][j] / sums[row];
        }
        if (x == 0) lse[at] = most[row] + logf(sums[row]);
    }
}

} // namespace

detox_cuda_status detox_cuda_attention(
    detox_cuda_device* device, const detox_cuda_attention_kind* kind, const detox_cuda_rows* rows, const float* q,
    const float* k, const float* v, float* out, float* lse) {
    return on_device(device, [&] {
        AttentionShape shape = attention_shape(kind, rows);
        if (rows->n_rows == 0) return;
        with_tiles(*rows, shape.dim, [&](const Tiles& tiles, auto tile, auto cols) {
            constexpr int TILE = tile(), COLS = cols();
            size_t n_floats = 3 * (size_t)TILE * shape.stride() + TILE * (TILE + 1) + 3 * TILE;
            allow_shared(*device, attention_kernel<TILE, COLS>, n_floats * sizeof(float));
            launch(
                attention_kernel<TILE, COLS>, dim3(tiles.n_queries, shape.n_head), dim3(ATTENTION_THREADS),
                n_floats * sizeof(float), device->stream, shape, row_view(*rows), tiles.queries, q, k, v, out, lse);
        });
        check_launch("attention");
    });
}

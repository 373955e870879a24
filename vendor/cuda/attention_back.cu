// Attention over packed pairs, backward. Scores are recomputed one tile at a time. With p the probabilities, dp = dout v
// and D = dout out, the gradient of the scores is ds = p (dp - D).
#include <type_traits>

#include "attention.cuh"

namespace {

// shifts[R][H] = D, as defined above. One warp computes one head of one row.
__global__ void shift_kernel(const float* out, const float* dout, int64_t n, int dim, float* shifts) {
    int64_t i = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (i >= n) return;
    float sum = 0.0f;
    for (int d = threadIdx.x; d < dim; d += WARP) sum += out[i * dim + d] * dout[i * dim + d];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) shifts[i] = sum;
}

// Inputs of both kernels.
struct BackOperands {
    const float *q, *k, *v, *lse, *dout, *shifts;
};

// p and ds of a query and a key, given their products q k and dout v.
__device__ inline void slopes_of(
    const AttentionShape& shape, const RowView& rows, const BackOperands& of, int head, int query, int key,
    float product, float dp, float& p, float& ds) {
    int64_t at = (int64_t)query * shape.n_head + head;
    p = expf(score_of(shape, rows, head, query, key, product) - of.lse[at]);
    ds = p * (dp - of.shifts[at]) * shape.scale;
}

// dq += ds k. One thread block computes one tile of queries of one head.
template <int TILE, int COLS>
__global__ void
query_gradient_kernel(AttentionShape shape, RowView rows, const QueryTile* tiles, BackOperands of, float* dq) {
    SHARED_FLOATS(shared);
    const int stride = shape.stride();
    float* q_tile = shared;                    // [TILE][stride]
    float* dout_tile = q_tile + TILE * stride; // [TILE][stride]
    float* k_tile = dout_tile + TILE * stride; // [TILE][stride]
    float* v_tile = k_tile + TILE * stride;    // [TILE][stride]
    float* ds_tile = v_tile + TILE * stride;   // [TILE queries][TILE + 1]
    const QueryTile tile = tiles[blockIdx.x];
    const int head = blockIdx.y, kv_head = head / (shape.n_head / shape.n_head_kv);
    const int y = threadIdx.x / THREAD_COLS, x = threadIdx.x % THREAD_COLS;

    load_tile<TILE>(of.q, tile.first, tile.end - tile.first, shape.n_head, head, shape.dim, stride, q_tile);
    load_tile<TILE>(of.dout, tile.first, tile.end - tile.first, shape.n_head, head, shape.dim, stride, dout_tile);
    float of_dq[TILE / THREAD_ROWS][COLS];
    for (int i = 0; i < TILE / THREAD_ROWS; i++)
        for (int j = 0; j < COLS; j++) of_dq[i][j] = 0.0f;

    for (int part = 0; part < 2; part++) {
        const int part_first = part == 0 ? tile.prefix_first : tile.segment_first;
        const int part_end = part == 0 ? tile.prefix_end : tile.end;
        for (int first = part_first; first < part_end; first += TILE) {
            const int n = part_end - first < TILE ? part_end - first : TILE;
            // Wait until every thread has read the previous tiles.
            __syncthreads();
            load_tile<TILE>(of.k, first, n, shape.n_head_kv, kv_head, shape.dim, stride, k_tile);
            load_tile<TILE>(of.v, first, n, shape.n_head_kv, kv_head, shape.dim, stride, v_tile);
            __syncthreads();
            float products[TILE / THREAD_ROWS][TILE / THREAD_COLS], dps[TILE / THREAD_ROWS][TILE / THREAD_COLS];
            multiply_tiles<TILE>(q_tile, k_tile, shape.dim, stride, products);
            multiply_tiles<TILE>(dout_tile, v_tile, shape.dim, stride, dps);
            for (int i = 0; i < TILE / THREAD_ROWS; i++)
                for (int j = 0; j < TILE / THREAD_COLS; j++) {
                    int row = y + THREAD_ROWS * i, col = x + THREAD_COLS * j;
                    int query = tile.first + row, key = first + col;
                    float p = 0.0f, ds = 0.0f;
                    if (query < tile.end && col < n && sees(shape, rows, query, key))
                        slopes_of(shape, rows, of, head, query, key, products[i][j], dps[i][j], p, ds);
                    ds_tile[row * (TILE + 1) + col] = ds;
                }
            __syncthreads();
            add_weighted<TILE, COLS>(ds_tile, k_tile, n, shape.dim, stride, of_dq);
        }
    }
    for (int i = 0; i < TILE / THREAD_ROWS; i++) {
        int query = tile.first + y + THREAD_ROWS * i;
        if (query >= tile.end) continue;
        float* to = dq + ((int64_t)query * shape.n_head + head) * shape.dim;
        for (int j = 0; j < COLS; j++) {
            int col = x + THREAD_COLS * j;
            if (col < shape.dim) to[col] += of_dq[i][j];
        }
    }
}

// dk += ds q, dv += p dout. One thread block computes one tile of keys of one key and value head, over all query heads
// of the group. No other block adds to these gradients, so the order of each sum is fixed.
template <int TILE, int COLS>
__global__ void key_gradient_kernel(
    AttentionShape shape, RowView rows, const KeyTile* tiles, const RowRange* ranges, BackOperands of, float* dk,
    float* dv) {
    SHARED_FLOATS(shared);
    const int stride = shape.stride();
    float* k_tile = shared;                      // [TILE][stride]
    float* v_tile = k_tile + TILE * stride;      // [TILE][stride]
    float* q_tile = v_tile + TILE * stride;      // [TILE][stride]
    float* dout_tile = q_tile + TILE * stride;   // [TILE][stride]
    float* p_tile = dout_tile + TILE * stride;   // [TILE keys][TILE + 1]
    float* ds_tile = p_tile + TILE * (TILE + 1); // [TILE keys][TILE + 1]
    const KeyTile tile = tiles[blockIdx.x];
    const int kv_head = blockIdx.y, group = shape.n_head / shape.n_head_kv;
    const int y = threadIdx.x / THREAD_COLS, x = threadIdx.x % THREAD_COLS;

    load_tile<TILE>(of.k, tile.first, tile.end - tile.first, shape.n_head_kv, kv_head, shape.dim, stride, k_tile);
    load_tile<TILE>(of.v, tile.first, tile.end - tile.first, shape.n_head_kv, kv_head, shape.dim, stride, v_tile);
    float of_dk[TILE / THREAD_ROWS][COLS], of_dv[TILE / THREAD_ROWS][COLS];
    for (int i = 0; i < TILE / THREAD_ROWS; i++)
        for (int j = 0; j < COLS; j++) of_dk[i][j] = of_dv[i][j] = 0.0f;

    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int r = tile.ranges_first; r < tile.ranges_end; r++) {
            const RowRange range = ranges[r];
            for (int first = range.first; first < range.end; first += TILE) {
                const int n = range.end - first < TILE ? range.end - first : TILE;
                // Wait until every thread has read the previous tiles.
                __syncthreads();
                load_tile<TILE>(of.q, first, n, shape.n_head, head, shape.dim, stride, q_tile);
                load_tile<TILE>(of.dout, first, n, shape.n_head, head, shape.dim, stride, dout_tile);
                __syncthreads();
                float products[TILE / THREAD_ROWS][TILE / THREAD_COLS], dps[TILE / THREAD_ROWS][TILE / THREAD_COLS];
                multiply_tiles<TILE>(k_tile, q_tile, shape.dim, stride, products);
                multiply_tiles<TILE>(v_tile, dout_tile, shape.dim, stride, dps);
                for (int i = 0; i < TILE / THREAD_ROWS; i++)
                    for (int j = 0; j < TILE / THREAD_COLS; j++) {
                        int row = y + THREAD_ROWS * i, col = x + THREAD_COLS * j;
                        int key = tile.first + row, query = first + col;
                        float p = 0.0f, ds = 0.0f;
                        if (key < tile.end && col < n && sees(shape, rows, query, key))
                            slopes_of(shape, rows, of, head, query, key, products[i][j], dps[i][j], p, ds);
                        p_tile[row * (TILE + 1) + col] = p;
                        ds_tile[row * (TILE + 1) + col] = ds;
                    }
                __syncthreads();
                add_weighted<TILE, COLS>(ds_tile, q_tile, n, shape.dim, stride, of_dk);
                add_weighted<TILE, COLS>(p_tile, dout_tile, n, shape.dim, stride, of_dv);
            }
        }
    }
    for (int i = 0; i < TILE / THREAD_ROWS; i++) {
        int key = tile.first + y + THREAD_ROWS * i;
        if (key >= tile.end) continue;
        int64_t at = ((int64_t)key * shape.n_head_kv + kv_head) * shape.dim;
        for (int j = 0; j < COLS; j++) {
            int col = x + THREAD_COLS * j;
            if (col >= shape.dim) continue;
            dk[at + col] += of_dk[i][j];
            dv[at + col] += of_dv[i][j];
        }
    }
}

} // namespace

detox_cuda_status detox_cuda_attention_back(
    detox_cuda_device* device, const detox_cuda_attention_kind* kind, const detox_cuda_rows* rows, const float* q,
    const float* k, const float* v, const float* out, const float* lse, const float* dout, float* dq, float* dk,
    float* dv) {
    return on_device(device, [&] {
        AttentionShape shape = attention_shape(kind, rows);
        if (rows->n_rows == 0) return;
        int64_t n = rows->n_rows * shape.n_head;
        Scratch<float> shifts(*device, (size_t)n);
        launch(
            shift_kernel, dim3(blocks_of(n, THREADS / WARP)), dim3(WARP, THREADS / WARP), 0, device->stream, out, dout,
            n, shape.dim, (float*)shifts);
        check_launch("attention's gradient");
        BackOperands of = {q, k, v, lse, dout, shifts};
        with_tiles(*rows, shape.dim, [&](const Tiles& tiles, auto tile, auto cols) {
            constexpr int TILE = tile(), COLS = cols();
            size_t of_queries = (4 * (size_t)TILE * shape.stride() + TILE * (TILE + 1)) * sizeof(float);
            size_t of_keys = (4 * (size_t)TILE * shape.stride() + 2 * TILE * (TILE + 1)) * sizeof(float);
            allow_shared(*device, query_gradient_kernel<TILE, COLS>, of_queries);
            allow_shared(*device, key_gradient_kernel<TILE, COLS>, of_keys);
            launch(
                query_gradient_kernel<TILE, COLS>, dim3(tiles.n_queries, shape.n_head), dim3(ATTENTION_THREADS),
                of_queries, device->stream, shape, row_view(*rows), tiles.queries, of, dq);
            check_launch("attention's gradient of queries");
            launch(
                key_gradient_kernel<TILE, COLS>, dim3(tiles.n_keys, shape.n_head_kv), dim3(ATTENTION_THREADS), of_keys,
                device->stream, shape, row_view(*rows), tiles.keys, tiles.ranges, of, dk, dv);
            check_launch("attention's gradient of keys and values");
        });
    });
}

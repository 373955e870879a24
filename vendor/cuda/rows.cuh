// A batch on the GPU, with the tables that its kernels use to divide the work.
#pragma once

#include "device.cuh"

// Query rows [first, end) of one segment, and the rows that the last of them attends to.
struct QueryTile {
    int32_t first, end, prefix_first, prefix_end, segment_first;
};

// Key rows [first, end) of one segment. Ranges [ranges_first, ranges_end) hold all rows that may attend to one of them.
struct KeyTile {
    int32_t first, end, ranges_first, ranges_end;
};

struct RowRange {
    int32_t first, end;
};

// Attention's work, divided into tiles of a maximum number of rows.
struct Tiles {
    const QueryTile* queries = nullptr; // [n_queries]
    const KeyTile* keys = nullptr;      // [n_keys]
    const RowRange* ranges = nullptr;
    int32_t n_queries = 0, n_keys = 0;
};

// For each row or output: its table index, and the nearest row before and after it with the same index (-1 if none).
struct Chain {
    const int32_t* index = nullptr;
    const int32_t* previous = nullptr;
    const int32_t* next = nullptr;
};

// Maximum rows of the larger and the smaller tiles.
constexpr int LARGE_TILE = DETOX_CUDA_LARGE_TILE;
constexpr int SMALL_TILE = DETOX_CUDA_SMALL_TILE;

struct detox_cuda_rows {
    detox_cuda_device* device = nullptr;
    int64_t n_rows = 0, n_outputs = 0, n_answers = 0;
    // Owns all the arrays below.
    int32_t* memory = nullptr;
    const int32_t* positions = nullptr;     // [R]
    const int32_t* prefix_first = nullptr;  // [R], of the row's segment
    const int32_t* prefix_end = nullptr;    // [R]
    const int32_t* segment_first = nullptr; // [R]
    const int32_t* output_tokens = nullptr; // [n_outputs]
    const int32_t* answer_ends = nullptr;   // [n_answers]
    Chain tokens, of_positions, outputs;
    Tiles large, small;
};

// Copies a batch to the GPU.
#include "rows.cuh"

#include <algorithm>
#include <unordered_map>
#include <vector>

namespace {

// Integer arrays that are copied to the GPU together. `add` returns the offset of an array.
struct Upload {
    std::vector<int32_t> all;

    size_t add(const int32_t* values, size_t n) {
        size_t at = all.size();
        all.insert(all.end(), values, values + n);
        return at;
    }
    size_t add(const std::vector<int32_t>& values) { return add(values.data(), values.size()); }
    // For structs that consist only of int32_t fields.
    template <typename T>
    size_t add_structs(const std::vector<T>& values) {
        static_assert(sizeof(T) % sizeof(int32_t) == 0, "a struct of int32_t fields");
        return add((const int32_t*)values.data(), values.size() * (sizeof(T) / sizeof(int32_t)));
    }
};

struct ChainAt {
    size_t index, previous, next;
};

ChainAt add_chain(Upload& upload, const int32_t* index, int64_t n) {
    std::vector<int32_t> previous(n, -1), next(n, -1);
    std::unordered_map<int32_t, int32_t> last;
    for (int64_t i = 0; i < n; i++) {
        auto place = last.find(index[i]);
        if (place != last.end()) {
            previous[i] = place->second;
            next[place->second] = (int32_t)i;
        }
        last[index[i]] = (int32_t)i;
    }
    return {upload.add(index, (size_t)n), upload.add(previous), upload.add(next)};
}

Chain chain_at(const int32_t* memory, ChainAt at) {
    return {memory + at.index, memory + at.previous, memory + at.next};
}

struct TilesAt {
    size_t queries, keys, ranges;
    int32_t n_queries, n_keys;
};

TilesAt add_tiles(Upload& upload, const detox_cuda_batch& batch, int tile) {
    std::vector<QueryTile> queries;
    std::vector<KeyTile> keys;
    std::vector<RowRange> ranges;
    for (int64_t s = 0; s < batch.n_segments; s++) {
        const detox_cuda_segment& segment = batch.segments[s];
        for (int32_t first = segment.first; first < segment.end; first += tile) {
            int32_t end = std::min(first + tile, segment.end);
            queries.push_back({first, end, segment.prefix_first, segment.prefix_end, segment.first});
            KeyTile key = {first, end, (int32_t)ranges.size(), 0};
            ranges.push_back({first, segment.end});
            for (int64_t other = 0; other < batch.n_segments; other++) {
                const detox_cuda_segment& of = batch.segments[other];
                if (of.prefix_first < end && first < of.prefix_end) ranges.push_back({of.first, of.end});
            }
            key.ranges_end = (int32_t)ranges.size();
            keys.push_back(key);
        }
    }
    return {
        upload.add_structs(queries), upload.add_structs(keys), upload.add_structs(ranges), (int32_t)queries.size(),
        (int32_t)keys.size()};
}

Tiles tiles_at(const int32_t* memory, TilesAt at) {
    return {
        (const QueryTile*)(memory + at.queries), (const KeyTile*)(memory + at.keys),
        (const RowRange*)(memory + at.ranges), at.n_queries, at.n_keys};
}

void check_batch(const detox_cuda_batch& batch) {
    require(batch.n_rows >= 0 && batch.n_rows <= INT32_MAX, "a number of rows");
    require(batch.n_outputs >= 0 && batch.n_outputs <= INT32_MAX, "a number of outputs");
    std::vector<bool> has_segment((size_t)batch.n_rows, false);
    for (int64_t s = 0; s < batch.n_segments; s++) {
        const detox_cuda_segment& segment = batch.segments[s];
        require(0 <= segment.first && segment.first < segment.end && segment.end <= batch.n_rows, "segments of rows");
        require(
            0 <= segment.prefix_first && segment.prefix_first <= segment.prefix_end &&
                (segment.prefix_first == segment.prefix_end || segment.prefix_end <= segment.first),
            "prefixes before their segments");
        for (int32_t row = segment.first; row < segment.end; row++) {
            require(!has_segment[row], "each row in one segment");
            has_segment[row] = true;
        }
    }
    for (int64_t row = 0; row < batch.n_rows; row++) {
        require(has_segment[row], "each row in one segment");
        require(batch.tokens[row] >= 0 && batch.positions[row] >= 0, "tokens and positions from 0 up");
    }
    for (int64_t i = 0; i < batch.n_outputs; i++) {
        require(0 <= batch.output_rows[i] && batch.output_rows[i] < batch.n_rows, "outputs at rows of the batch");
        require(batch.output_tokens[i] >= 0, "tokens from 0 up");
    }
    require(batch.n_answers >= 0 && batch.n_answers <= batch.n_outputs, "a number of answers");
    int32_t end = 0;
    for (int64_t i = 0; i < batch.n_answers; i++) {
        require(batch.answer_ends[i] > end && batch.answer_ends[i] <= batch.n_outputs, "answers in order, none empty");
        end = batch.answer_ends[i];
    }
    // The loss writes a derivative for each output of an answer. An output outside all answers would stay uninitialised.
    require(batch.n_answers == 0 || end == batch.n_outputs, "answers that have all outputs");
}

} // namespace

detox_cuda_status
detox_cuda_rows_open(detox_cuda_device* device, const detox_cuda_batch* batch, detox_cuda_rows** rows) {
    return on_device(device, [&] {
        require(batch != nullptr && rows != nullptr, "a batch");
        *rows = nullptr;
        check_batch(*batch);
        size_t n = (size_t)batch->n_rows;
        std::vector<int32_t> prefix_first(n), prefix_end(n), segment_first(n);
        for (int64_t s = 0; s < batch->n_segments; s++) {
            const detox_cuda_segment& segment = batch->segments[s];
            for (int32_t row = segment.first; row < segment.end; row++) {
                prefix_first[row] = segment.prefix_first;
                prefix_end[row] = segment.prefix_end;
                segment_first[row] = segment.first;
            }
        }
        Upload upload;
        size_t prefix_first_at = upload.add(prefix_first), prefix_end_at = upload.add(prefix_end);
        size_t segment_first_at = upload.add(segment_first);
        size_t output_tokens_at = upload.add(batch->output_tokens, (size_t)batch->n_outputs);
        size_t answer_ends_at = upload.add(batch->answer_ends, (size_t)batch->n_answers);
        ChainAt tokens = add_chain(upload, batch->tokens, batch->n_rows);
        ChainAt positions = add_chain(upload, batch->positions, batch->n_rows);
        ChainAt outputs = add_chain(upload, batch->output_rows, batch->n_outputs);
        TilesAt large = add_tiles(upload, *batch, LARGE_TILE), small = add_tiles(upload, *batch, SMALL_TILE);

        detox_cuda_rows* made = new detox_cuda_rows;
        try {
            made->device = device;
            made->n_rows = batch->n_rows;
            made->n_outputs = batch->n_outputs;
            made->n_answers = batch->n_answers;
            size_t n_bytes = upload.all.size() * sizeof(int32_t);
            made->memory = (int32_t*)allocate(*device, n_bytes);
            if (n_bytes > 0) {
                check(
                    cudaMemcpyAsync(made->memory, upload.all.data(), n_bytes, cudaMemcpyHostToDevice, device->stream),
                    "writing a batch to the GPU");
                // Wait, because the host's copy is freed when this function returns.
                check(cudaStreamSynchronize(device->stream), "writing a batch to the GPU");
            }
        } catch (...) {
            release(*device, made->memory);
            delete made;
            throw;
        }
        const int32_t* memory = made->memory;
        made->prefix_first = memory + prefix_first_at;
        made->prefix_end = memory + prefix_end_at;
        made->segment_first = memory + segment_first_at;
        made->output_tokens = memory + output_tokens_at;
        made->answer_ends = memory + answer_ends_at;
        made->tokens = chain_at(memory, tokens);
        made->of_positions = chain_at(memory, positions);
        made->outputs = chain_at(memory, outputs);
        made->positions = made->of_positions.index;
        made->large = tiles_at(memory, large);
        made->small = tiles_at(memory, small);
        *rows = made;
    });
}

void detox_cuda_rows_close(detox_cuda_rows* rows) {
    if (rows == nullptr) return;
    (void)on_device(rows->device, [&] { release(*rows->device, rows->memory); });
    delete rows;
}

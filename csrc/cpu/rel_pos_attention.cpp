#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/rel_pos_attention.cpp"
#define VLCORE_MULTIPLIES_TILES
#include "cpu/for_each_level.h"

namespace vlcore {

void rel_pos_attention_forward(const void* q, const void* k, const void* v, const void* rel_pos_h,
                               const void* rel_pos_w, void* out, float* statistics, TokenStrides q_strides,
                               TokenStrides k_strides, TokenStrides v_strides, TokenStrides out_strides, int64_t batch,
                               int64_t heads, int64_t height, int64_t width, int64_t head_dim, Target target) {
  VLCORE_RUN(target, rel_pos_attention_forward, q, k, v, rel_pos_h, rel_pos_w, out, statistics, q_strides, k_strides,
             v_strides, out_strides, batch, heads, height, width, head_dim);
}

void rel_pos_attention_backward(const void* grad_out, const void* q, const void* k, const void* v,
                                const void* rel_pos_h, const void* rel_pos_w, const void* out, const float* statistics,
                                void* grad_q, void* grad_k, void* grad_v, void* grad_rel_pos_h, void* grad_rel_pos_w,
                                TokenStrides grad_out_strides, TokenStrides q_strides, TokenStrides k_strides,
                                TokenStrides v_strides, TokenStrides out_strides, int64_t batch, int64_t heads,
                                int64_t height, int64_t width, int64_t head_dim, Target target) {
  VLCORE_RUN(target, rel_pos_attention_backward, grad_out, q, k, v, rel_pos_h, rel_pos_w, out, statistics, grad_q,
             grad_k, grad_v, grad_rel_pos_h, grad_rel_pos_w, grad_out_strides, q_strides, k_strides, v_strides,
             out_strides, batch, heads, height, width, head_dim);
}

}  // namespace vlcore

#else
#include "cpu/grid_attention.h"
#include "cpu/grid_attention_backward.h"
#include "cpu/grid_attention_forward.h"

namespace vlcore::VLCORE_LEVEL {

// The rows of one head: (tokens, head_dim), token_stride apart.
template <typename T>
struct HeadRows {
  HeadRows(const void* from, const TokenStrides& strides, int64_t heads, int64_t head)
      : first(static_cast<const T*>(from) + head / heads * strides[0] + head % heads * strides[1]),
        token_stride(strides[2]) {}
  const T* row(int64_t token) const { return first + token * token_stride; }
  std::vector<const T*> by_lane(const Grid& grid) const {
    return rows_by_lane<T>(grid, [&](int64_t y, int64_t x) { return row(y * grid.width + x); });
  }

  const T* first;
  int64_t token_stride;
};

// Into how many parts the queries of each head are cut.
static int64_t parts_of_head(int64_t num_heads, int64_t tokens) {
  const int64_t num_blocks = (tokens + kBlockRows - 1) / kBlockRows;
  return std::min(num_blocks, (kFewHeads + num_heads - 1) / num_heads);
}

template <typename T>
static void rel_pos_attention_forward(const void* q, const void* k, const void* v, const void* rel_pos_h,
                                      const void* rel_pos_w, void* out, float* statistics,
                                      const TokenStrides& q_strides, const TokenStrides& k_strides,
                                      const TokenStrides& v_strides, const TokenStrides& out_strides, int64_t batch,
                                      int64_t heads, int64_t height, int64_t width, int64_t head_dim) {
  using O = Operand<T>;
  const Grid grid{height, width, head_dim};
  const int64_t tokens = grid.tokens(), num_heads = batch * heads;
  if (num_heads * tokens == 0) return;
  const PackedTable<O> table_h(static_cast<const T*>(rel_pos_h), height, head_dim);
  const PackedTable<O> table_w(static_cast<const T*>(rel_pos_w), width, head_dim);
  const int64_t parts = parts_of_head(num_heads, tokens);
#pragma omp parallel if (num_heads * tokens * tokens * head_dim >= kParallelProducts)
  {
    PackedLanes<O> keys(grid, true, false), values(grid, false, true);
    ForwardBlock<T> block(grid);
    std::vector<Query<T> > queries;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < num_heads * parts; ++unit) {
      const int64_t head = unit / parts, part = unit % parts;
      keys.pack(HeadRows<T>(k, k_strides, heads, head).by_lane(grid));
      values.pack(HeadRows<T>(v, v_strides, heads, head).by_lane(grid));
      const HeadRows<T> q_rows(q, q_strides, heads, head), out_rows(out, out_strides, heads, head);
      queries.clear();
      for (int64_t token = cut(tokens, parts, part); token < cut(tokens, parts, part + 1); ++token) {
        queries.push_back({q_rows.row(token), const_cast<T*>(out_rows.row(token)),
                           statistics + 2 * (head * tokens + token), token / width, token % width});
      }
      for_blocks<T>(queries.size(), [&](int64_t first, int64_t count) {
        attend(queries.data() + first, count, keys, values, table_h, table_w, block);
      });
    }
  }
}

template <typename T>
static void rel_pos_attention_backward(const void* grad_out, const void* q, const void* k, const void* v,
                                       const void* rel_pos_h, const void* rel_pos_w, const void* out,
                                       const float* statistics, void* grad_q, void* grad_k, void* grad_v,
                                       void* grad_rel_pos_h, void* grad_rel_pos_w, const TokenStrides& grad_out_strides,
                                       const TokenStrides& q_strides, const TokenStrides& k_strides,
                                       const TokenStrides& v_strides, const TokenStrides& out_strides, int64_t batch,
                                       int64_t heads, int64_t height, int64_t width, int64_t head_dim) {
  using O = Operand<T>;
  const Grid grid{height, width, head_dim};
  const int64_t tokens = grid.tokens(), num_heads = batch * heads;
  const PackedTable<O> table_h(static_cast<const T*>(rel_pos_h), height, head_dim);
  const PackedTable<O> table_w(static_cast<const T*>(rel_pos_w), width, head_dim);
  const int64_t parts = tokens && num_heads ? parts_of_head(num_heads, tokens) : 0, units = num_heads * parts;
  const int64_t chunks = std::min(units, kMaxChunks);
  const GridSums<O> sizes(grid);
  const int64_t tables_size = sizes.table_h_size + sizes.table_w_size;
  std::vector<float> table_sums(chunks * tables_size);
  // The sums of a head's parts, of which each has 2 * lanes_size.
  const std::unique_ptr<float[]> part_sums(parts > 1 ? new float[units * 2 * sizes.lanes_size] : nullptr);
  // Adds the sums of a head's parts up in the first's, and writes them.
  const auto write_head = [&](int64_t head, float* sums, int64_t count, const Scratch<float>& rows) {
    for (int64_t part = 1; part < count; ++part) {
      const float* more = sums + part * 2 * sizes.lanes_size;
      for (int64_t i = 0; i < 2 * sizes.lanes_size; ++i) sums[i] += more[i];
    }
    for (T* grad : {static_cast<T*>(grad_k), static_cast<T*>(grad_v)}) {
      const float scale = grad == grad_k ? grid.scale() : 1.f;
      for (int64_t y = 0; y < height; ++y) {
        sizes.image_row(grid, grad == grad_k ? sums : sums + sizes.lanes_size, y, rows.get());
        for (int64_t x = 0; x < width; ++x) {
          T* to = grad + (head * tokens + y * width + x) * head_dim;
          for (int64_t d = 0; d < head_dim; ++d) to[d] = convert<T>(rows.get()[x * sizes.stride + d] * scale);
        }
      }
    }
  };
#pragma omp parallel if (num_heads * tokens * tokens * head_dim >= kParallelProducts)
  {
    PackedLanes<O> keys(grid, true, true), values(grid, true, false);
    BackwardBlock<T> block(grid);
    std::vector<Query<T> > queries;
    const Scratch<float> own_sums(parts > 1 ? 0 : 2 * sizes.lanes_size), rows(grid.row_lanes() * sizes.stride);
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      GridSums<O> sums = sizes;
      sums.table_h = table_sums.data() + chunk * tables_size;
      sums.table_w = sums.table_h + sizes.table_h_size;
      for (int64_t unit = cut(units, chunks, chunk); unit < cut(units, chunks, chunk + 1); ++unit) {
        const int64_t head = unit / parts, part = unit % parts;
        keys.pack(HeadRows<T>(k, k_strides, heads, head).by_lane(grid));
        values.pack(HeadRows<T>(v, v_strides, heads, head).by_lane(grid));
        sums.keys = parts > 1 ? part_sums.get() + unit * 2 * sizes.lanes_size : own_sums.get();
        sums.values = sums.keys + sizes.lanes_size;
        std::memset(sums.keys, 0, 2 * sizes.lanes_size * sizeof(float));
        const HeadRows<T> q_rows(q, q_strides, heads, head), out_rows(out, out_strides, heads, head);
        const HeadRows<T> grad_rows(grad_out, grad_out_strides, heads, head);
        queries.clear();
        for (int64_t token = cut(tokens, parts, part); token < cut(tokens, parts, part + 1); ++token) {
          const int64_t row = head * tokens + token;
          queries.push_back({q_rows.row(token), const_cast<T*>(out_rows.row(token)),
                             const_cast<float*>(statistics) + 2 * row, token / width, token % width,
                             grad_rows.row(token), static_cast<T*>(grad_q) + row * head_dim});
        }
        for_blocks<T>(queries.size(), [&](int64_t first, int64_t count) {
          attend_backward(queries.data() + first, count, keys, values, table_h, table_w, block, sums);
        });
        if (parts == 1) write_head(head, sums.keys, 1, rows);
      }
    }
#pragma omp for
    for (int64_t head = 0; head < (parts > 1 ? num_heads : 0); ++head) {
      write_head(head, part_sums.get() + head * parts * 2 * sizes.lanes_size, parts, rows);
    }
  }
  const auto at = [&](int64_t row, int64_t d) { return sizes.at(row, d); };
  sum_parts(table_sums.data(), chunks, tables_size, 2 * height - 1, head_dim, static_cast<T*>(grad_rel_pos_h), at);
  sum_parts(table_sums.data() + sizes.table_h_size, chunks, tables_size, 2 * width - 1, head_dim,
            static_cast<T*>(grad_rel_pos_w), at);
}

}  // namespace vlcore::VLCORE_LEVEL
#endif

#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/rel_pos_attention.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void rel_pos_attention_forward(const void* q, const void* k, const void* v, const void* rel_pos_h,
                               const void* rel_pos_w, void* out, float* lse, int64_t heads, int64_t height,
                               int64_t width, int64_t head_dim, Target target) {
  VLCORE_RUN(target, rel_pos_attention_forward, q, k, v, rel_pos_h, rel_pos_w, out, lse, heads, height, width,
             head_dim);
}

}  // namespace vlcore

#else
#include "cpu/grid_attention.h"

namespace vlcore::VLCORE_LEVEL {

template <typename T>
static void rel_pos_attention_forward(const void* q, const void* k, const void* v, const void* rel_pos_h,
                                      const void* rel_pos_w, void* out, float* lse, int64_t heads, int64_t height,
                                      int64_t width, int64_t head_dim) {
  using O = Operand<T>;
  const Grid grid{height, width, head_dim};
  const int64_t tokens = grid.tokens(), num_tiles = grid.num_tiles();
  const int64_t keys_size = num_tiles * packed_keys_size<O>(grid);
  const int64_t values_size = num_tiles * packed_values_size<O>(grid);
  const Scratch<O> keys(heads * keys_size), values(heads * values_size);
  const Scratch<O> table_h(packed_size<O>(head_dim, 2 * height - 1)), table_w(packed_size<O>(head_dim, 2 * width - 1));
  pack_transposed(static_cast<const T*>(rel_pos_h), head_dim, head_dim, 2 * height - 1, table_h.get());
  pack_transposed(static_cast<const T*>(rel_pos_w), head_dim, head_dim, 2 * width - 1, table_w.get());
  const int64_t blocks = (tokens + kBlockRows - 1) / kBlockRows;
#pragma omp parallel
  {
#pragma omp for
    for (int64_t index = 0; index < heads * num_tiles; ++index) {
      const int64_t head = index / num_tiles, first = head * tokens * head_dim;
      pack_tile(static_cast<const T*>(k) + first, static_cast<const T*>(v) + first, grid, index % num_tiles,
                keys.get() + head * keys_size, values.get() + head * values_size);
    }
    const GridScratch<T> scratch(grid);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < heads * blocks; ++index) {
      const int64_t head = index / blocks, first = index % blocks * kBlockRows;
      Queries<T> queries;
      for (int64_t token = first; token < std::min(tokens, first + kBlockRows); ++token) {
        const int64_t row = head * tokens + token;
        queries.add(static_cast<const T*>(q) + row * head_dim, static_cast<T*>(out) + row * head_dim, lse + row,
                    token / width, token % width);
      }
      attend(queries, {keys.get() + head * keys_size, values.get() + head * values_size, table_h.get(), table_w.get()},
             grid, scratch);
    }
  }
}

}  // namespace vlcore::VLCORE_LEVEL
#endif

#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/window_attention.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void window_attention_forward(const void* qkv, const void* qkv_bias, const void* rel_pos_h, const void* rel_pos_w,
                              void* out, float* lse, int64_t batch, int64_t height, int64_t width, int64_t heads,
                              int64_t head_dim, int64_t window, Target target) {
  VLCORE_RUN(target, window_attention_forward, qkv, qkv_bias, rel_pos_h, rel_pos_w, out, lse, batch, height, width,
             heads, head_dim, window);
}

}  // namespace vlcore

#else
#include "cpu/grid_attention.h"

namespace vlcore::VLCORE_LEVEL {

template <typename T>
static void window_attention_forward(const void* qkv, const void* qkv_bias, const void* rel_pos_h,
                                     const void* rel_pos_w, void* out, float* lse, int64_t batch, int64_t height,
                                     int64_t width, int64_t heads, int64_t head_dim, int64_t window) {
  using O = Operand<T>;
  const Grid grid{window, window, head_dim};
  const int64_t channels = heads * head_dim, num_offsets = 2 * window - 1;
  const int64_t down = (height + window - 1) / window, across = (width + window - 1) / window;
  const Scratch<O> table_h(packed_size<O>(head_dim, num_offsets)), table_w(packed_size<O>(head_dim, num_offsets));
  pack_transposed(static_cast<const T*>(rel_pos_h), head_dim, head_dim, num_offsets, table_h.get());
  pack_transposed(static_cast<const T*>(rel_pos_w), head_dim, head_dim, num_offsets, table_w.get());
#pragma omp parallel
  {
    const GridScratch<T> scratch(grid);
    const Scratch<T> k(grid.tokens() * head_dim), v(grid.tokens() * head_dim);
    const Scratch<O> keys(grid.num_tiles() * packed_keys_size<O>(grid));
    const Scratch<O> values(grid.num_tiles() * packed_values_size<O>(grid));
    const PackedGrid<O> packed{keys.get(), values.get(), table_h.get(), table_w.get()};
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < batch * down * across * heads; ++index) {
      const int64_t head = index % heads, place = index / heads;
      const int64_t left = place % across * window, top = place / across % down * window;
      const int64_t image = place / across / down;
      const auto map_row = [&](int64_t y, int64_t x) { return (image * height + top + y) * width + left + x; };
      const auto is_real = [&](int64_t y, int64_t x) { return top + y < height && left + x < width; };
      for (int64_t key = 0; key < grid.tokens(); ++key) {
        const int64_t y = key / window, x = key % window;
        const T* from =
            is_real(y, x) ? static_cast<const T*>(qkv) + map_row(y, x) * 3 * channels : static_cast<const T*>(qkv_bias);
        for (int64_t d = 0; d < head_dim; ++d) {
          // A padded position holds the bias, and zeros where there is none.
          k.get()[key * head_dim + d] = from ? from[channels + head * head_dim + d] : T(0.f);
          v.get()[key * head_dim + d] = from ? from[2 * channels + head * head_dim + d] : T(0.f);
        }
      }
      for (int64_t tile = 0; tile < grid.num_tiles(); ++tile) {
        pack_tile(k.get(), v.get(), grid, tile, keys.get(), values.get());
      }
      Queries<T> queries;
      for (int64_t token = 0; token < grid.tokens(); ++token) {
        const int64_t y = token / window, x = token % window;
        if (is_real(y, x)) {
          const int64_t row = map_row(y, x), at = head * head_dim;
          queries.add(static_cast<const T*>(qkv) + row * 3 * channels + at, static_cast<T*>(out) + row * channels + at,
                      lse + ((image * heads + head) * height + top + y) * width + left + x, y, x);
        }
        if (queries.count == kBlockRows || (token + 1 == grid.tokens() && queries.count)) {
          attend(queries, packed, grid, scratch);
          queries.count = 0;
        }
      }
    }
  }
}

}  // namespace vlcore::VLCORE_LEVEL
#endif

#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/window_attention.cpp"
#define VLCORE_MULTIPLIES_TILES
#include "cpu/for_each_level.h"

namespace vlcore {

void window_attention_forward(const void* qkv, const void* qkv_bias, const void* rel_pos_h, const void* rel_pos_w,
                              void* out, float* statistics, int64_t batch, int64_t height, int64_t width, int64_t heads,
                              int64_t head_dim, int64_t window, Target target) {
  VLCORE_RUN(target, window_attention_forward, qkv, qkv_bias, rel_pos_h, rel_pos_w, out, statistics, batch, height,
             width, heads, head_dim, window);
}

void window_attention_backward(const void* grad_out, const void* qkv, const void* qkv_bias, const void* rel_pos_h,
                               const void* rel_pos_w, const void* out, const float* statistics, void* grad_qkv,
                               void* grad_qkv_bias, void* grad_rel_pos_h, void* grad_rel_pos_w, int64_t batch,
                               int64_t height, int64_t width, int64_t heads, int64_t head_dim, int64_t window,
                               Target target) {
  VLCORE_RUN(target, window_attention_backward, grad_out, qkv, qkv_bias, rel_pos_h, rel_pos_w, out, statistics,
             grad_qkv, grad_qkv_bias, grad_rel_pos_h, grad_rel_pos_w, batch, height, width, heads, head_dim, window);
}

}  // namespace vlcore

#else
#include "cpu/grid_attention.h"
#include "cpu/grid_attention_backward.h"
#include "cpu/grid_attention_forward.h"

namespace vlcore::VLCORE_LEVEL {

// A map (batch, height, width, 3, heads, head_dim) in windows; the last of a row or column may reach beyond it.
struct Windows {
  int64_t batch, height, width, heads, head_dim, window;

  Grid grid() const { return {window, window, head_dim}; }
  int64_t down() const { return (height + window - 1) / window; }
  int64_t across() const { return (width + window - 1) / window; }
  int64_t channels() const { return heads * head_dim; }
  // Units of work: a head of a window.
  int64_t units() const { return batch * down() * across() * heads; }
  bool are_many() const { return units() * grid().tokens() * grid().tokens() * head_dim >= kParallelProducts; }
};

// One head of one window.
struct Window {
  Window(const Windows& all, int64_t unit)
      : all(all),
        head(unit % all.heads),
        left(unit / all.heads % all.across() * all.window),
        top(unit / all.heads / all.across() % all.down() * all.window),
        image(unit / all.heads / all.across() / all.down()) {}

  // A position's place on the map, -1 where it is padding.
  int64_t place(int64_t y, int64_t x) const {
    return top + y < all.height && left + x < all.width ? (image * all.height + top + y) * all.width + left + x : -1;
  }
  // q, k or v (0, 1, 2): that of the map, and what padding holds instead, or null.
  template <typename T>
  T* row(T* qkv, T* qkv_bias, int64_t which, int64_t place) const {
    const int64_t at = which * all.channels() + head * all.head_dim;
    return place >= 0 ? qkv + place * 3 * all.channels() + at : qkv_bias ? qkv_bias + at : nullptr;
  }
  template <typename T>
  std::vector<const T*> by_lane(const T* qkv, const T* qkv_bias, int64_t which) const {
    return rows_by_lane<T>(all.grid(), [&](int64_t y, int64_t x) { return row(qkv, qkv_bias, which, place(y, x)); });
  }
  int64_t statistics_at(int64_t y, int64_t x) const {
    return 2 * (((image * all.heads + head) * all.height + top + y) * all.width + left + x);
  }

  const Windows& all;
  const int64_t head, left, top, image;
};

// The queries of a window that are on the map. What is null stays unused.
template <typename T>
static void real_queries(const Window& window, const T* qkv, T* out, float* statistics, const T* grad_out, T* grad_qkv,
                         std::vector<Query<T> >& queries) {
  queries.clear();
  for (int64_t y = 0; y < window.all.window; ++y) {
    for (int64_t x = 0; x < window.all.window; ++x) {
      const int64_t place = window.place(y, x);
      if (place < 0) continue;
      const int64_t at = place * window.all.channels() + window.head * window.all.head_dim;
      queries.push_back({window.row<const T>(qkv, nullptr, 0, place), out + at, statistics + window.statistics_at(y, x),
                         y, x, grad_out ? grad_out + at : nullptr,
                         grad_qkv ? window.row<T>(grad_qkv, nullptr, 0, place) : nullptr});
    }
  }
}

template <typename T>
static void window_attention_forward(const void* qkv, const void* qkv_bias, const void* rel_pos_h,
                                     const void* rel_pos_w, void* out, float* statistics, int64_t batch, int64_t height,
                                     int64_t width, int64_t heads, int64_t head_dim, int64_t window_size) {
  using O = Operand<T>;
  const Windows windows{batch, height, width, heads, head_dim, window_size};
  const Grid grid = windows.grid();
  const PackedTable<O> table_h(static_cast<const T*>(rel_pos_h), window_size, head_dim);
  const PackedTable<O> table_w(static_cast<const T*>(rel_pos_w), window_size, head_dim);
  const T *from = static_cast<const T*>(qkv), *bias = static_cast<const T*>(qkv_bias);
#pragma omp parallel if (windows.are_many())
  {
    PackedLanes<O> keys(grid, true, false), values(grid, false, true);
    ForwardBlock<T> block(grid);
    std::vector<Query<T> > queries;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < windows.units(); ++unit) {
      const Window window(windows, unit);
      keys.pack(window.by_lane(from, bias, 1));
      values.pack(window.by_lane(from, bias, 2));
      real_queries<T>(window, from, static_cast<T*>(out), statistics, nullptr, nullptr, queries);
      for_blocks<T>(queries.size(), [&](int64_t first, int64_t count) {
        attend(queries.data() + first, count, keys, values, table_h, table_w, block);
      });
    }
  }
}

// Gradients of a window's keys and values: written to the map's, and added to the bias' (3, heads, head_dim).
template <typename T>
static void write_keys_and_values(const Window& window, const GridSums<Operand<T> >& sums, const Scratch<float>& rows,
                                  T* grad_qkv, float* grad_bias) {
  const Grid grid = window.all.grid();
  for (int which = 1; which <= 2; ++which) {
    const float scale = which == 1 ? grid.scale() : 1.f;
    for (int64_t y = 0; y < grid.height; ++y) {
      sums.image_row(grid, which == 1 ? sums.keys : sums.values, y, rows.get());
      for (int64_t x = 0; x < grid.width; ++x) {
        const int64_t place = window.place(y, x);
        const float* from = rows.get() + x * sums.stride;
        if (place >= 0) {
          T* to = window.row<T>(grad_qkv, nullptr, which, place);
          for (int64_t d = 0; d < grid.head_dim; ++d) to[d] = convert<T>(from[d] * scale);
        } else {
          float* to = window.row<float>(nullptr, grad_bias, which, place);
          for (int64_t d = 0; d < grid.head_dim; ++d) to[d] += from[d] * scale;
        }
      }
    }
  }
}

template <typename T>
static void window_attention_backward(const void* grad_out, const void* qkv, const void* qkv_bias,
                                      const void* rel_pos_h, const void* rel_pos_w, const void* out,
                                      const float* statistics, void* grad_qkv, void* grad_qkv_bias,
                                      void* grad_rel_pos_h, void* grad_rel_pos_w, int64_t batch, int64_t height,
                                      int64_t width, int64_t heads, int64_t head_dim, int64_t window_size) {
  using O = Operand<T>;
  const Windows windows{batch, height, width, heads, head_dim, window_size};
  const Grid grid = windows.grid();
  const PackedTable<O> table_h(static_cast<const T*>(rel_pos_h), window_size, head_dim);
  const PackedTable<O> table_w(static_cast<const T*>(rel_pos_w), window_size, head_dim);
  const T *from = static_cast<const T*>(qkv), *bias = static_cast<const T*>(qkv_bias);
  const int64_t chunks = std::min(windows.units(), kMaxChunks);
  const GridSums<O> sizes(grid);
  // Of each chunk: the sums of both tables, and of the bias.
  const int64_t bias_at = sizes.table_h_size + sizes.table_w_size, bias_size = 3 * windows.channels();
  std::vector<float> chunk_sums(chunks * (bias_at + bias_size));
#pragma omp parallel if (windows.are_many())
  {
    PackedLanes<O> keys(grid, true, true), values(grid, true, false);
    BackwardBlock<T> block(grid);
    std::vector<Query<T> > queries;
    const Scratch<float> lanes(2 * sizes.lanes_size), rows(grid.row_lanes() * sizes.stride);
    GridSums<O> sums = sizes;
    sums.keys = lanes.get();
    sums.values = sums.keys + sizes.lanes_size;
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sums.table_h = chunk_sums.data() + chunk * (bias_at + bias_size);
      sums.table_w = sums.table_h + sizes.table_h_size;
      for (int64_t unit = cut(windows.units(), chunks, chunk); unit < cut(windows.units(), chunks, chunk + 1); ++unit) {
        const Window window(windows, unit);
        keys.pack(window.by_lane(from, bias, 1));
        values.pack(window.by_lane(from, bias, 2));
        std::memset(sums.keys, 0, 2 * sizes.lanes_size * sizeof(float));
        real_queries<T>(window, from, static_cast<T*>(const_cast<void*>(out)), const_cast<float*>(statistics),
                        static_cast<const T*>(grad_out), static_cast<T*>(grad_qkv), queries);
        for_blocks<T>(queries.size(), [&](int64_t first, int64_t count) {
          attend_backward(queries.data() + first, count, keys, values, table_h, table_w, block, sums);
        });
        write_keys_and_values(window, sums, rows, static_cast<T*>(grad_qkv), sums.table_h + bias_at);
      }
    }
  }
  const int64_t num_offsets = 2 * window_size - 1, chunk_size = bias_at + bias_size;
  const auto at = [&](int64_t row, int64_t d) { return sizes.at(row, d); };
  sum_parts(chunk_sums.data(), chunks, chunk_size, num_offsets, head_dim, static_cast<T*>(grad_rel_pos_h), at);
  sum_parts(chunk_sums.data() + sizes.table_h_size, chunks, chunk_size, num_offsets, head_dim,
            static_cast<T*>(grad_rel_pos_w), at);
  sum_parts(chunk_sums.data() + bias_at, chunks, chunk_size, 1, bias_size, static_cast<T*>(grad_qkv_bias),
            [](int64_t, int64_t channel) { return channel; });
}

}  // namespace vlcore::VLCORE_LEVEL
#endif

// What the backward of grid_attention.h sums over queries. Read once per level.
namespace vlcore::VLCORE_LEVEL {

// Sums over queries: gradients of keys and values, by lanes, and of the tables, by offsets from the last row on. They
// stand transposed in panels of kWidth lanes or offsets, (panels, stride, kWidth).
template <typename O>
struct GridSums {
  static constexpr int64_t kWidth = Panel<O>::kWidth;

  explicit GridSums(const Grid& grid)
      : stride(round_up(grid.head_dim, kLanes)),
        lanes_size(stride * padded_cols<O>(grid.lanes())),
        table_h_size(stride * padded_cols<O>(2 * grid.height - 1)),
        table_w_size(stride * padded_cols<O>(2 * grid.width - 1)) {}

  int64_t at(int64_t lane, int64_t d) const { return (lane / kWidth * stride + d) * kWidth + lane % kWidth; }

  // rows (grid.row_lanes(), stride) of the image row y.
  void image_row(const Grid& grid, const float* sums, int64_t y, float* rows) const {
    for (int64_t x = 0; x < grid.row_lanes(); x += kLanes) {
      for (int64_t d = 0; d < stride; d += kLanes) {
        transpose_units(sums + at(y * grid.row_lanes() + x, d), kWidth, kLanes, rows + x * stride + d, stride);
      }
    }
  }

  const int64_t stride, lanes_size, table_h_size, table_w_size;
  float *keys = nullptr, *values = nullptr, *table_h = nullptr, *table_w = nullptr;
};

// to (rows, head_dim), last row first, is the sum of `count` parts, in each of which at(row, d) tells the place.
template <typename T, typename At>
static void sum_parts(const float* parts, int64_t count, int64_t part_stride, int64_t rows, int64_t head_dim, T* to,
                      const At& at) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t d = 0; d < head_dim; ++d) {
      double sum = 0;
      for (int64_t part = 0; part < count; ++part) sum += parts[part * part_stride + at(row, d)];
      to[(rows - 1 - row) * head_dim + d] = convert<T>(static_cast<float>(sum));
    }
  }
}

}  // namespace vlcore::VLCORE_LEVEL

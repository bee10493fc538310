// Rows of RMSNorm and sums over rows, for the operators that normalise. Read once per level.
namespace vlcore::VLCORE_LEVEL {

// Below this, waking a thread costs more than it brings.
constexpr int64_t kParallelElements = 1 << 15;

// What a row is multiplied by, from the sum of its squares.
static float reciprocal_norm(float squares, int64_t cols, float eps) {
  return 1.f / std::sqrt(squares / static_cast<float>(cols) + eps);
}

// A row is read twice, and the second time the memory would have nothing to do: so the next row is asked for then, and
// what is to be written while the first time lasts. Behind the last row nothing comes of it.
template <typename T>
VLCORE_INLINE void ask_for(const T* row) {
  __builtin_prefetch(row, 0, 2);
}

template <typename T>
VLCORE_INLINE void ask_to_write(T* row) {
  __builtin_prefetch(row, 1, 3);
}

template <typename T>
static void rms_norm_row(const T* x, const T* weight, T* y, int64_t cols, float eps) {
  const Vec squares = sum_vecs(cols, [&](int64_t col, auto lanes) VLCORE_INLINED {
    const Vec value = load(x + col, lanes);
    return value * value;
  });
  const float rstd = reciprocal_norm(reduce_add(squares), cols, eps);
  for_vecs(cols, [&](int64_t col, auto lanes) VLCORE_INLINED {
    ask_for(x + cols + col);
    store(y + col, load(x + col, lanes) * rstd * load(weight + col, lanes), lanes);
  });
}

// What is normalised is the sum as rounded: what the next layer adds to is what this one saw.
template <typename T>
static void add_row(const T* x, const T* residual, T* total, int64_t cols) {
  for_vecs(cols, [&](int64_t col, auto lanes)
                     VLCORE_INLINED { store(total + col, load(x + col, lanes) + load(residual + col, lanes), lanes); });
}

// With x_hat = x * rstd and g = grad_y * weight: grad_x = (g - x_hat * mean(g * x_hat)) * rstd, and what `extra` holds
// is added to it where it is not null. Adds grad_y * x_hat to grad_weight. x is read for the products anyway, so that
// its norm costs less to compute again than to keep.
template <typename T>
static void rms_norm_backward_row(const T* grad_y, const T* extra, const T* x, const T* weight, T* grad_x,
                                  float* grad_weight, int64_t cols, float eps) {
  const TwoVecs sums = sum_vecs(cols, [&](int64_t col, auto lanes) VLCORE_INLINED {
    const Vec value = load(x + col, lanes);
    ask_to_write(grad_x + col);
    return TwoVecs{value * value, load(grad_y + col, lanes) * load(weight + col, lanes) * value};
  });
  const float rstd = reciprocal_norm(reduce_add(sums.first), cols, eps);
  const float mean = reduce_add(sums.second) * rstd / static_cast<float>(cols);
  for_vecs(cols, [&](int64_t col, auto lanes) VLCORE_INLINED {
    const Vec x_hat = load(x + col, lanes) * rstd, grad = load(grad_y + col, lanes);
    ask_for(x + cols + col);
    ask_for(grad_y + cols + col);
    const Vec rest = extra ? load(extra + col, lanes) : Vec{};
    store(grad_x + col, (grad * load(weight + col, lanes) - x_hat * mean) * rstd + rest, lanes);
    store(grad_weight + col, load(grad_weight + col, lanes) + grad * x_hat, lanes);
  });
}

// total (size) = the sum of what row(index, sums) adds to its (size) sums for each row: by blocks of rows, in an order
// that depends on the shape alone and not on the number of threads.
template <typename T, typename Row>
static void sum_over_rows(int64_t rows, int64_t size, int64_t elements, T* total, Row row) {
  constexpr int64_t kMaxBlocks = 64;
  const int64_t block = std::max<int64_t>((rows + kMaxBlocks - 1) / kMaxBlocks, 8);
  const int64_t num_blocks = (rows + block - 1) / block;
  std::vector<float> partial(num_blocks * size);
#pragma omp parallel for if (elements >= kParallelElements)
  for (int64_t index = 0; index < num_blocks; ++index) {
    for (int64_t at = index * block; at < std::min(rows, (index + 1) * block); ++at) {
      row(at, partial.data() + index * size);
    }
  }
  std::vector<double> sums(size);
  for (int64_t index = 0; index < num_blocks; ++index) {
    for (int64_t col = 0; col < size; ++col) sums[col] += partial[index * size + col];
  }
  for (int64_t col = 0; col < size; ++col) total[col] = convert<T>(static_cast<float>(sums[col]));
}

}  // namespace vlcore::VLCORE_LEVEL

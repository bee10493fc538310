#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/downsample_features.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void merge_and_resize_forward(const void* detail, const void* skip, const float* alpha, void* resized, int64_t batch,
                              int64_t height, int64_t width, int64_t channels, int64_t size, Target target) {
  VLCORE_RUN(target, merge_and_resize_forward, detail, skip, alpha, resized, batch, height, width, channels, size);
}

void merge_and_resize_backward(const void* grad_resized, const void* skip, const float* alpha, void* grad_detail,
                               void* grad_skip, float* grad_alpha, int64_t batch, int64_t height, int64_t width,
                               int64_t channels, int64_t size, Target target) {
  VLCORE_RUN(target, merge_and_resize_backward, grad_resized, skip, alpha, grad_detail, grad_skip, grad_alpha, batch,
             height, width, channels, size);
}

}  // namespace vlcore

#else
#include "cpu/norm_rows.h"

namespace vlcore::VLCORE_LEVEL {

// Which two sources each target of one axis lies between, and how it weighs them, as align_corners=False has it.
struct Axis {
  struct Tap {
    int64_t lower, upper;
    float lower_weight, upper_weight;

    // Of a source that is one of the two, or both at the end of the axis.
    float weight_of(int64_t source) const {
      return (source == lower ? lower_weight : 0.f) + (source == upper ? upper_weight : 0.f);
    }
  };
  std::vector<Tap> taps;
  // The targets that read source i are those from first[i] up to last[i].
  std::vector<int64_t> first, last;

  Axis(int64_t sources, int64_t targets) : taps(targets), first(sources, targets), last(sources) {
    const double scale = static_cast<double>(sources) / static_cast<double>(targets);
    for (int64_t target = 0; target < targets; ++target) {
      const double position = std::max((static_cast<double>(target) + 0.5) * scale - 0.5, 0.0);
      const int64_t lower = std::min(static_cast<int64_t>(position), sources - 1);
      const int64_t upper = std::min(lower + 1, sources - 1);
      const double fraction = position - static_cast<double>(lower);
      taps[target] = {lower, upper, static_cast<float>(1.0 - fraction), static_cast<float>(fraction)};
      for (const int64_t source : {lower, upper}) {
        first[source] = std::min(first[source], target);
        last[source] = target + 1;
      }
    }
  }
};

// What pixels take of a map (height, width, channels) of each branch; skip may be null.
template <typename T>
struct Branches {
  const T *detail, *skip;
  float alpha;

  template <typename Lanes>
  Vec merged(int64_t at, Lanes lanes) const {
    const Vec value = load(detail + at, lanes);
    return skip ? value + load(skip + at, lanes) * alpha : value;
  }
};

template <typename T>
static void resize_row(Branches<T> map, const Axis::Tap& y, const Axis& columns, T* resized, int64_t width,
                       int64_t channels) {
  const int64_t above = y.lower * width, below = y.upper * width;
  for (const Axis::Tap& x : columns.taps) {
    const int64_t above_left = (above + x.lower) * channels, above_right = (above + x.upper) * channels;
    const int64_t below_left = (below + x.lower) * channels, below_right = (below + x.upper) * channels;
    for_vecs(channels, [&](int64_t c, auto lanes) VLCORE_INLINED {
      const Vec upper =
          map.merged(above_left + c, lanes) * x.lower_weight + map.merged(above_right + c, lanes) * x.upper_weight;
      const Vec lower =
          map.merged(below_left + c, lanes) * x.lower_weight + map.merged(below_right + c, lanes) * x.upper_weight;
      store(resized + c, upper * y.lower_weight + lower * y.upper_weight, lanes);
    });
    resized += channels;
  }
}

template <typename T>
static void merge_and_resize_forward(const void* detail, const void* skip, const float* alpha, void* resized,
                                     int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t size) {
  const Axis rows(height, size), columns(width, size);
#pragma omp parallel for if (batch * size * size * channels >= kParallelElements)
  for (int64_t row = 0; row < batch * size; ++row) {
    const int64_t map = row / size * height * width * channels;
    const Branches<T> branches{static_cast<const T*>(detail) + map, skip ? static_cast<const T*>(skip) + map : nullptr,
                               skip ? *alpha : 0.f};
    resize_row(branches, rows.taps[row % size], columns, static_cast<T*>(resized) + row * size * channels, width,
               channels);
  }
}

// The gradient of the vector at `grad_resized` of source (y, x): gathered from the few targets that read it.
template <typename T, typename Lanes>
VLCORE_INLINE Vec gather(const T* grad_resized, const Axis& rows, const Axis& columns, int64_t y, int64_t x,
                         int64_t size, int64_t channels, Lanes lanes) {
  Vec grad = {};
  for (int64_t row = rows.first[y]; row < rows.last[y]; ++row) {
    Vec along_row = {};
    for (int64_t column = columns.first[x]; column < columns.last[x]; ++column) {
      const Vec given = load(grad_resized + (row * size + column) * channels, lanes);
      along_row += given * columns.taps[column].weight_of(x);
    }
    grad += along_row * rows.taps[row].weight_of(y);
  }
  return grad;
}

template <typename T>
static void merge_and_resize_backward(const void* grad_resized, const void* skip, const float* alpha, void* grad_detail,
                                      void* grad_skip, float* grad_alpha, int64_t batch, int64_t height, int64_t width,
                                      int64_t channels, int64_t size) {
  const Axis rows(height, size), columns(width, size);
  const auto* branch = static_cast<const T*>(skip);
  auto *to_detail = static_cast<T*>(grad_detail), *to_skip = static_cast<T*>(grad_skip);
  const float scale = alpha ? *alpha : 0.f;
  std::vector<double> products(batch * height);
#pragma omp parallel for if (batch * size * size * channels >= kParallelElements)
  for (int64_t row = 0; row < batch * height; ++row) {
    const T* grads = static_cast<const T*>(grad_resized) + row / height * size * size * channels;
    for (int64_t x = 0; x < width; ++x) {
      const int64_t pixel = (row * width + x) * channels;
      Vec product = {};
      for_vecs(channels, [&](int64_t c, auto lanes) VLCORE_INLINED {
        const Vec grad = gather(grads + c, rows, columns, row % height, x, size, channels, lanes);
        store(to_detail + pixel + c, grad, lanes);
        if (!branch) return;
        store(to_skip + pixel + c, grad * scale, lanes);
        product += grad * load(branch + pixel + c, lanes);
      });
      products[row] += reduce_add(product);
    }
  }
  // By rows and in their order, whatever the number of threads.
  double total = 0.0;
  for (const double product : products) total += product;
  if (grad_alpha) *grad_alpha = static_cast<float>(total);
}

}  // namespace vlcore::VLCORE_LEVEL
#endif

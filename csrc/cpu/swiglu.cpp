#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/swiglu.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void swiglu_forward(const void* gate, const void* up, void* y, int64_t size, Target target) {
  VLCORE_RUN(target, swiglu_forward, gate, up, y, size);
}

void swiglu_backward(const void* grad_y, const void* gate, const void* up, void* grad_gate, void* grad_up, int64_t size,
                     Target target) {
  VLCORE_RUN(target, swiglu_backward, grad_y, gate, up, grad_gate, grad_up, size);
}

}  // namespace vlcore

#else
#include "cpu/swiglu_row.h"

namespace vlcore::VLCORE_LEVEL {

constexpr int64_t kBlock = 1 << 13;
// A float32 output that is larger than a cache of the second level is written past the caches. In bfloat16 there is as
// much to compute as to write, and that would only be slower.
constexpr int64_t kStreamedBytes = 1 << 22;

template <typename T>
static void swiglu_forward(const void* gate, const void* up, void* y, int64_t size) {
  const bool large = size * sizeof(T) >= kStreamedBytes && reinterpret_cast<uintptr_t>(y) % 64 == 0;
#pragma omp parallel for if (size >= 4 * kBlock)
  for (int64_t first = 0; first < size; first += kBlock) {
    const T *g = static_cast<const T*>(gate) + first, *u = static_cast<const T*>(up) + first;
    T* to = static_cast<T*>(y) + first;
    if constexpr (std::is_same_v<T, float>) {
      if (large && size - first >= kBlock) {
        for (int64_t at = 0; at < kBlock; at += kLanes) stream(to + at, swiglu_vec(g + at, u + at, AllLanes{}));
        fence_streams();
        continue;
      }
    }
    swiglu_row(g, u, to, std::min(kBlock, size - first));
  }
}

// With s = sigmoid(gate): silu' = s (1 + gate (1 - s)).
template <typename T>
static void swiglu_backward(const void* grad_y, const void* gate, const void* up, void* grad_gate, void* grad_up,
                            int64_t size) {
#pragma omp parallel for if (size >= 4 * kBlock)
  for (int64_t first = 0; first < size; first += kBlock) {
    const T *g = static_cast<const T*>(gate) + first, *u = static_cast<const T*>(up) + first;
    const T* grad = static_cast<const T*>(grad_y) + first;
    T *to_gate = static_cast<T*>(grad_gate) + first, *to_up = static_cast<T*>(grad_up) + first;
    for_vecs(std::min(kBlock, size - first), [&](int64_t at, auto lanes) VLCORE_INLINED {
      const Vec value = load(g + at, lanes), s = sigmoid<T>(value), from_y = load(grad + at, lanes);
      store(to_up + at, from_y * (value * s), lanes);
      store(to_gate + at, from_y * load(u + at, lanes) * s * (1.f + value * (1.f - s)), lanes);
    });
  }
}

}  // namespace vlcore::VLCORE_LEVEL
#endif

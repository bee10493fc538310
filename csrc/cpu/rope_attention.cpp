#ifndef VLCORE_LEVEL
#define VLCORE_FILE "cpu/rope_attention.cpp"
#include "cpu/for_each_level.h"

namespace vlcore {

void apply_rope(Heads x, const int64_t* positions, void* y, int64_t batch, int64_t tokens, int64_t heads,
                int64_t head_dim, double theta, bool backwards, Target target) {
  VLCORE_RUN(target, apply_rope, x, positions, y, batch, tokens, heads, head_dim, theta, backwards);
}

}  // namespace vlcore

#else
#include "cpu/rotary.h"

namespace vlcore::VLCORE_LEVEL {

template <typename T>
static void apply_rope(Heads x, const int64_t* positions, void* y, int64_t batch, int64_t tokens, int64_t heads,
                       int64_t head_dim, double theta, bool backwards) {
  const int64_t half = head_dim / 2;
  const std::vector<float> frequencies = rotary_frequencies(theta, head_dim);
#pragma omp parallel if (batch * tokens * heads * head_dim >= 1 << 15)
  {
    std::vector<float> cosines(half), sines(half);
#pragma omp for
    for (int64_t index = 0; index < batch * tokens; ++index) {
      rotary_angles(positions[index], frequencies, cosines.data(), sines.data());
      const T* from = static_cast<const T*>(x.data) + index / tokens * x.batch_stride + index % tokens * x.token_stride;
      T* to = static_cast<T*>(y) + index * heads * head_dim;
      for (int64_t head = 0; head < heads; ++head) {
        rotate(from + head * x.head_stride, cosines.data(), sines.data(), half, backwards ? -1.f : 1.f, 1.f,
               to + head * head_dim);
      }
    }
  }
}

}  // namespace vlcore::VLCORE_LEVEL
#endif

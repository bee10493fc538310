// Rotary positions, for the operators that turn heads by them. Read once per level.
#include "rotary_frequencies.h"

namespace vlcore::VLCORE_LEVEL {

// Cosines and sines of a position's angles. An angle is brought to within an eighth of a turn in float64, and its
// cosine and sine are polynomials in float32, to 1e-7.
static void rotary_angles(int64_t position, const std::vector<float>& frequencies, float* cosines, float* sines) {
  constexpr double kHalfPi = 1.57079632679489661923, kRound = 6755399441055744.;
  const float at = static_cast<float>(position);
  const int64_t half = frequencies.size();
  for (int64_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(at * frequencies[i]);
    // Adding 1.5 * 2^52 rounds to an integer, which then stands in the low bits.
    const double shifted = angle * (1. / kHalfPi) + kRound;
    const float r = static_cast<float>(angle - (shifted - kRound) * kHalfPi), square = r * r;
    int64_t quarter;
    std::memcpy(&quarter, &shifted, sizeof quarter);
    const float s = r + r * square * (-1.666665487e-1f + square * (8.332173543e-3f + square * -1.951665582e-4f));
    const float c = 1.f - square * 0.5f +
                    square * square * (4.166664675e-2f + square * (-1.388736145e-3f + square * 2.443773008e-5f));
    const float sine = quarter & 1 ? c : s, cosine = quarter & 1 ? s : c;
    sines[i] = quarter & 2 ? -sine : sine;
    cosines[i] = (quarter + 1) & 2 ? -cosine : cosine;
  }
}

// to (2 * half) = factor * x, its pairs (x[i], x[i + half]) turned; direction 1, or -1 to turn back.
template <typename T, typename O>
VLCORE_INLINE void rotate(const T* x, const float* cosines, const float* sines, int64_t half, float direction,
                          float factor, O* to) {
  for_vecs(half, [&](int64_t at, auto lanes) VLCORE_INLINED {
    const Vec first = load(x + at, lanes) * factor, second = load(x + half + at, lanes) * factor;
    const Vec cosine = load(cosines + at, lanes), sine = load(sines + at, lanes) * direction;
    store(to + at, first * cosine - second * sine, lanes);
    store(to + half + at, second * cosine + first * sine, lanes);
  });
}

}  // namespace vlcore::VLCORE_LEVEL

#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace vlcore {

// theta^(-2i / head_dim), by which a position is multiplied to the angle of pair i: rounded where the reference rounds,
// as far from the start of a text the roundings of float32 are what models have learnt their angles with.
inline std::vector<float> rotary_frequencies(double theta, int64_t head_dim) {
  std::vector<float> frequencies(head_dim / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    frequencies[i] = 1.f / static_cast<float>(std::pow(theta, static_cast<double>(exponent)));
  }
  return frequencies;
}

}  // namespace vlcore

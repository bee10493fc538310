// Weights of integers as float32. Read once per level.
namespace vlcore::VLCORE_LEVEL {

using SignedBytes = int8_t __attribute__((vector_size(kLanes)));
using UnsignedBytes = uint8_t __attribute__((vector_size(kLanes)));

// The bytes of a weight, as many as lanes; beyond `count` they are 0, and meet the zeros behind x.
template <typename Bytes>
VLCORE_INLINE IntVec load_bytes(const uint8_t* from, int64_t count) {
  Bytes bytes = {};
  if (count >= kLanes) {
    std::memcpy(&bytes, from, kLanes);
  } else {
    std::memcpy(&bytes, from, count);
  }
  // In two steps, each of them one instruction: GCC takes four times the width apart, lane by lane.
  using Shorts = int16_t __attribute__((vector_size(kLanes * 2)));
  return __builtin_convertvector(__builtin_convertvector(bytes, Shorts), IntVec);
}

VLCORE_INLINE Vec to_float(IntVec v) { return __builtin_convertvector(v, Vec); }

// Of 4 bits, a byte holds an even column in its low half and the odd one after it in its high half, both plus 8.
VLCORE_INLINE Vec even_columns(IntVec bytes) { return to_float((bytes & 15) - 8); }
VLCORE_INLINE Vec odd_columns(IntVec bytes) { return to_float((bytes >> 4) - 8); }

// weight (inputs) = a row of values times its scales (groups).
template <typename T>
static void dequantize_row(const uint8_t* values, const float* scales, T* weight, int64_t inputs, int64_t groups,
                           int bits) {
  const int64_t columns = bits == 8 ? 1 : 2, bytes = (inputs + columns - 1) / columns;
  const int64_t group_bytes = (bytes + groups - 1) / groups;
  for (int64_t group = 0; group < groups; ++group) {
    const float scale = scales[group];
    const int64_t end = (group + 1) * group_bytes;
    for (int64_t at = group * group_bytes; at < end; at += kLanes) {
      T low[kLanes], high[kLanes], pairs[2 * kLanes];
      const int64_t count = std::min<int64_t>(end - at, kLanes),
                    kept = std::min(count * columns, inputs - at * columns);
      if (bits == 8) {
        store(pairs, to_float(load_bytes<SignedBytes>(values + at, count)) * scale);
      } else {
        const IntVec both = load_bytes<UnsignedBytes>(values + at, count);
        store(low, even_columns(both) * scale);
        store(high, odd_columns(both) * scale);
        for (int lane = 0; lane < kLanes; ++lane) pairs[2 * lane] = low[lane], pairs[2 * lane + 1] = high[lane];
      }
      std::memcpy(static_cast<void*>(weight + at * columns), pairs, kept * sizeof(T));
    }
  }
}

}  // namespace vlcore::VLCORE_LEVEL

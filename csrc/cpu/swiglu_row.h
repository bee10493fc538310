// The gate of SwiGLU, for the operators that apply it. Read once per level.
namespace vlcore::VLCORE_LEVEL {

// Clamped so that 2^x stays finite: what is left of the sigmoid there is 0 in float32 anyway.
VLCORE_INLINE Vec sigmoid(Vec x) {
  const Vec power = x * -kLog2E;
  return 1.f / (1.f + exp2(power > 126.f ? broadcast(126.f) : power));
}

template <typename T>
static void swiglu_row(const T* gate, const T* up, T* y, int64_t size) {
  for_vecs(size, [&](int64_t at, auto lanes) VLCORE_INLINED {
    const Vec value = load(gate + at, lanes);
    store(y + at, value * sigmoid(value) * load(up + at, lanes), lanes);
  });
}

}  // namespace vlcore::VLCORE_LEVEL

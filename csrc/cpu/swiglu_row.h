// The gate of SwiGLU, for the operators that apply it. Read once per level.
namespace vlcore::VLCORE_LEVEL {

// 1 / x to an ulp, or for what is rounded to T = bfloat16 afterwards to 2^-14 of it.
template <typename T>
VLCORE_INLINE Vec reciprocal(Vec x) {
#if VLCORE_LANES == 16
  if constexpr (std::is_same_v<T, bfloat16>) return (Vec)_mm512_rcp14_ps((__m512)x);
#endif
  return 1.f / x;
}

// 0 where 2^power would not be finite: what is left there may be multiplied by numbers as large.
template <typename T>
VLCORE_INLINE Vec sigmoid(Vec x) {
  const Vec power = x * -kLog2E;
  const Vec found = reciprocal<T>(1.f + exp2(power > 127.f ? broadcast(127.f) : power));
  return power > 127.f ? Vec{} : found;
}

// silu(gate) * up, of a vector or the first `lanes` of one.
template <typename T, typename Lanes>
VLCORE_INLINE Vec swiglu_vec(const T* gate, const T* up, Lanes lanes) {
  const Vec value = load(gate, lanes);
  return value * sigmoid<T>(value) * load(up, lanes);
}

template <typename T>
static void swiglu_row(const T* gate, const T* up, T* y, int64_t size) {
  for_vecs(size,
           [&](int64_t at, auto lanes) VLCORE_INLINED { store(y + at, swiglu_vec(gate + at, up + at, lanes), lanes); });
}

}  // namespace vlcore::VLCORE_LEVEL

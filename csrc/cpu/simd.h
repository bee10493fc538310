// Vectors of float32 at one level; read once per level by for_each_level.h, which defines VLCORE_LANES. Arithmetic is
// written with operators: a * b + c becomes one FMA where the level has it.
namespace vlcore::VLCORE_LEVEL {

constexpr int kLanes = VLCORE_LANES;
using Vec = float __attribute__((vector_size(kLanes * 4)));
using IntVec = int32_t __attribute__((vector_size(kLanes * 4)));
using HalfVec = uint16_t __attribute__((vector_size(kLanes * 2)));
#define VLCORE_INLINE static inline __attribute__((always_inline))

VLCORE_INLINE Vec broadcast(float value) { return value - Vec{}; }

VLCORE_INLINE IntVec bits_of(Vec v) {
  IntVec bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

VLCORE_INLINE Vec from_bits(IntVec bits) {
  Vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

VLCORE_INLINE Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

VLCORE_INLINE Vec load(const bfloat16* from) {
#if VLCORE_LANES == 16
  // The compiler would widen in two halves.
  const __m256i given = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(given), 16));
#else
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  return from_bits(__builtin_convertvector(half, IntVec) << 16);
#endif
}

VLCORE_INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

VLCORE_INLINE void store(bfloat16* to, Vec v) {
#if defined(VLCORE_BF16_DOT)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const IntVec wide = bits_of(v);
  // To the nearest, ties to even; a NaN stays one.
  const IntVec rounded = ((wide + 0x7fff + ((wide >> 16) & 1)) >> 16) & 0xffff;
  const HalfVec half = __builtin_convertvector(v == v ? rounded : IntVec{} + 0x7fc0, HalfVec);
  std::memcpy(to, &half, sizeof half);
#endif
}

// As store, past the caches: a large output is not read in first, only to be overwritten. `to` is on a boundary of 64
// bytes; fence_streams() comes last.
VLCORE_INLINE void stream(float* to, Vec v) {
#if VLCORE_LANES == 16
  _mm512_stream_ps(to, (__m512)v);
#else
  store(to, v);
#endif
}

VLCORE_INLINE void fence_streams() {
#if VLCORE_LANES == 16
  _mm_sfence();
#endif
}

// The first `count` < kLanes elements; the others are 0.
template <typename T>
VLCORE_INLINE Vec load_first(const T* from, int64_t count) {
  T lanes[kLanes] = {};
  std::memcpy(static_cast<void*>(lanes), from, count * sizeof(T));
  return load(lanes);
}

template <typename T>
VLCORE_INLINE void store_first(T* to, Vec v, int64_t count) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(static_cast<void*>(to), lanes, count * sizeof(T));
}

// for_vecs goes over `size` elements by vectors: step(at, lanes), where load and store take `lanes`, whole vectors but
// for a last one of fewer. A lambda that is to run at this speed is marked VLCORE_INLINED.
struct AllLanes {};
#define VLCORE_INLINED __attribute__((always_inline))

template <typename T>
VLCORE_INLINE Vec load(const T* from, AllLanes) {
  return load(from);
}

template <typename T>
VLCORE_INLINE Vec load(const T* from, int64_t count) {
  return load_first(from, count);
}

template <typename T>
VLCORE_INLINE void store(T* to, Vec v, AllLanes) {
  store(to, v);
}

template <typename T>
VLCORE_INLINE void store(T* to, Vec v, int64_t count) {
  store_first(to, v, count);
}

template <typename Step>
VLCORE_INLINE void for_vecs(int64_t size, const Step& step) {
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t at = 0; at < whole; at += kLanes) step(at, AllLanes{});
  if (whole < size) step(whole, size - whole);
}

// Two sums at once.
struct TwoVecs {
  Vec first, second;
};

VLCORE_INLINE TwoVecs operator+(TwoVecs a, TwoVecs b) { return {a.first + b.first, a.second + b.second}; }

// The sum of term(at, lanes) over `size` elements, in several chains: one would wait for each addition to end.
template <typename Term>
VLCORE_INLINE auto sum_vecs(int64_t size, const Term& term) {
  constexpr int kChains = 4;
  decltype(term(0, AllLanes{})) sums[kChains] = {};
  const int64_t unrolled = size / (kChains * kLanes) * (kChains * kLanes);
  for (int64_t at = 0; at < unrolled; at += kChains * kLanes) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      sums[chain] = sums[chain] + term(at + chain * kLanes, AllLanes{});
    }
  }
  for_vecs(size - unrolled,
           [&](int64_t at, auto lanes) VLCORE_INLINED { sums[0] = sums[0] + term(unrolled + at, lanes); });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

VLCORE_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

VLCORE_INLINE float reduce_add(Vec v) {
#if VLCORE_LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0.f;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
#endif
}

VLCORE_INLINE float reduce_max(Vec v) {
#if VLCORE_LANES == 16
  return _mm512_reduce_max_ps((__m512)v);
#else
  float largest = v[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
#endif
}

// 2^x to 2e-7 of it, for x <= 127; below -126 the result is 2^-126 or less. A NaN stays one.
VLCORE_INLINE Vec exp2(Vec x) {
#if VLCORE_LANES == 16
  const Vec fraction = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec clamped = x < -126.f ? broadcast(-126.f) : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Vec shifted = clamped + 12582912.f;
  const Vec fraction = clamped - (shifted - 12582912.f);
#endif
  Vec p = broadcast(1.535336188319500e-4f);
  p = p * fraction + 1.339887440266574e-3f;
  p = p * fraction + 9.618437357674640e-3f;
  p = p * fraction + 5.550332471162809e-2f;
  p = p * fraction + 2.402264791363012e-1f;
  p = p * fraction + 6.931472028550421e-1f;
  p = p * fraction + 1.f;
#if VLCORE_LANES == 16
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)(x - fraction));
#else
  const Vec power = from_bits(bits_of(p) + (bits_of(shifted) << 23));
  return x < -150.f ? Vec{} : power;
#endif
}

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// e^x to 1e-7 of it, for x <= 88: unlike exp2(x * kLog2E), which errs with the size of x. Below -87.3 as exp2. A NaN
// stays one.
VLCORE_INLINE Vec exp(Vec x) {
  const Vec clamped = x < -87.3f ? broadcast(-87.3f) : x;
  const Vec shifted = clamped * kLog2E + 12582912.f, power = shifted - 12582912.f;
  // ln(2) in two parts, the first with so few digits that its products are exact.
  const Vec r = clamped - power * 0.693145752f - power * 1.42860677e-6f;
  Vec p = broadcast(1.381314454e-3f);
  p = p * r + 8.369418832e-3f;
  p = p * r + 4.166845679e-2f;
  p = p * r + 1.666651479e-1f;
  p = p * r + 4.999999305e-1f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return x < -104.f ? Vec{} : from_bits(bits_of(p) + (bits_of(shifted) << 23));
}

}  // namespace vlcore::VLCORE_LEVEL

// GELU with the exact erf, x Phi(x), at one level; included by a kernel's file within its level.
namespace vlcore::VLCORE_LEVEL {

// Phi(-z) = exp(-z^2 / 2) t P(t) with t = 1 / (1 + 0.3 z), to 1.3e-7 of it; P is fitted for z <= 13.5.
VLCORE_INLINE Vec gelu(Vec x) {
  // Beyond, Phi is 0 or 1 in float32; bounded, x Phi(x) is finite where x is.
  const Vec above = x < -40.f ? broadcast(-40.f) : x, bounded = above > 40.f ? broadcast(40.f) : above;
  const Vec t = 1.f / (1.f + 0.3f * (bounded < 0.f ? -bounded : bounded));
  Vec p = broadcast(0.03593175485730171f);
  p = p * t - 0.15827608108520508f;
  p = p * t + 0.20820671319961548f;
  p = p * t - 0.05539394170045853f;
  p = p * t + 0.12946924567222595f;
  p = p * t + 0.0996374785900116f;
  p = p * t + 0.12079835683107376f;
  p = p * t + 0.11962638795375824f;
  const Vec tail = exp2(bounded * bounded * (-0.5f * kLog2E)) * t * p;
  return above * (x < 0.f ? tail : 1.f - tail);
}

}  // namespace vlcore::VLCORE_LEVEL

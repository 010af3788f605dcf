// A tile of 12 queries by 32 items in 24 registers. Included after a target pragma with AVX-512; local to the file.
#pragma once

#include <immintrin.h>

#include "kernel.h"

namespace {

struct Floats {
  __m512 a, b;
  KARMA_INLINE uint32_t above(karma::Bound limit) const {
    const __m512 x = _mm512_set1_ps(limit.real);
    return both(_mm512_cmp_ps_mask(a, x, _CMP_GT_OQ), _mm512_cmp_ps_mask(b, x, _CMP_GT_OQ));
  }
  KARMA_INLINE uint32_t at_least(karma::Bound limit) const {
    const __m512 x = _mm512_set1_ps(limit.real);
    return both(_mm512_cmp_ps_mask(a, x, _CMP_GE_OQ), _mm512_cmp_ps_mask(b, x, _CMP_GE_OQ));
  }
  KARMA_INLINE void store(karma::Bound* out) const {
    _mm512_storeu_ps(&out[0].real, a);
    _mm512_storeu_ps(&out[16].real, b);
  }
  static KARMA_INLINE uint32_t both(__mmask16 low, __mmask16 high) { return _mm512_kunpackw(high, low); }
};

struct Wholes {
  __m512i a, b;
  KARMA_INLINE uint32_t above(karma::Bound limit) const {
    const __m512i x = _mm512_set1_epi32(limit.whole);
    return Floats::both(_mm512_cmpgt_epi32_mask(a, x), _mm512_cmpgt_epi32_mask(b, x));
  }
  KARMA_INLINE uint32_t at_least(karma::Bound limit) const {
    const __m512i x = _mm512_set1_epi32(limit.whole);
    return Floats::both(_mm512_cmpge_epi32_mask(a, x), _mm512_cmpge_epi32_mask(b, x));
  }
  KARMA_INLINE void store(karma::Bound* out) const {
    _mm512_storeu_si512(out, a);
    _mm512_storeu_si512(out + 16, b);
  }
};

constexpr int kGroup = 12;

// Step::next(acc, query unit in every lane, 16 units of items) -> acc; row(i, 0, V of query i).
template <class V, class Step, class Vector, class Row>
KARMA_INLINE void tile_of(const uint32_t* q, const uint32_t* x, int64_t steps, Vector start_a, Vector start_b,
                          Row row) {
  Vector a[kGroup], b[kGroup];
#pragma GCC unroll 12
  for (int i = 0; i < kGroup; ++i) a[i] = start_a, b[i] = start_b;
  for (int64_t s = 0; s < steps; ++s, q += kGroup, x += karma::kPanel) {
    const __m512i xa = _mm512_loadu_si512(x), xb = _mm512_loadu_si512(x + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kGroup; ++i) {
      const __m512i one = _mm512_set1_epi32(int(q[i]));
      a[i] = Step::next(a[i], one, xa);
      b[i] = Step::next(b[i], one, xb);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kGroup; ++i) row(i, 0, V{a[i], b[i]});
}

template <class Step>
struct FloatTile {
  static constexpr int group = kGroup;
  template <class Row>
  KARMA_INLINE void compute(const uint32_t* q, const uint32_t* x, int64_t steps, Row row) {
    tile_of<Floats, Step>(q, x, steps, _mm512_setzero_ps(), _mm512_setzero_ps(), row);
  }
};

}  // namespace

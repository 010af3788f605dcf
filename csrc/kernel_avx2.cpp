#include "kernel.h"

#ifdef KARMA_X86
#include <math.h>
#include <string.h>
#pragma GCC target("avx2,fma,f16c,bmi,popcnt")
#include <immintrin.h>

namespace {

struct Lanes {
  static constexpr int count = 8;
  __m256 v;
  static KARMA_INLINE Lanes zero() { return {_mm256_setzero_ps()}; }
  KARMA_INLINE void add(const float* a, const float* b) {
    v = _mm256_fmadd_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b), v);
  }
  static KARMA_INLINE void from_half(const uint16_t* x, float* out) {
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
  }
  static KARMA_INLINE void cross(float* x, float* y) {
    const __m256 a = _mm256_loadu_ps(x), b = _mm256_loadu_ps(y);
    _mm256_storeu_ps(x, _mm256_add_ps(a, b));
    _mm256_storeu_ps(y, _mm256_sub_ps(a, b));
  }
  static KARMA_INLINE void hadamard(float* x) {  // of 8 numbers
    __m256 y = _mm256_loadu_ps(x);
    y = _mm256_blend_ps(_mm256_add_ps(_mm256_permute_ps(y, 0xb1), y), _mm256_sub_ps(_mm256_permute_ps(y, 0xb1), y),
                        0xaa);
    y = _mm256_blend_ps(_mm256_add_ps(_mm256_permute_ps(y, 0x4e), y), _mm256_sub_ps(_mm256_permute_ps(y, 0x4e), y),
                        0xcc);
    const __m256 other = _mm256_permute2f128_ps(y, y, 1);
    _mm256_storeu_ps(x, _mm256_blend_ps(_mm256_add_ps(other, y), _mm256_sub_ps(other, y), 0xf0));
  }
  static KARMA_INLINE float sum(const Lanes* x) {
    const __m256 all = _mm256_add_ps(_mm256_add_ps(x[0].v, x[1].v), _mm256_add_ps(x[2].v, x[3].v));
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(half) + _mm_cvtss_f32(_mm_movehdup_ps(half));
  }
};

}  // namespace

#define KARMA_FUSED  // g++ defines __FP_FAST_FMAF for a -mfma, but not for a target pragma
#include "basics.h"
#include "scan.h"

namespace {

struct Floats {
  __m256 a, b;
  KARMA_INLINE uint32_t above(karma::Bound limit) const {
    const __m256 x = _mm256_set1_ps(limit.real);
    return both(_mm256_cmp_ps(a, x, _CMP_GT_OQ), _mm256_cmp_ps(b, x, _CMP_GT_OQ));
  }
  KARMA_INLINE uint32_t at_least(karma::Bound limit) const {
    const __m256 x = _mm256_set1_ps(limit.real);
    return both(_mm256_cmp_ps(a, x, _CMP_GE_OQ), _mm256_cmp_ps(b, x, _CMP_GE_OQ));
  }
  KARMA_INLINE void store(karma::Bound* out) const {
    _mm256_storeu_ps(&out[0].real, a);
    _mm256_storeu_ps(&out[8].real, b);
  }
  static KARMA_INLINE uint32_t both(__m256 low, __m256 high) {
    return uint32_t(_mm256_movemask_ps(low)) | uint32_t(_mm256_movemask_ps(high)) << 8;
  }
};

// 6 queries by 16 items in 12 of the 16 registers, twice for a panel.
struct Tile {
  static constexpr int group = 6;
  template <class Row>
  KARMA_INLINE void compute(const uint32_t* q, const uint32_t* x, int64_t steps, Row row) {
    for (int offset = 0; offset < karma::kPanel; offset += 16) {
      const float* y = reinterpret_cast<const float*>(x) + offset;
      const float* one = reinterpret_cast<const float*>(q);
      __m256 a[group], b[group];
#pragma GCC unroll 6
      for (int i = 0; i < group; ++i) a[i] = b[i] = _mm256_setzero_ps();
      for (int64_t s = 0; s < steps; ++s, y += karma::kPanel, one += group) {
        const __m256 ya = _mm256_loadu_ps(y), yb = _mm256_loadu_ps(y + 8);
#pragma GCC unroll 6
        for (int i = 0; i < group; ++i) {
          const __m256 v = _mm256_broadcast_ss(one + i);
          a[i] = _mm256_fmadd_ps(v, ya, a[i]);
          b[i] = _mm256_fmadd_ps(v, yb, b[i]);
        }
      }
#pragma GCC unroll 6
      for (int i = 0; i < group; ++i) row(i, offset, Floats{a[i], b[i]});
    }
  }
};

}  // namespace

namespace karma {
const Kernel kAvx2 = {"avx2", Precision::float32, true, Tile::group, false, 1, &kBasics, scan<Tile>};
}
#endif

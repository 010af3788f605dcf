#include "kernel.h"

#ifdef KARMA_X86
#include <math.h>
#include <string.h>
// a false alarm inside the compiler's own header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi,popcnt")
#include "avx512.h"

namespace {

struct Lanes {
  static constexpr int count = 16;
  __m512 v;
  static KARMA_INLINE Lanes zero() { return {_mm512_setzero_ps()}; }
  KARMA_INLINE void add(const float* a, const float* b) {
    v = _mm512_fmadd_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), v);
  }
  static KARMA_INLINE void from_half(const uint16_t* x, float* out) {
    _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
  }
  static KARMA_INLINE void cross(float* x, float* y) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(y);
    _mm512_storeu_ps(x, _mm512_add_ps(a, b));
    _mm512_storeu_ps(y, _mm512_sub_ps(a, b));
  }
  static KARMA_INLINE void hadamard(float* x) {  // of 16 numbers
    __m512 y = _mm512_loadu_ps(x);
    y = pair(y, _mm512_permute_ps(y, 0xb1), 0xaaaa);
    y = pair(y, _mm512_permute_ps(y, 0x4e), 0xcccc);
    y = pair(y, _mm512_shuffle_f32x4(y, y, 0xb1), 0xf0f0);
    y = pair(y, _mm512_shuffle_f32x4(y, y, 0x4e), 0xff00);
    _mm512_storeu_ps(x, y);
  }
  static KARMA_INLINE __m512 pair(__m512 y, __m512 other, __mmask16 second) {
    return _mm512_mask_sub_ps(_mm512_add_ps(other, y), second, other, y);
  }
  static KARMA_INLINE float sum(const Lanes* x) {
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(x[0].v, x[1].v), _mm512_add_ps(x[2].v, x[3].v)));
  }
};

}  // namespace

#define KARMA_FUSED  // g++ defines __FP_FAST_FMAF for a -mfma, but not for a target pragma
#include "basics.h"
#include "scan.h"

namespace {

struct Step {
  static KARMA_INLINE __m512 next(__m512 acc, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc);
  }
};

}  // namespace

namespace karma {
extern const Basics kBasicsAvx512;
const Basics kBasicsAvx512 = kBasics;
const Kernel kAvx512 = {"avx512", Precision::float32, true, kGroup, false, 1, &kBasicsAvx512, scan<FloatTile<Step>>};
}  // namespace karma
#endif

#include "kernel.h"

#ifdef KARMA_AVX512_BF16
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,bmi,popcnt")
#include "avx512.h"
#include "scan.h"

namespace {

struct Step {
  static KARMA_INLINE __m512 next(__m512 acc, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
  }
};

}  // namespace

namespace karma {
extern const Basics kBasicsAvx512;
const Kernel kAvx512Bfloat16 = {"avx512_bf16",  Precision::bfloat16,  false, kGroup, false, 1,
                                &kBasicsAvx512, scan<FloatTile<Step>>};
}  // namespace karma
#endif

#include "kernel.h"

#ifdef KARMA_X86
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,bmi,popcnt")
#include "avx512.h"
#include "scan.h"

namespace {

struct Step {
  static KARMA_INLINE __m512i next(__m512i acc, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(acc, a, b); }
};

// The instruction takes unsigned queries, which are shifted by 128; each panel begins with what to add for that.
struct Tile {
  static constexpr int group = kGroup;
  template <class Row>
  KARMA_INLINE void compute(const uint32_t* q, const uint32_t* x, int64_t steps, Row row) {
    tile_of<Wholes, Step>(q, x + karma::kPanel, steps, _mm512_loadu_si512(x), _mm512_loadu_si512(x + 16), row);
  }
};

}  // namespace

namespace karma {
extern const Basics kBasicsAvx512;
const Kernel kAvx512Int8 = {"avx512_vnni", Precision::int8, false, kGroup, false, 1, &kBasicsAvx512, scan<Tile>};
}  // namespace karma
#endif

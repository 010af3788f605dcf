// For any CPU. Exact where the compiler may count on fused multiply-adds (64-bit ARM), else a filter in float32.
#include <math.h>
#include <string.h>

#include "bits.h"
#include "kernel.h"

namespace {

struct Lanes {
  static constexpr int count = 4;
  float v[count];
  static Lanes zero() { return {}; }
  void add(const float* a, const float* b) {
    for (int i = 0; i < count; ++i) v[i] += a[i] * b[i];
  }
  static void from_half(const uint16_t* x, float* out) {
    for (int i = 0; i < count; ++i) out[i] = half(x[i]);
  }
  static void cross(float* x, float* y) {
    for (int i = 0; i < count; ++i) {
      const float a = x[i], b = y[i];
      x[i] = a + b, y[i] = a - b;
    }
  }
  static void hadamard(float* x) {  // of 4 numbers
    const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
  }
  static float sum(const Lanes* x) {
    float s[count];
    for (int i = 0; i < count; ++i) s[i] = (x[0].v[i] + x[1].v[i]) + (x[2].v[i] + x[3].v[i]);
    return (s[0] + s[1]) + (s[2] + s[3]);
  }
};

}  // namespace

#include "basics.h"
#include "scan.h"

namespace {

#ifdef __FP_FAST_FMAF
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif
constexpr int kColumns = 8;

struct Floats {
  const float* x;
  uint32_t above(karma::Bound limit) const {
    uint32_t out = 0;
    for (int j = 0; j < kColumns; ++j) out |= uint32_t(x[j] > limit.real) << j;
    return out;
  }
  uint32_t at_least(karma::Bound limit) const {
    uint32_t out = 0;
    for (int j = 0; j < kColumns; ++j) out |= uint32_t(x[j] >= limit.real) << j;
    return out;
  }
  void store(karma::Bound* out) const { memcpy(out, x, kColumns * 4); }
};

struct Tile {
  static constexpr int group = 4;
  template <class Row>
  void compute(const uint32_t* q, const uint32_t* x, int64_t steps, Row row) {
    const float* queries = reinterpret_cast<const float*>(q);
    for (int offset = 0; offset < karma::kPanel; offset += kColumns) {
      const float* items = reinterpret_cast<const float*>(x) + offset;
      float acc[group][kColumns] = {};
      for (int64_t s = 0; s < steps; ++s)
        for (int i = 0; i < group; ++i)
          for (int j = 0; j < kColumns; ++j) {
            const float a = queries[s * group + i], b = items[s * karma::kPanel + j];
            acc[i][j] = kFused ? fused(a, b, acc[i][j]) : acc[i][j] + a * b;
          }
      for (int i = 0; i < group; ++i) row(i, offset, Floats{acc[i]});
    }
  }
};

}  // namespace

namespace karma {
const Kernel kPortable = {"portable", Precision::float32, kFused, Tile::group, false, 1, &kBasics, scan<Tile>};
}

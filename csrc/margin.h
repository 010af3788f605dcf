// How far a score computed in another way can lie from the defined one. Proofs in the comments; all in float64.
#pragma once

#include <cmath>
#include <cstdint>

#include "pack.h"

namespace karma {

// Relative error of a sum of products with n roundings in any order: n u / (1 - n u), u = 2^-24.
inline double rounding(double n) {
  const double nu = n * 0x1p-24;
  return nu / (1 - nu);
}

// The chain rounds once a step, the other sum at most twice a step and a few times to combine its parts. What
// underflows, or is flushed to zero, loses at most 2^-126 a step.
//
//   |defined - q.x| <= rounding(D) |q| |x|,   |other - q.x| <= rounding(2 D + 64) |q| |x|
struct Rounding {
  explicit Rounding(int64_t width)
      : chain(rounding(double(width + 1))),
        sum(rounding(double(2 * width + 64))),
        underflow(4.0 * double(width + 64) * 0x1p-126) {}
  double chain, sum, underflow;

  // Of Basics::dot, for a query and items of at most these lengths.
  double of_dot(double query, double longest) const { return inflate((chain + sum) * query * longest + underflow); }

  // Of a kernel on packed copies Q and X:  q.x - Q.X = q.(x - X) + (q - Q).X,  then Cauchy and Schwarz.
  double of_packed(const Lengths& query, const Lengths& items) const {
    return inflate(query.full * items.error + query.error * items.stored + chain * query.full * items.full +
                   sum * query.stored * items.stored + underflow);
  }

  static double inflate(double bound) { return bound * (1 + 1e-6); }  // of the float64 arithmetic itself
};

// The smallest float that is not below x, and the largest that is not above.
inline float float_above(double x) {
  const float f = float(x);
  return double(f) >= x ? f : std::nextafterf(f, INFINITY);
}
inline float float_below(double x) { return -float_above(-x); }

// Bounds on a kernel's scores for a threshold on defined scores: what is above `high` is surely greater, what is below
// `low` surely smaller.
struct Band {
  Bound high, low;
};

inline int32_t clamp_whole(double x) {
  return x >= 2147483647.0 ? 2147483647 : x <= -2147483647.0 ? -2147483647 : int32_t(x);
}

inline Band band(const Kernel& kernel, double threshold, double margin, const Lengths& query, const Lengths& items) {
  Band out;
  if (kernel.precision == Precision::int8) {
    const double unit = query.scale * items.scale, more = 1 + 1e-9;
    const double high = (threshold + margin) / unit, low = (threshold - margin) / unit;
    out.high.whole = clamp_whole(std::ceil(high > 0 ? high * more : high / more));
    out.low.whole = clamp_whole(std::floor(low > 0 ? low / more : low * more));
  } else {
    out.high.real = float_above(threshold + margin);
    out.low.real = float_below(threshold - margin);
  }
  return out;
}

}  // namespace karma

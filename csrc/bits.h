// Numbers from their bits. Local to each file, as scan.h says.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// No step takes or gives a subnormal float32, which some settings of a CPU take for zero.
inline float half(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = uint32_t(x & 0x7fff) << 13;
  const uint32_t subnormal = bits_of(float(x & 0x7fff) * 0x1p-24f), normal = rest + ((127 - 15) << 23);
  const uint32_t special = rest | 0x7f800000;
  return float_of(sign | (rest < 0x00800000 ? subnormal : rest < 0x0f800000 ? normal : special));
}

}  // namespace

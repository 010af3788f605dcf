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

inline float half(uint16_t x) {
  const float rebias = float_of((254 - 15) << 23);  // 2^112 moves the exponent; right for subnormal numbers too
  const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = uint32_t(x & 0x7fff) << 13;
  const uint32_t finite = bits_of(float_of(rest) * rebias), special = rest | 0x7f800000;
  return float_of(sign | (rest >= 0x0f800000 ? special : finite));
}

}  // namespace

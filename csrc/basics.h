// Plain loops that the compiler turns into vectors. Included by one kernel of each instruction set after its target
// pragma and its Lanes, a vector register of floats; local to the file for the same reason as scan.h.
#pragma once

#include <math.h>
#include <string.h>

#include "bits.h"
#include "kernel.h"

namespace {

// One rounding of a * b + c to float32.
inline float fused(float a, float b, float c) {
#if defined(__FP_FAST_FMAF) || defined(KARMA_FUSED)
  return __builtin_fmaf(a, b, c);
#else
  // The product is exact in float64. The sum is rounded to odd there: of the two neighbours of an inexact sum the one
  // with an odd last bit. With more than two bits to spare this makes the second rounding right (Boldo and Melquiond,
  // 2008, https://doi.org/10.1109/TC.2007.70819).
  const double x = double(a) * double(b), y = double(c), sum = x + y;
  const double part = sum - x, rest = (x - (sum - part)) + (y - part);  // x + y == sum + rest (Knuth)
  int64_t u;
  memcpy(&u, &sum, 8);
  // away from zero the bits grow
  const int64_t inexact = rest != 0, outwards = (rest > 0) == (sum > 0);
  u += (inexact & ~u & 1) * (outwards ? 1 : -1);
  double odd;
  memcpy(&odd, &u, 8);
  return float(odd);
#endif
}

// Defined scores of `count` pairs, eight at a time to hide the latency; query(i) and rows[i] are a pair.
template <class Query>
void chains(Query query, const float* const* rows, int64_t count, int64_t width, float* out) {
  constexpr int n = 8;
  for (; count > 0; count -= n, rows += n, out += n, query += n) {
    float acc[n] = {};
    if (count >= n) {
      for (int64_t d = 0; d < width; ++d)
        for (int i = 0; i < n; ++i) acc[i] = fused(query[i][d], rows[i][d], acc[i]);
    } else {
      for (int64_t d = 0; d < width; ++d)
        for (int i = 0; i < count; ++i) acc[i] = fused(query[i][d], rows[i][d], acc[i]);
    }
    memcpy(out, acc, size_t(count < n ? count : n) * 4);
  }
}

struct Same {  // one query for all pairs: its element is loaded once
  const float* q;
  const float* operator[](int) const { return q; }
  void operator+=(int) {}
};

void chains_of_one(const float* q, const float* const* rows, int64_t count, int64_t width, float* out) {
  chains(Same{q}, rows, count, width, out);
}

void chains_of_pairs(const float* const* queries, const float* const* rows, int64_t count, int64_t width, float* out) {
  chains(queries, rows, count, width, out);
}

KARMA_INLINE float dot(const float* a, const float* b, int64_t width) {
  constexpr int n = Lanes::count;
  Lanes acc[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
  int64_t d = 0;
  for (; d + 4 * n <= width; d += 4 * n)
    for (int i = 0; i < 4; ++i) acc[i].add(a + d + i * n, b + d + i * n);
  for (; d + n <= width; d += n) acc[0].add(a + d, b + d);
  float rest = 0;
  for (; d < width; ++d) rest += a[d] * b[d];
  return Lanes::sum(acc) + rest;
}

void dots(const karma::Near* list, int64_t count, const float* const* queries, const float* rows, int64_t width,
          float* out) {
  for (int64_t n = 0; n < count; ++n) {
    constexpr int64_t ahead = 3, line = 16;
    if (n + ahead < count) {
      const float* next = rows + list[n + ahead].item * width;
      for (int64_t d = 0; d < width && d < 16 * line; d += line) __builtin_prefetch(next + d);
    }
    out[n] = dot(queries[list[n].target], rows + list[n].item * width, width);
  }
}

void to_float(karma::Storage from, const void* row, int64_t width, float* out) {
  if (from == karma::Storage::float32) {
    memcpy(out, row, size_t(width) * 4);
  } else if (from == karma::Storage::bfloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(row);
    for (int64_t d = 0; d < width; ++d) out[d] = float_of(uint32_t(x[d]) << 16);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(row);
    int64_t first = 0;
    for (; first + Lanes::count <= width; first += Lanes::count) Lanes::from_half(x + first, out + first);
    for (int64_t d = first; d < width; ++d) out[d] = half(x[d]);
  }
}

// Not below the sum of squares, and above it by less than width + 64 parts in 2^22.
double square(const float* row, int64_t width) {
  const float quick = dot(row, row, width);
  // numbers whose squares vanish in float32 are then too small to matter beside the sum
  if (quick > 1e-20f && quick < 1e37f) return double(quick) * (1 + double(width + 64) * 0x1p-23);
  double sum = 0;
  for (int64_t d = 0; d < width; ++d) sum += double(row[d]) * double(row[d]);
  return sum * (1 + 1e-9);
}

float largest(const float* row, int64_t width) {
  constexpr int n = 16;
  float most[n] = {};
  int64_t d = 0;
  for (; d + n <= width; d += n)
    for (int i = 0; i < n; ++i) most[i] = fabsf(row[d + i]) > most[i] ? fabsf(row[d + i]) : most[i];
  for (; d < width; ++d) most[0] = fabsf(row[d]) > most[0] ? fabsf(row[d]) : most[0];
  for (int i = 1; i < n; ++i) most[0] = most[i] > most[0] ? most[i] : most[0];
  return most[0];
}

// To the nearest, but numbers that bfloat16 has not stay within it: no infinity, no subnormal numbers, which the
// instructions take for zero.
inline uint32_t bfloat16_bits(float x) {
  const uint32_t u = bits_of(x), sign = u & 0x80000000, size = u & 0x7fffffff;
  uint32_t near = (size + 0x7fff + ((size >> 16) & 1)) & 0xffff0000;
  near = near >= 0x7f800000 ? 0x7f7f0000 : near;
  near = near < 0x00800000 ? 0 : near;
  return (sign | near) >> 16;
}

constexpr int kPiece = 256;  // of a row at a time

void to_bfloat16(const float* row, int64_t width, uint32_t* out, int64_t units, double* squares) {
  uint16_t* to = reinterpret_cast<uint16_t*>(out);
  squares[0] = squares[1] = squares[2] = 0;
  float kept[kPiece], lost[kPiece];
  for (int64_t begin = 0; begin < width; begin += kPiece) {
    const int n = int(width - begin < kPiece ? width - begin : kPiece);
    const float* x = row + begin;
    for (int i = 0; i < n; ++i) {
      const uint32_t u = bfloat16_bits(x[i]);
      to[begin + i] = uint16_t(u);
      kept[i] = float_of(u << 16);
      lost[i] = x[i] - kept[i];  // exact
    }
    squares[0] += square(x, n);
    squares[1] += square(kept, n);
    squares[2] += square(lost, n);
  }
  memset(to + width, 0, size_t(units * 4 - width * 2));
}

void to_int8(const float* row, int64_t width, float scale, int shift, uint32_t* out, int64_t units, double* squares,
             int32_t* sum) {
  uint8_t* to = reinterpret_cast<uint8_t*>(out);
  const float inverse = 1 / scale, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest whole number
  squares[0] = squares[1] = squares[2] = 0;
  *sum = 0;
  float kept[kPiece], lost[kPiece];
  for (int64_t begin = 0; begin < width; begin += kPiece) {
    const int n = int(width - begin < kPiece ? width - begin : kPiece);
    const float* x = row + begin;
    int32_t total = 0;
    for (int i = 0; i < n; ++i) {
      const float near = x[i] * inverse + magic;
      int32_t whole = int32_t(bits_of(near) - 0x4b400000u);
      whole = whole > 127 ? 127 : whole < -127 ? -127 : whole;
      total += whole;
      to[begin + i] = uint8_t(whole + shift);
      kept[i] = scale * float(whole);
      lost[i] = x[i] - kept[i];
    }
    *sum += total;
    squares[0] += square(x, n);
    squares[1] += square(kept, n);
    squares[2] += square(lost, n);
  }
  memset(to + width, 0, size_t(units * 4 - width));
}

// Sums and differences of numbers 1, 2, 4 and so on apart, for a power of two of numbers.
void hadamard(float* x, int64_t size) {
  constexpr int n = Lanes::count;
  int64_t h = 1;
  if (size >= n) {
    for (int64_t i = 0; i < size; i += n) Lanes::hadamard(x + i);
    for (h = n; h < size; h *= 2)
      for (int64_t i = 0; i < size; i += 2 * h)
        for (int64_t j = i; j < i + h; j += n) Lanes::cross(x + j, x + j + h);
  }
  for (; h < size; h *= 2)
    for (int64_t i = 0; i < size; ++i)
      if (!(i & h)) {
        const float a = x[i], b = x[i + h];
        x[i] = a + b, x[i + h] = a - b;
      }
  const float shrink = float(1 / sqrt(double(size)));
  for (int64_t i = 0; i < size; ++i) x[i] *= shrink;
}

// A fixed rotation that spreads what stands in few numbers over all: random signs, then a Hadamard transform of the
// largest power of two from the front and one from the back.
void rotate(float* x, int64_t width) {
  for (int64_t d = 0; d < width; ++d) {
    uint32_t hash = uint32_t(d) * 0x9e3779b9u;
    hash = (hash ^ hash >> 15) * 0x85ebca6bu;
    x[d] = float_of(bits_of(x[d]) ^ ((hash ^ hash >> 13) & 0x80000000u));
  }
  int64_t size = 1;
  while (2 * size <= width) size *= 2;
  hadamard(x, size);
  if (size < width) hadamard(x + width - size, size);
}

constexpr karma::Basics kBasics = {chains_of_one, chains_of_pairs, dots,   to_float, largest,
                                   to_bfloat16,   to_int8,         square, rotate};

}  // namespace

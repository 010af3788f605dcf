// What a kernel finds, compared with scores computed one by one with fmaf. Arrays are allocated to their exact size,
// so that a sanitizer sees every read and write beyond them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "count.h"
#include "cpu.h"
#include "top_k.h"

inline void require(bool holds, const char* what, const char* kernel) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s\n", kernel, what);
  std::exit(1);
}

// Of a float16 or bfloat16, by its definition.
inline float half_value(uint16_t bits, bool bfloat) {
  const int digits = bfloat ? 7 : 10, bias = bfloat ? 127 : 15;
  const int power = (bits & 0x7fff) >> digits, fraction = bits & ((1 << digits) - 1);
  const double size =
      power ? std::ldexp(fraction + (1 << digits), power - bias - digits) : std::ldexp(fraction, 1 - bias - digits);
  return float(bits & 0x8000 ? -size : size);
}

struct Shape {
  int64_t queries, items, width;
  int targets;  // a query; 0: one query has none
  karma::Storage storage;
  bool coarse;  // few different numbers, so that many scores are equal and the same in any order of summation
};

class Data {
 public:
  Data(const Shape& shape, unsigned seed) : shape(shape), rng_(seed) {
    const bool wide = shape.storage == karma::Storage::float32, bfloat = shape.storage == karma::Storage::bfloat16;
    for (int64_t i = 0; i < shape.queries * shape.width; ++i) vectors.push_back(number());
    for (int64_t i = 0; i < shape.items * shape.width; ++i) {
      const float x = number();
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      // small numbers of either format: the exponents of bfloat16 are cut to those near 1
      const uint16_t half = uint16_t(shape.coarse ? (x < 0 ? 0x8000 : 0) | (x == 0   ? 0
                                                                            : bfloat ? 0x3f80
                                                                                     : 0x3c00)
                                     : bfloat     ? bits >> 16
                                                  : bits >> 14 & 0xbfff);
      values_.push_back(wide ? x : half_value(half, bfloat));
      halves_.push_back(half);
    }
    values_.shrink_to_fit(), halves_.shrink_to_fit(), vectors.shrink_to_fit();
    rows = {wide ? static_cast<const void*>(values_.data()) : halves_.data(), shape.storage, shape.items, shape.width};
    first.push_back(0);
    for (int64_t q = 0; q < shape.queries; ++q) {
      const int own = shape.targets ? shape.targets : q == 1 ? 0 : 1;
      for (int t = 0; t < own; ++t) {
        item.push_back((q * 7 + t * 13) % shape.items);
        score.push_back(defined(q, item.back()));
      }
      first.push_back(int64_t(item.size()));
    }
    item.shrink_to_fit(), score.shrink_to_fit(), first.shrink_to_fit();
    left_first.push_back(0);
    for (int64_t q = 0; q < shape.queries; ++q) {
      for (int64_t i = q; i < shape.items; i += 5 + q) left_out.push_back(i);
      left_first.push_back(int64_t(left_out.size()));
    }
    left_out.shrink_to_fit(), left_first.shrink_to_fit();
  }

  float defined(int64_t query, int64_t row) const {
    float acc = 0;
    for (int64_t d = 0; d < shape.width; ++d)
      acc = std::fmaf(vectors[size_t(query * shape.width + d)], values_[size_t(row * shape.width + d)], acc);
    return acc;
  }

  bool is_left_out(int64_t query, int64_t row) const {
    return std::binary_search(left_out.begin() + left_first[size_t(query)],
                              left_out.begin() + left_first[size_t(query) + 1], row);
  }

  karma::Targets targets() const { return {shape.queries, vectors.data(), first.data(), item.data(), score.data()}; }

  const Shape shape;
  karma::Rows rows;
  std::vector<float> vectors, score;
  std::vector<int64_t> first, item, left_first, left_out;

 private:
  float number() {
    if (shape.coarse) return float(int(rng_() % 3) - 1);
    return std::ldexp(float(int(rng_() >> 8) - (1 << 23)), int(rng_() % 4) - 24);
  }

  std::mt19937 rng_;
  std::vector<float> values_;
  std::vector<uint16_t> halves_;
};

struct Counted {
  explicit Counted(const Data& data) : greater(data.item.size()), equal(data.item.size()) {}
  bool operator==(const Counted& other) const { return greater == other.greater && equal == other.equal; }
  std::vector<int64_t> greater, equal;
};

// Items from begin to end, or those of them that are left out.
inline Counted counted(const Data& data, int64_t begin, int64_t end, bool listed) {
  Counted found(data);
  for (int64_t q = 0; q < data.shape.queries; ++q)
    for (int64_t i = begin; i < end; ++i) {
      if (listed && !data.is_left_out(q, i)) continue;
      const float s = data.defined(q, i);
      for (int64_t t = data.first[size_t(q)]; t < data.first[size_t(q) + 1]; ++t) {
        found.greater[size_t(t)] += s > data.score[size_t(t)];
        found.equal[size_t(t)] += s == data.score[size_t(t)] && i != data.item[size_t(t)];
      }
    }
  return found;
}

inline void check_counts(const karma::Kernel& kernel, const Data& data, int threads) {
  const int64_t n = data.shape.items, cuts[] = {0, n / 3, n / 2 + 1 > n ? n : n / 2 + 1, n};
  const karma::Packed all(kernel, data.rows, 0, n, threads);
  Counted sum(data);
  for (int p = 0; p < 3; ++p) {
    const int64_t begin = std::min(cuts[p], cuts[p + 1]), end = cuts[p + 1];
    const karma::Packed part(kernel, data.rows, begin, end, threads);
    Counted one(data), same(data);
    karma::count_ranks(all, data.rows, data.targets(), begin, end, one.greater.data(), one.equal.data(), threads);
    karma::count_ranks(part, data.rows, data.targets(), begin, end, same.greater.data(), same.equal.data(), threads);
    require(one == counted(data, begin, end, false), "counts of a range", kernel.name);
    require(one == same, "counts of a part packed alone", kernel.name);
  }
  Counted listed(data);
  karma::count_listed(*kernel.basics, data.rows, all.most().full, data.targets(), data.left_first.data(),
                      data.left_out.data(), listed.greater.data(), listed.equal.data(), threads);
  require(listed == counted(data, 0, n, true), "counts of lists", kernel.name);
}

inline void check_top_k(const karma::Kernel& kernel, const Data& data, int64_t k, bool some_left_out, int threads) {
  const int64_t n = data.shape.items, queries = data.shape.queries;
  std::vector<float> scores(size_t(queries * k), -INFINITY);
  std::vector<int64_t> items(size_t(queries * k), -1);
  const karma::Best best{queries, k, scores.data(), items.data()};
  for (int part = 0; part < 2; ++part) {  // one after the other into the same result
    const karma::Packed packed(kernel, data.rows, part * (n / 2), part ? n : n / 2, threads);
    karma::top_k(packed, data.rows, data.vectors.data(), some_left_out ? data.left_first.data() : nullptr,
                 some_left_out ? data.left_out.data() : nullptr, best, threads);
  }
  for (int64_t q = 0; q < queries; ++q) {
    std::vector<std::pair<float, int64_t>> order;  // lowest first
    for (int64_t i = 0; i < n; ++i)
      if (!some_left_out || !data.is_left_out(q, i)) order.push_back({-data.defined(q, i), i});
    std::sort(order.begin(), order.end());
    order.resize(size_t(k), {INFINITY, -1});
    for (size_t i = 0, at = size_t(q * k); i < size_t(k); ++i, ++at)
      require(scores[at] == -order[i].first && items[at] == order[i].second, "the k best", kernel.name);
  }
}

inline void check_pairs(const karma::Kernel& kernel, const Data& data, int threads) {
  std::vector<int64_t> query, item;
  for (int64_t p = 0; p < 700; ++p) {
    query.push_back(p * 31 % data.shape.queries);
    item.push_back(p * 17 % data.shape.items);
  }
  std::vector<float> out(query.size());
  karma::pair_scores(*kernel.basics, data.vectors.data(), data.rows, int64_t(query.size()), query.data(), item.data(),
                     out.data(), threads);
  for (size_t p = 0; p < out.size(); ++p)
    require(out[p] == data.defined(query[p], item[p]), "scores of pairs", kernel.name);
}

// Everything, on shapes with panels, groups and blocks that are not full.
inline void check_kernel(const karma::Kernel& kernel, int threads) {
  const auto wide = karma::Storage::float32, half = karma::Storage::float16, bfloat = karma::Storage::bfloat16;
  const Shape shapes[] = {{1, 1, 1, 1, wide, true},        {3, 40, 5, 2, half, false},
                          {29, 290, 33, 1, bfloat, false}, {40, 33, 70, 3, wide, false},
                          {9, 4200, 3, 0, wide, true},     {13, 130, 300, 2, half, true},
                          {5, 70, 1030, 1, wide, false},   {70, 600, 16, 40, wide, false}};
  unsigned seed = 0;
  for (const Shape& shape : shapes) {
    const Data data(shape, ++seed);
    check_counts(kernel, data, threads);
    check_pairs(kernel, data, threads);
    for (const int64_t k : {int64_t(1), int64_t(7), shape.items + 3})
      if (shape.queries * k < 10000) check_top_k(kernel, data, k, seed % 2, threads);
  }
}

// Float32 scores of listed pairs.
#pragma once

#include <vector>

#include "pack.h"

namespace karma {

class Rescore {
 public:
  Rescore(const Basics& basics, const Rows& rows) : basics_(basics), rows_(rows) {}

  // Scores of a list whose items count from row `start` and lie below start + items. query: that of each target.
  const float* operator()(const Near* list, int64_t count, const float* const* query, int64_t start, int64_t items) {
    if (int64_t(scores_.size()) < count) scores_.resize(size_t(count));
    basics_.dots(list, count, query, floats(list, count, start, items), rows_.width, scores_.data());
    return scores_.data();
  }

 private:
  // The catalogue itself, or its listed rows as float32; these are kept as long as `start` stays.
  const float* floats(const Near* list, int64_t count, int64_t start, int64_t items) {
    if (rows_.storage == Storage::float32) return static_cast<const float*>(rows_.at(start));
    if (start != start_) {
      start_ = start;
      copies_.resize(size_t(items * rows_.width));
      copied_.assign(size_t(items), false);
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t item = list[n].item;
      if (copied_[size_t(item)]) continue;
      basics_.to_float(rows_.storage, rows_.at(start + item), rows_.width, &copies_[size_t(item * rows_.width)]);
      copied_[size_t(item)] = true;
    }
    return copies_.data();
  }

  const Basics& basics_;
  const Rows& rows_;
  std::vector<float> scores_, copies_;
  std::vector<char> copied_;
  int64_t start_ = -1;
};

}  // namespace karma

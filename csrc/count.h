// Counting, for targets with known scores, the catalogue items above and level with them.
#pragma once

#include <cstdint>

#include "pack.h"

namespace karma {

struct Targets {
  int64_t queries;
  const float* vectors;  // (queries, width) float32
  const int64_t* first;  // (queries + 1): targets of each query
  const int64_t* item;   // a target; an item that is not counted against it, -1 for none
  const float* score;    // a target: the defined score to compare with
};

// Adds to greater and equal, for every target, the items from begin to end, all within `packed`, with a higher and
// with the same defined score. `rows` is the whole catalogue that was packed.
void count_ranks(const Packed& packed, const Rows& rows, const Targets& targets, int64_t begin, int64_t end,
                 int64_t* greater, int64_t* equal, int threads);

// The same from a list of items for each query: items[first[q]..first[q + 1]]. longest: no listed item is longer.
void count_listed(const Basics& basics, const Rows& rows, double longest, const Targets& targets, const int64_t* first,
                  const int64_t* items, int64_t* greater, int64_t* equal, int threads);

// Defined scores of pairs of rows.
void pair_scores(const Basics& basics, const float* queries, const Rows& rows, int64_t pairs, const int64_t* query,
                 const int64_t* item, float* out, int threads);

}  // namespace karma

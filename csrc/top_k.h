// The k best items of each query.
#pragma once

#include <cstdint>

#include "pack.h"

namespace karma {

struct Best {  // what has been found so far, best first; -inf and -1 where there is less
  int64_t queries, k;
  float* scores;   // (queries, k)
  int64_t* items;  // (queries, k)
};

// Takes the items of `packed` into account, except those listed for a query: left_out[first[q]..first[q + 1]], rising.
// first may be null. Scores are the defined ones; of equal ones the lower item comes first.
void top_k(const Packed& packed, const Rows& rows, const float* queries, const int64_t* first, const int64_t* left_out,
           const Best& best, int threads);

}  // namespace karma

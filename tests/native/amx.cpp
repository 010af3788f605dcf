// kernel_amx.cpp with its instructions done by tile_model.h: the scan against plain loops over what is packed, and
// then the whole of counting and the k best.
#include "checks.h"

#ifndef KARMA_AMX
int main() { return std::printf("the compiler does not know AMX"), 77; }
#else
#include "tile_model.h"

using namespace karma;

namespace {

const Kernel& kernel = kAmxBfloat16;

struct Query {  // a row of packed queries
  const uint32_t* units;
  double times(const uint32_t* items, int64_t item, int64_t steps) const {
    double sum = 0;
    for (int64_t s = 0; s < steps; ++s)
      for (int half = 0; half < 32; half += 16)
        sum += double(half_value(uint16_t(units[s] >> half), true)) *
               half_value(uint16_t(items[s * kPanel + item] >> half), true);
    return sum;
  }
};

// Resumed each time that the list is full. Coarse numbers give the same sums in any order, so nothing may differ.
void check_scan(int64_t items, int64_t width, int targets, bool coarse) {
  const Data data({kernel.group, items, width, 1, Storage::float32, coarse}, unsigned(items + width));
  const Packed packed(kernel, data.rows, 0, items, 1);
  require(packed.steps % 16 == 0 && packed.steps >= (width + 1) / 2 && packed.steps < (width + 1) / 2 + 16,
          "units of a row fill the tiles", kernel.name);
  const int64_t queries = kernel.group - 5;  // a group that is not full
  Units units = allocate(kernel.group * packed.steps);
  std::vector<Lengths> lengths(size_t(kernel.group));
  pack_group(kernel, data.vectors.data(), 0, queries, width, units.get(), lengths.data());

  std::vector<int32_t> first{0};
  std::vector<Bound> high, low;
  for (int q = 0; q < kernel.group; ++q) {
    for (int t = 0; t < (q < queries ? 1 + q % targets : 0); ++t) {
      Bound bound;
      bound.real = float(t - 1);
      low.push_back(bound);
      bound.real += 1;
      high.push_back(bound);
    }
    first.push_back(int32_t(low.size()));
  }
  std::vector<int64_t> above(low.size()), expected_above(low.size());
  std::vector<Near> list(size_t(int64_t(low.size()) * kPanel));  // of one panel
  tiles::state.first_begin = reinterpret_cast<const char*>(units.get());
  tiles::state.first_end = reinterpret_cast<const char*>(units.get() + kernel.group * packed.steps);
  tiles::state.second_begin = reinterpret_cast<const char*>(packed.block(0));
  tiles::state.second_end = tiles::state.second_begin + packed.bytes();

  Job job{};
  job.queries = units.get();
  job.items = packed.block(0);
  job.skip = std::min<int64_t>(37, items - 1);
  job.valid = packed.items_of(0);
  job.first_panel = job.skip / kPanel;
  job.panels = (job.valid + kPanel - 1) / kPanel;
  job.panel_units = packed.panel_units;
  job.steps = packed.steps;
  job.first_target = first.data();
  job.high = high.data();
  job.low = low.data();
  job.above = above.data();
  job.list = list.data();
  job.room = int64_t(list.size());
  std::vector<std::pair<int32_t, int32_t>> found, expected;
  int64_t calls = 0;
  for (const int64_t start = job.first_panel; job.first_panel < job.panels; ++calls) {
    job.listed = 0;
    job.first_panel = kernel.scan(job);
    require(job.listed <= job.room && job.first_panel > start, "the list is not overrun", kernel.name);
    for (int64_t n = 0; n < job.listed; ++n) {
      const Near& near = job.list[n];
      found.push_back({near.target, near.item});
      const int64_t q = std::upper_bound(first.begin(), first.end(), near.target) - first.begin() - 1;
      const double sum = Query{units.get() + q * packed.steps}.times(
          job.items + near.item / kPanel * packed.panel_units, near.item % kPanel, packed.steps);
      require(std::fabs(sum - double(near.score.real)) <= (coarse ? 0 : 1e-5), "scores in the list", kernel.name);
    }
  }
  require(calls > 1 || items < 200, "the scan stops at a full list and is resumed", kernel.name);
  for (int64_t q = 0; q < kernel.group && coarse; ++q)
    for (int64_t i = job.skip; i < job.valid; ++i) {
      const double sum = Query{units.get() + q * packed.steps}.times(job.items + i / kPanel * packed.panel_units,
                                                                     i % kPanel, packed.steps);
      for (int32_t t = first[size_t(q)]; t < first[size_t(q) + 1]; ++t) {
        expected_above[size_t(t)] += sum > high[size_t(t)].real;
        if (sum <= high[size_t(t)].real && sum >= low[size_t(t)].real) expected.push_back({t, int32_t(i)});
      }
    }
  std::sort(found.begin(), found.end());
  std::sort(expected.begin(), expected.end());
  require(!coarse || (found == expected && above == expected_above), "the list and the counts", kernel.name);
  require(!found.empty() || items < 200, "a list that is not empty", kernel.name);
}

}  // namespace

int main() {
  if (!kernel_named("avx512")) return std::printf("no AVX-512"), 77;  // which the code around the tiles needs
  const bool hardware = kernel_named("amx_bf16");
  if (!hardware) tiles::install();
  for (const bool coarse : {true, false}) {
    check_scan(289, 5, 3, coarse);  // a last panel with one item, a width of less than a step
    check_scan(400, 64, 1, coarse);
    check_scan(320, 70, 4, coarse);  // three steps, of which the last is mostly zeros
    check_scan(1, 1, 1, coarse);
  }
  tiles::state.first_begin = nullptr;  // queries of other groups
  check_kernel(kernel, 1);
  if (!hardware) require(tiles::state.products > 1000 && tiles::state.palette == 0, "tiles are released", kernel.name);
  std::printf("%s\n", hardware ? "the CPU's own instructions" : "software model");
}
#endif

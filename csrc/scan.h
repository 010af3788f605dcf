// The loop over panels, for an instruction set that computes one tile. Included by each kernel after its target
// pragma, so everything here is local to the file: a copy compiled for one CPU must never be linked into another's
// code.
#pragma once

#include "kernel.h"

namespace {

// Tile::compute calls row(i, offset, v) with the scores v of query i and some items of the panel, from `offset` on;
// v.above(bound) and v.at_least(bound) are bit masks, v.store(out) writes the scores.
template <class Tile>
int64_t scan(karma::Job& job) {
  const int64_t most = int64_t(job.first_target[Tile::group]) * karma::kPanel;  // entries that one panel may add
  Tile tile;
  const uint32_t* items = job.items + job.first_panel * job.panel_units;
  for (int64_t panel = job.first_panel; panel < job.panels; ++panel, items += job.panel_units) {
    if (!job.level && job.listed + most > job.room) return panel;
    const int64_t first = panel * karma::kPanel, left = job.valid - first, skip = job.skip - first;
    uint32_t keep = left >= karma::kPanel ? ~0u : (1u << left) - 1;
    if (skip > 0) keep &= ~0u << skip;
    tile.compute(job.queries, items, job.steps, [&](int i, int offset, const auto& v) __attribute__((always_inline)) {
      for (int32_t t = job.first_target[i]; t < job.first_target[i + 1]; ++t) {
        const uint32_t above = v.above(job.high[t]) & (keep >> offset);
        uint32_t level = v.at_least(job.low[t]) & (keep >> offset) & ~above;
        job.above[t] += __builtin_popcount(above);
        if (job.level) {
          job.level[t] += __builtin_popcount(level);
        } else if (__builtin_expect(level != 0, 0)) {
          karma::Bound scores[karma::kPanel];
          v.store(scores);
          for (; level; level &= level - 1) {
            const int at = __builtin_ctz(level);
            job.list[job.listed++] = {t, int32_t(first + offset + at), scores[at]};
          }
        }
      }
    });
  }
  return job.panels;
}

}  // namespace

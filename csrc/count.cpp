#include "count.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "margin.h"
#include "rescore.h"
#include "threads.h"

namespace karma {

namespace {

constexpr int64_t kGroups = 24;     // groups of queries a task: often enough that a block is worth fetching
constexpr int64_t kRoom = 1 << 13;  // of the list of undecided pairs
constexpr int64_t kPairs = 8;       // chains at a time
constexpr int kTasksPerThread = 4;

// Defined scores of pairs that float32 in another order left undecided, and the counts that follow.
class Chains {
 public:
  Chains(const Basics& basics, const Rows& rows)
      : basics_(basics), rows_(rows), copies_(rows.storage == Storage::float32 ? 0 : size_t(kPairs * rows.width)) {}

  void add(const float* query, int64_t item, float goal, int64_t* above, int64_t* level) {
    float* buffer = copies_.empty() ? nullptr : &copies_[size_t(waiting_ * rows_.width)];
    queries_[waiting_] = query;
    items_[waiting_] = rows_.floats(basics_, item, buffer);
    goals_[waiting_] = {goal, above, level};
    if (++waiting_ == kPairs) flush();
  }

  void flush() {
    float scores[kPairs];
    basics_.chains_of_pairs(queries_, items_, waiting_, rows_.width, scores);
    for (int64_t i = 0; i < waiting_; ++i) {
      *goals_[i].above += scores[i] > goals_[i].score;
      *goals_[i].level += scores[i] == goals_[i].score;
    }
    waiting_ = 0;
  }

 private:
  struct Goal {
    float score;
    int64_t *above, *level;
  };
  const Basics& basics_;
  const Rows& rows_;
  std::vector<float> copies_;
  const float* queries_[kPairs];
  const float* items_[kPairs];
  Goal goals_[kPairs];
  int64_t waiting_ = 0;
};

struct Sure {  // what is above high, or below low, is so whatever the order of summation
  float high, low;
};

// Some groups of queries against some blocks.
class Task {
 public:
  Task(const Packed& packed, const Rows& rows, const Targets& targets, int64_t first_query, int64_t last_query)
      : packed_(packed),
        kernel_(packed.kernel),
        targets_(targets),
        first_query_(first_query),
        last_query_(last_query),
        groups_((last_query - first_query + kernel_.group - 1) / kernel_.group),
        first_target_(targets.first[first_query]),
        rounding_(packed.width),
        rescore_(*kernel_.basics, rows),
        chains_(*kernel_.basics, rows) {
    const size_t count = size_t(targets.first[last_query] - first_target_);
    sure_.resize(count);
    above_.resize(count);
    level_.resize(count);
    high_.resize(count);
    low_.resize(count);
    query_of_.resize(count);
    vectors_.resize(count);
    for (int64_t q = first_query; q < last_query; ++q)
      for (int64_t t = targets.first[q]; t < targets.first[q + 1]; ++t) {
        query_of_[size_t(t - first_target_)] = q - first_query;
        vectors_[size_t(t - first_target_)] = targets.vectors + q * packed.width;
      }
    lengths_.resize(size_t(groups_ * kernel_.group));
    units_ = allocate(groups_ * kernel_.group * packed.steps);
    for (int64_t g = 0; g < groups_; ++g)
      pack_group(kernel_, targets.vectors, first_of(g), first_of(g + 1) - first_of(g), packed.width, group_units(g),
                 &lengths_[size_t(g * kernel_.group)]);
    const double longest = packed.most().full;
    for (size_t i = 0; i < count; ++i) {
      const double goal = targets.score[first_target_ + int64_t(i)];
      const double margin = rounding_.of_dot(lengths_[size_t(query_of_[i])].full, longest);
      sure_[i] = {float_above(goal + margin), float_below(goal - margin)};
    }
  }

  // Items from begin to end.
  void run(int64_t begin, int64_t end) {
    const int64_t size = packed_.block_items();
    for (int64_t start = begin; start < end;) {
      const int64_t b = (start - packed_.begin) / size, stop = std::min(end, packed_.begin + (b + 1) * size);
      for (int64_t g = 0; g < groups_; ++g) compare(g, b, start, stop);
      start = stop;
    }
    chains_.flush();
  }

  void add_to(int64_t* greater, int64_t* equal) const {
    for (size_t t = 0; t < above_.size(); ++t) {
      greater[first_target_ + int64_t(t)] += above_[t];
      equal[first_target_ + int64_t(t)] += level_[t];
    }
  }

 private:
  int64_t first_of(int64_t g) const { return std::min(first_query_ + g * kernel_.group, last_query_); }
  uint32_t* group_units(int64_t g) { return units_.get() + g * kernel_.group * packed_.steps; }

  // One group and items of one block.
  void compare(int64_t g, int64_t b, int64_t first_item, int64_t last_item) {
    const int64_t begin = targets_.first[first_of(g)], end = targets_.first[first_of(g + 1)];
    const size_t at = size_t(begin - first_target_);
    for (int64_t t = begin; t < end; ++t) {
      const size_t i = size_t(t - first_target_);
      const Lengths& query = lengths_[size_t(query_of_[i])];
      const Lengths& block = packed_.blocks[size_t(b)];
      const double margin = kernel_.exact ? 0 : rounding_.of_packed(query, block);
      const Band limits = band(kernel_, targets_.score[t], margin, query, block);
      high_[i] = limits.high;
      low_[i] = limits.low;
    }
    group_targets_.clear();
    for (int64_t i = 0; i <= kernel_.group; ++i)
      group_targets_.push_back(int32_t(targets_.first[std::min(first_of(g) + i, last_query_)] - begin));
    const int64_t room = kernel_.exact ? 0 : std::max(kRoom, (end - begin) * kPanel);
    if (int64_t(list_.size()) < room) list_.resize(size_t(room));

    Job job{};
    job.queries = group_units(g);
    job.items = packed_.block(b);
    const int64_t start = packed_.begin + b * packed_.block_items();
    job.skip = first_item - start;
    job.valid = last_item - start;
    job.first_panel = job.skip / kPanel;
    job.panels = (job.valid + kPanel - 1) / kPanel;
    job.panel_units = packed_.panel_units;
    job.steps = packed_.steps;
    job.first_target = group_targets_.data();
    job.high = high_.data() + at;
    job.low = low_.data() + at;
    job.above = above_.data() + at;
    job.level = kernel_.exact ? level_.data() + at : nullptr;
    job.list = list_.data();
    job.room = room;
    if (kernel_.exact) {
      kernel_.scan(job);
      for (int64_t t = begin; t < end; ++t) {  // the target itself is level with itself
        const int64_t own = targets_.item[t] - start;
        if (own >= job.skip && own < job.valid) --level_[size_t(t - first_target_)];
      }
      return;
    }
    while (job.first_panel < job.panels) {
      job.listed = 0;
      job.first_panel = kernel_.scan(job);
      decide(begin, start, job);
    }
  }

  // Pairs within the margin of a filter: float32 decides nearly all of them.
  void decide(int64_t begin, int64_t start, const Job& job) {
    const size_t at = size_t(begin - first_target_);
    const float* scores = rescore_(job.list, job.listed, vectors_.data() + at, start, job.valid);
    for (int64_t n = 0; n < job.listed; ++n) {
      const size_t i = at + size_t(job.list[n].target);
      const bool above = scores[n] > sure_[i].high;
      above_[i] += above;
      if (above || scores[n] < sure_[i].low) continue;
      const int64_t t = first_target_ + int64_t(i), item = start + job.list[n].item;
      if (item != targets_.item[t]) chains_.add(vectors_[i], item, targets_.score[t], &above_[i], &level_[i]);
    }
  }

  const Packed& packed_;
  const Kernel& kernel_;
  const Targets& targets_;
  const int64_t first_query_, last_query_, groups_, first_target_;
  const Rounding rounding_;
  Rescore rescore_;
  Chains chains_;
  Units units_;
  std::vector<Lengths> lengths_;       // a query
  std::vector<int64_t> query_of_;      // a target
  std::vector<const float*> vectors_;  // a target: its query's
  std::vector<int64_t> above_, level_;
  std::vector<Bound> high_, low_;  // a target: of the kernel's scores in a block
  std::vector<Sure> sure_;         // a target: of float32 scores
  std::vector<int32_t> group_targets_;
  std::vector<Near> list_;
};

}  // namespace

void count_ranks(const Packed& packed, const Rows& rows, const Targets& targets, int64_t begin, int64_t end,
                 int64_t* greater, int64_t* equal, int threads) {
  const int64_t chunk = kGroups * packed.kernel.group, chunks = (targets.queries + chunk - 1) / chunk;
  const int64_t size = packed.block_items(), first = (begin - packed.begin) / size;
  const int64_t blocks = (end - packed.begin + size - 1) / size - first;
  if (chunks == 0 || begin == end) return;
  // few queries: several tasks share them, each with a part of the blocks
  const int64_t parts = std::max<int64_t>(1, std::min(blocks, (kTasksPerThread * threads + chunks - 1) / chunks));
  std::mutex guard;
  parallel(chunks * parts, threads, [&](int64_t number, int) {
    const int64_t c = number / parts, part = number % parts;
    Task task(packed, rows, targets, c * chunk, std::min(targets.queries, (c + 1) * chunk));
    const auto cut = [&](int64_t p) { return packed.begin + (first + p * blocks / parts) * size; };
    task.run(std::max(begin, cut(part)), std::min(end, cut(part + 1)));
    const std::lock_guard<std::mutex> lock(guard);
    task.add_to(greater, equal);
  });
}

void count_listed(const Basics& basics, const Rows& rows, double longest, const Targets& targets, const int64_t* first,
                  const int64_t* items, int64_t* greater, int64_t* equal, int threads) {
  constexpr int64_t chunk = 64;
  const Rounding rounding(rows.width);
  parallel((targets.queries + chunk - 1) / chunk, threads, [&](int64_t c, int) {
    Chains chains(basics, rows);
    std::vector<float> copy(rows.storage == Storage::float32 ? 0 : size_t(rows.width));
    for (int64_t q = c * chunk; q < std::min(targets.queries, (c + 1) * chunk); ++q) {
      const float* query = targets.vectors + q * rows.width;
      const double margin = rounding.of_dot(std::sqrt(basics.square(query, rows.width)), longest);
      for (int64_t i = first[q]; i < first[q + 1]; ++i) {
        const Near one{};
        float score;
        basics.dots(&one, 1, &query, rows.floats(basics, items[i], copy.data()), rows.width, &score);
        for (int64_t t = targets.first[q]; t < targets.first[q + 1]; ++t) {
          if (score > targets.score[t] + margin) {
            ++greater[t];
          } else if (score >= targets.score[t] - margin && items[i] != targets.item[t]) {
            chains.add(query, items[i], targets.score[t], &greater[t], &equal[t]);
          }
        }
      }
    }
    chains.flush();
  });
}

void pair_scores(const Basics& basics, const float* queries, const Rows& rows, int64_t pairs, const int64_t* query,
                 const int64_t* item, float* out, int threads) {
  constexpr int64_t chunk = 256;
  parallel((pairs + chunk - 1) / chunk, threads, [&](int64_t c, int) {
    std::vector<float> copies(rows.storage == Storage::float32 ? 0 : size_t(kPairs * rows.width));
    for (int64_t p = c * chunk; p < std::min(pairs, (c + 1) * chunk); p += kPairs) {
      const int64_t count = std::min({kPairs, pairs - p, (c + 1) * chunk - p});
      const float *q[kPairs], *x[kPairs];
      for (int64_t i = 0; i < count; ++i) {
        q[i] = queries + query[p + i] * rows.width;
        x[i] = rows.floats(basics, item[p + i], copies.empty() ? nullptr : &copies[size_t(i * rows.width)]);
      }
      basics.chains_of_pairs(q, x, count, rows.width, out + p);
    }
  });
}

}  // namespace karma

#include "count.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "cpu.h"
#include "margin.h"
#include "rescore.h"
#include "threads.h"

namespace karma {

namespace {

constexpr int64_t kQueries = 512;       // a task: enough that a block is worth fetching, and the crowded packing it
constexpr int64_t kRoom = 1 << 13;      // of the list of undecided pairs
constexpr int64_t kMostRoom = 1 << 20;  // a group with more targets than fit in this goes to the exact kernel
constexpr int64_t kPairs = 8;           // chains at a time
constexpr int64_t kTasksPerThread = 4;

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

// Beyond this share of undecided pairs a filter takes longer than the exact kernel: it then spends its own D units of
// time a pair and about 6000 + 20 D on each undecided one, the exact kernel 4 D. (Measured on an Intel Xeon with D
// from 16 to 1024; int8 on AVX-512 and bfloat16 on AMX differ by a quarter.)
double worthwhile_share(double width) { return 3 * width / (6000 + 20 * width); }

// Some groups of queries against some blocks.
class Task {
 public:
  Task(const Packed& packed, const Rows& rows, const Targets& targets, int64_t first_query, int64_t last_query)
      : packed_(packed),
        kernel_(packed.kernel),
        exact_(packed.kernel.exact ? &packed.kernel : exact_kernel()),
        rows_(rows),
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
    packed_queries_.resize(size_t(groups_));
    exact_queries_.resize(size_t(groups_));
    lengths_.resize(size_t(groups_ * kernel_.group));
    for (int64_t g = 0; g < groups_; ++g)
      packed_queries_[size_t(g)] = pack_queries(kernel_, g, &lengths_[size_t(g * kernel_.group)]);
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t mine = targets.first[first_of(g + 1)] - targets.first[first_of(g)];
      if (!kernel_.exact && exact_ && mine * kPanel > kMostRoom) crowd(g);
    }
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
    for (int64_t first = begin; first < end;) {
      const int64_t b = (first - packed_.begin) / size, start = packed_.begin + b * size;
      const int64_t last = std::min(end, start + size);
      // first, as a group that becomes crowded in this block has had it
      if (std::any_of(exact_queries_.begin(), exact_queries_.end(), [](const Units& q) { return bool(q); }))
        compare_crowded(first, last);
      for (int64_t g = 0; g < groups_; ++g) {
        if (kernel_.exact) {
          compare(kernel_, g, packed_queries_[size_t(g)].get(), packed_.block(b), start, first, last);
        } else if (!exact_queries_[size_t(g)]) {
          filter(g, b, start, first, last);
        }
      }
      first = last;
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

  // Group g of this task, in as many groups as `kernel` makes of it.
  Units pack_queries(const Kernel& kernel, int64_t g, Lengths* lengths) const {
    const int64_t first = first_of(g), last = first_of(g + 1), units = kernel.group * steps_of(kernel, packed_.width);
    Units out = allocate((last - first + kernel.group - 1) / kernel.group * units);
    for (int64_t q = first; q < last; q += kernel.group)
      pack_group(kernel, targets_.vectors, q, std::min<int64_t>(kernel.group, last - q), packed_.width,
                 out.get() + (q - first) / kernel.group * units, lengths);
    return out;
  }

  // Queries first_query to last_query, a group of `kernel`, and items first to last of panels that begin with `start`.
  Job job_of(const Kernel& kernel, const uint32_t* queries, const uint32_t* panels, int64_t first_query,
             int64_t last_query, int64_t start, int64_t first, int64_t last) {
    const int64_t begin = targets_.first[first_query];
    group_targets_.clear();
    for (int64_t i = 0; i <= kernel.group; ++i)
      group_targets_.push_back(int32_t(targets_.first[std::min(first_query + i, last_query)] - begin));
    const size_t at = size_t(begin - first_target_);
    Job job{};
    job.queries = queries;
    job.items = panels;
    job.skip = first - start;
    job.valid = last - start;
    job.first_panel = job.skip / kPanel;
    job.panels = (job.valid + kPanel - 1) / kPanel;
    job.steps = steps_of(kernel, packed_.width);
    job.panel_units = panel_units_of(kernel, packed_.width);
    job.first_target = group_targets_.data();
    job.high = high_.data() + at;
    job.low = low_.data() + at;
    job.above = above_.data() + at;
    return job;
  }

  // Group g with a kernel whose scores are the defined ones.
  void compare(const Kernel& kernel, int64_t g, const uint32_t* queries, const uint32_t* panels, int64_t start,
               int64_t first, int64_t last) {
    const int64_t units = kernel.group * steps_of(kernel, packed_.width);
    for (int64_t q = first_of(g); q < first_of(g + 1); q += kernel.group, queries += units) {
      const int64_t stop = std::min<int64_t>(q + kernel.group, first_of(g + 1));
      for (int64_t t = targets_.first[q]; t < targets_.first[stop]; ++t) {
        const size_t i = size_t(t - first_target_);
        high_[i].real = low_[i].real = targets_.score[t];
        level_[i] -= targets_.item[t] >= first && targets_.item[t] < last;  // it will be level with itself
      }
      Job job = job_of(kernel, queries, panels, q, stop, start, first, last);
      job.level = level_.data() + (targets_.first[q] - first_target_);
      kernel.scan(job);
    }
  }

  // The groups that have become too crowded round their targets for a filter.
  void compare_crowded(int64_t first, int64_t last) {
    const int64_t panels = (last - first + kPanel - 1) / kPanel, units = panel_units_of(*exact_, packed_.width);
    if (!exact_panels_) exact_panels_ = allocate(packed_.block_panels * units);
    for (int64_t p = 0; p < panels; ++p)
      pack_exact(*exact_, rows_, first + p * kPanel, std::min(last, first + (p + 1) * kPanel),
                 exact_panels_.get() + p * units);
    for (int64_t g = 0; g < groups_; ++g) {
      const uint32_t* queries = exact_queries_[size_t(g)].get();
      if (queries) compare(*exact_, g, queries, exact_panels_.get(), first, first, last);
    }
  }

  // Group g with a kernel whose scores have a margin.
  void filter(int64_t g, int64_t b, int64_t start, int64_t first, int64_t last) {
    const int64_t begin = targets_.first[first_of(g)], end = targets_.first[first_of(g + 1)];
    for (int64_t t = begin; t < end; ++t) {
      const size_t i = size_t(t - first_target_);
      const Lengths& query = lengths_[size_t(query_of_[i])];
      const Lengths& block = packed_.blocks[size_t(b)];
      const Band limits = band(kernel_, targets_.score[t], rounding_.of_packed(query, block), query, block);
      high_[i] = limits.high;
      low_[i] = limits.low;
    }
    const int64_t room = std::max(kRoom, (end - begin) * kPanel);
    if (int64_t(list_.size()) < room) list_.resize(size_t(room));
    Job job = job_of(kernel_, packed_queries_[size_t(g)].get(), packed_.block(b), first_of(g), first_of(g + 1), start,
                     first, last);
    job.list = list_.data();
    job.room = room;
    int64_t listed = 0;
    while (job.first_panel < job.panels) {
      job.listed = 0;
      job.first_panel = kernel_.scan(job);
      decide(begin, start, job);
      listed += job.listed;
    }
    const double pairs = double(end - begin) * double(last - first);
    if (exact_ && double(listed) > worthwhile_share(double(packed_.width)) * pairs) crowd(g);
  }

  // From now on the exact kernel has group g.
  void crowd(int64_t g) {
    std::vector<Lengths> unused(size_t(exact_->group));
    exact_queries_[size_t(g)] = pack_queries(*exact_, g, unused.data());
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
  const Kernel* const exact_;  // null: this machine has none
  const Rows& rows_;
  const Targets& targets_;
  const int64_t first_query_, last_query_, groups_, first_target_;
  const Rounding rounding_;
  Rescore rescore_;
  Chains chains_;
  std::vector<Units> packed_queries_;  // a group
  std::vector<Units> exact_queries_;   // a group that a filter does not suit, else null
  Units exact_panels_;
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
  const int64_t chunk = kQueries / packed.kernel.group * packed.kernel.group,
                chunks = (targets.queries + chunk - 1) / chunk;
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

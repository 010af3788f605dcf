#include "top_k.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "margin.h"
#include "rescore.h"
#include "threads.h"

namespace karma {

namespace {

constexpr int64_t kGroups = 20;           // of queries a task
constexpr int64_t kPoolBytes = 64 << 20;  // of their candidates
constexpr int64_t kRoom = 1 << 12;
constexpr int kTasksPerThread = 2;
constexpr double kLowest = -std::numeric_limits<double>::infinity();

struct Candidate {
  double score, margin;  // margin 0: the defined score
  int64_t item;
};

bool better(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score > b.score : a.item < b.item;
}

// The candidates of one query.
class Pool {
 public:
  static int64_t most(int64_t k) { return 2 * k + 256; }

  void start(int64_t k, float worst) {
    k_ = k;
    floor_ = worst == -INFINITY ? kLowest : double(worst);
  }

  // No item with a score below this can be among the k best.
  double floor() const { return floor_; }

  template <class Exact>
  void add(const Candidate& one, const Exact& exact) {
    pool_.push_back(one);
    if (int64_t(pool_.size()) < most(k_)) return;
    drop();
    if (int64_t(pool_.size()) > k_ + k_ / 2 + 128) finish(exact);  // margins wider than the scores are apart
  }

  // Only the k best remain, in order, with defined scores.
  template <class Exact>
  void finish(const Exact& exact) {
    if (int64_t(pool_.size()) > k_) drop();
    exact(pool_);
    const size_t kept = std::min(pool_.size(), size_t(k_));
    std::partial_sort(pool_.begin(), pool_.begin() + int64_t(kept), pool_.end(), better);
    pool_.resize(kept);
    if (int64_t(kept) == k_) floor_ = std::max(floor_, pool_.back().score);
  }

  const std::vector<Candidate>& kept() const { return pool_; }

 private:
  void drop() {  // raises the floor to the k-th of the surely reached scores
    lows_.clear();
    for (const Candidate& c : pool_) lows_.push_back(c.score - c.margin);
    std::nth_element(lows_.begin(), lows_.begin() + k_ - 1, lows_.end(), std::greater<double>());
    floor_ = std::max(floor_, lows_[size_t(k_ - 1)]);
    pool_.erase(
        std::remove_if(pool_.begin(), pool_.end(), [&](const Candidate& c) { return c.score + c.margin < floor_; }),
        pool_.end());
  }

  int64_t k_ = 0;
  double floor_ = kLowest;
  std::vector<Candidate> pool_;
  std::vector<double> lows_;
};

class Task {
 public:
  Task(const Packed& packed, const Rows& rows, const float* queries, const int64_t* first, const int64_t* left_out,
       const Best& best, int64_t first_query, int64_t last_query)
      : packed_(packed),
        rows_(rows),
        queries_(queries),
        first_(first),
        left_out_(left_out),
        best_(best),
        first_query_(first_query),
        count_(last_query - first_query),
        rounding_(packed.width),
        longest_(packed.most().full),
        rescore_(*packed.kernel.basics, rows) {
    const Kernel& kernel = packed.kernel;
    const int64_t groups = (count_ + kernel.group - 1) / kernel.group;
    lengths_.resize(size_t(groups * kernel.group));
    pools_.resize(size_t(count_));
    for (int64_t q = first_query; q < last_query; ++q) vectors_.push_back(queries + q * packed.width);
    units_ = allocate(groups * kernel.group * packed.steps);
    for (int64_t g = 0; g < groups; ++g)
      pack_group(kernel, queries, first_query + g * kernel.group,
                 std::min<int64_t>(kernel.group, count_ - g * kernel.group), packed.width, group_units(g),
                 &lengths_[size_t(g * kernel.group)]);
    first_of_.resize(size_t(kernel.group) + 1);
    above_.resize(size_t(kernel.group));
    high_.resize(size_t(kernel.group));
    low_.resize(size_t(kernel.group));
    list_.resize(size_t(std::max<int64_t>(kRoom, kernel.group * kPanel)));
  }

  // What is below the floor of what was found before need not be looked at.
  void start() {
    for (int64_t q = 0; q < count_; ++q)
      pools_[size_t(q)].start(best_.k, best_.scores[(first_query_ + q + 1) * best_.k - 1]);
  }

  void run(int64_t first_block, int64_t last_block) {
    const int64_t group = packed_.kernel.group;
    for (int64_t b = first_block; b < last_block; ++b)
      for (int64_t g = 0; g * group < count_; ++g) compare(g, b);
    for (int64_t q = 0; q < count_; ++q) pools_[size_t(q)].finish([&](auto& pool) { decide(q, pool); });
  }

  // Into the common result.
  void merge() {
    std::vector<Candidate> both;
    for (int64_t q = 0; q < count_; ++q) {
      float* scores = best_.scores + (first_query_ + q) * best_.k;
      int64_t* items = best_.items + (first_query_ + q) * best_.k;
      both = pools_[size_t(q)].kept();
      for (int64_t i = 0; i < best_.k && items[i] >= 0; ++i) both.push_back({double(scores[i]), 0, items[i]});
      const size_t kept = std::min(both.size(), size_t(best_.k));
      std::partial_sort(both.begin(), both.begin() + int64_t(kept), both.end(), better);
      for (size_t i = 0; i < kept; ++i) scores[i] = float(both[i].score), items[i] = both[i].item;
    }
  }

 private:
  uint32_t* group_units(int64_t g) { return units_.get() + g * packed_.kernel.group * packed_.steps; }

  // Puts defined scores in place of those of a filter.
  void decide(int64_t q, std::vector<Candidate>& pool) {
    constexpr size_t n = 8;
    const Basics& basics = *packed_.kernel.basics;
    const size_t width = size_t(rows_.width);
    if (rows_.storage != Storage::float32) copies_.resize(n * width);
    Candidate* waiting[n];
    const float* x[n];
    float scores[n];
    size_t count = 0;
    const auto flush = [&] {
      basics.chains_of_one(queries_ + (first_query_ + q) * rows_.width, x, int64_t(count), rows_.width, scores);
      for (size_t i = 0; i < count; ++i) waiting[i]->score = scores[i], waiting[i]->margin = 0;
      count = 0;
    };
    for (Candidate& c : pool) {
      if (c.margin == 0) continue;
      waiting[count] = &c;
      x[count] = rows_.floats(basics, c.item, copies_.empty() ? nullptr : copies_.data() + count * width);
      if (++count == n) flush();
    }
    flush();
  }

  bool is_left_out(int64_t query, int64_t item) const {
    return first_ && std::binary_search(left_out_ + first_[query], left_out_ + first_[query + 1], item);
  }

  // One group and one block.
  void compare(int64_t g, int64_t b) {
    const Kernel& kernel = packed_.kernel;
    const Lengths& block = packed_.blocks[size_t(b)];
    const int64_t base = g * kernel.group, queries = std::min<int64_t>(kernel.group, count_ - base);
    Job job{};
    job.queries = group_units(g);
    job.items = packed_.block(b);
    job.valid = packed_.items_of(b);
    job.panels = (job.valid + kPanel - 1) / kPanel;
    job.panel_units = packed_.panel_units;
    job.steps = packed_.steps;
    job.first_target = first_of_.data();
    job.high = high_.data();
    job.low = low_.data();
    job.above = above_.data();
    job.list = list_.data();
    job.room = int64_t(list_.size());
    const int64_t start = packed_.begin + b * packed_.block_items();
    for (int64_t i = 0; i <= kernel.group; ++i) first_of_[size_t(i)] = int32_t(std::min(i, queries));
    while (job.first_panel < job.panels) {
      for (int64_t i = 0; i < queries; ++i) {
        const Lengths& query = lengths_[size_t(base + i)];
        const double margin = kernel.exact ? 0 : rounding_.of_packed(query, block);
        const double floor = std::max(pools_[size_t(base + i)].floor(), -3e38);
        low_[size_t(i)] = band(kernel, floor, margin, query, block).low;
        if (kernel.precision == Precision::int8) {
          high_[size_t(i)].whole = std::numeric_limits<int32_t>::max();
        } else {
          high_[size_t(i)].real = INFINITY;
        }
      }
      job.listed = 0;
      job.first_panel = kernel.scan(job);
      take(base, start, job);
    }
  }

  // Listed pairs become candidates.
  void take(int64_t base, int64_t start, const Job& job) {
    const float* scores = nullptr;
    if (!packed_.kernel.exact) scores = rescore_(job.list, job.listed, vectors_.data() + base, start, job.valid);
    for (int64_t n = 0; n < job.listed; ++n) {
      const Near& near = job.list[n];
      const int64_t q = base + near.target, item = start + near.item;
      const double margin = scores ? rounding_.of_dot(lengths_[size_t(q)].full, longest_) : 0;
      const double score = scores ? scores[n] : near.score.real;
      Pool& pool = pools_[size_t(q)];
      if (score + margin < pool.floor() || is_left_out(first_query_ + q, item)) continue;
      pool.add({score, margin, item}, [&](auto& candidates) { decide(q, candidates); });
    }
  }

  const Packed& packed_;
  const Rows& rows_;
  const float* queries_;
  const int64_t *first_, *left_out_;
  const Best& best_;
  const int64_t first_query_, count_;
  const Rounding rounding_;
  const double longest_;
  Rescore rescore_;
  Units units_;
  std::vector<Lengths> lengths_;
  std::vector<const float*> vectors_;  // a query
  std::vector<Pool> pools_;
  std::vector<int32_t> first_of_;
  std::vector<int64_t> above_;
  std::vector<Bound> high_, low_;
  std::vector<Near> list_;
  std::vector<float> copies_;
};

}  // namespace

void top_k(const Packed& packed, const Rows& rows, const float* queries, const int64_t* first, const int64_t* left_out,
           const Best& best, int threads) {
  const int64_t group_bytes = packed.kernel.group * Pool::most(best.k) * int64_t(sizeof(Candidate));
  const int64_t groups = std::max<int64_t>(1, std::min(kGroups, kPoolBytes / group_bytes));
  const int64_t chunk = groups * packed.kernel.group, chunks = (best.queries + chunk - 1) / chunk;
  const int64_t blocks = int64_t(packed.blocks.size());
  if (chunks == 0 || blocks == 0) return;
  const int64_t parts = std::max<int64_t>(1, std::min(blocks, (kTasksPerThread * threads + chunks - 1) / chunks));
  std::mutex guard;
  parallel(chunks * parts, threads, [&](int64_t number, int) {
    const int64_t c = number / parts, part = number % parts;
    Task task(packed, rows, queries, first, left_out, best, c * chunk, std::min(best.queries, (c + 1) * chunk));
    {
      const std::lock_guard<std::mutex> lock(guard);
      task.start();
    }
    task.run(part * blocks / parts, (part + 1) * blocks / parts);
    const std::lock_guard<std::mutex> lock(guard);
    task.merge();
  });
}

}  // namespace karma

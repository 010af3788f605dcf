#include "top_k.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
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
constexpr int64_t kTasksPerThread = 2;

// A score and an item as one number: the higher score is the larger number, and of equal scores the lower item.
using Key = uint64_t;

uint32_t rising(float score) {
  const float zero_once = score + 0.0f;  // -0 is 0
  int32_t bits;
  std::memcpy(&bits, &zero_once, 4);
  return uint32_t(bits) ^ (uint32_t(bits >> 31) | 0x80000000u);
}

float score_of(uint32_t rising) {
  const uint32_t bits = rising & 0x80000000u ? rising ^ 0x80000000u : ~rising;
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}

Key key_of(float score, int64_t item) { return Key(rising(score)) << 32 | (0xffffffffu - uint32_t(item)); }
float score_of(Key key) { return score_of(uint32_t(key >> 32)); }
int64_t item_of(Key key) { return 0xffffffffu - uint32_t(key); }

// The candidates of one query. Items count from the first that is packed.
class Pool {
 public:
  static int64_t most(int64_t k) { return 2 * k + 256; }

  // worst: the last of k items that were found before, or -infinity. margin: of scores that will be added.
  void start(int64_t k, float worst, double margin) { k_ = size_t(k), floor_ = double(worst), margin_ = margin; }

  // No item with a score below this can be among the k best.
  double floor() const { return floor_; }
  double margin() const { return margin_; }

  // exact(keys, count) puts defined scores into keys.
  template <class Exact>
  void add(float score, int64_t item, const Exact& exact) {
    keys_.push_back(key_of(score, item));
    if (keys_.size() < size_t(most(int64_t(k_)))) return;
    drop();
    if (keys_.size() <= k_ + k_ / 2 + 128) return;
    decide(exact);  // margins are wider than the scores are apart
    keep_best();
  }

  // Only the k best remain, best first, with defined scores.
  template <class Exact>
  void finish(const Exact& exact) {
    if (keys_.size() > k_) drop();
    decide(exact);
    if (keys_.size() > k_) keep_best();
    std::sort(keys_.begin(), keys_.end(), std::greater<Key>());
  }

  const std::vector<Key>& kept() const { return keys_; }

 private:
  template <class Exact>
  void decide(const Exact& exact) {
    if (margin_ > 0) exact(keys_.data() + decided_, keys_.size() - decided_);
    decided_ = keys_.size();
  }

  void keep_best() {
    std::nth_element(keys_.begin(), keys_.begin() + int64_t(k_ - 1), keys_.end(), std::greater<Key>());
    keys_.resize(k_);
    decided_ = k_;
    floor_ = std::max(floor_, double(score_of(keys_.back())));
  }

  double margin_of(size_t i) const { return i < decided_ ? 0 : margin_; }

  void drop() {  // raises the floor to the k-th of the surely reached scores
    lows_.clear();
    for (size_t i = 0; i < keys_.size(); ++i)
      lows_.push_back(rising(float_below(double(score_of(keys_[i])) - margin_of(i))));
    std::nth_element(lows_.begin(), lows_.begin() + int64_t(k_ - 1), lows_.end(), std::greater<uint32_t>());
    floor_ = std::max(floor_, double(score_of(lows_[k_ - 1])));
    size_t kept = 0, decided = 0;
    for (size_t i = 0; i < keys_.size(); ++i) {
      if (double(score_of(keys_[i])) + margin_of(i) < floor_) continue;
      decided += i < decided_;
      keys_[kept++] = keys_[i];
    }
    keys_.resize(kept);
    decided_ = decided;
  }

  size_t k_ = 0, decided_ = 0;  // the first of keys_ have defined scores
  double floor_ = 0, margin_ = 0;
  std::vector<Key> keys_;
  std::vector<uint32_t> lows_;
};

class Task {
 public:
  Task(const Packed& packed, const Rows& rows, const float* queries, const int64_t* first, const int64_t* left_out,
       const Best& best, int64_t k, int64_t first_query, int64_t last_query)
      : packed_(packed),
        rows_(rows),
        queries_(queries),
        first_(first),
        left_out_(left_out),
        best_(best),
        k_(k),
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
      pools_[size_t(q)].start(k_, best_.scores[(first_query_ + q + 1) * best_.k - 1], margin_of(q));
  }

  void run(int64_t first_block, int64_t last_block) {
    const int64_t group = packed_.kernel.group;
    for (int64_t b = first_block; b < last_block; ++b)
      for (int64_t g = 0; g * group < count_; ++g) compare(g, b);
    for (int64_t q = 0; q < count_; ++q)
      pools_[size_t(q)].finish([&](Key* keys, size_t count) { decide(q, keys, count); });
  }

  // Into the common result.
  void merge() {
    struct Item {
      float score;
      int64_t item;
    };
    std::vector<Item> before, found, both;
    for (int64_t q = 0; q < count_; ++q) {
      float* scores = best_.scores + (first_query_ + q) * best_.k;
      int64_t* items = best_.items + (first_query_ + q) * best_.k;
      before.clear(), found.clear(), both.clear();
      for (int64_t i = 0; i < best_.k && items[i] >= 0; ++i) before.push_back({scores[i], items[i]});
      for (const Key key : pools_[size_t(q)].kept()) found.push_back({score_of(key), packed_.begin + item_of(key)});
      std::merge(
          before.begin(), before.end(), found.begin(), found.end(), std::back_inserter(both),
          [](const Item& a, const Item& b) { return a.score != b.score ? a.score > b.score : a.item < b.item; });
      for (size_t i = 0; i < std::min(both.size(), size_t(best_.k)); ++i)
        scores[i] = both[i].score, items[i] = both[i].item;
    }
  }

 private:
  uint32_t* group_units(int64_t g) { return units_.get() + g * packed_.kernel.group * packed_.steps; }

  // Puts defined scores in place of those of a filter.
  void decide(int64_t q, Key* keys, size_t count) {
    constexpr size_t n = 8;
    const Basics& basics = *packed_.kernel.basics;
    const size_t width = size_t(rows_.width);
    if (rows_.storage != Storage::float32) copies_.resize(n * width);
    const float* x[n];
    float scores[n];
    for (size_t first = 0; first < count; first += n) {
      const size_t some = std::min(n, count - first);
      for (size_t i = 0; i < some; ++i)
        x[i] = rows_.floats(basics, packed_.begin + item_of(keys[first + i]),
                            copies_.empty() ? nullptr : copies_.data() + i * width);
      basics.chains_of_one(queries_ + (first_query_ + q) * rows_.width, x, int64_t(some), rows_.width, scores);
      for (size_t i = 0; i < some; ++i) keys[first + i] = key_of(scores[i], item_of(keys[first + i]));
    }
  }

  // Of float32 scores of a query that come from a filter.
  double margin_of(int64_t q) const {
    return packed_.kernel.exact ? 0 : rounding_.of_dot(lengths_[size_t(q)].full, longest_);
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
      const float score = scores ? scores[n] : near.score.real;
      Pool& pool = pools_[size_t(q)];
      if (double(score) + pool.margin() < pool.floor() || is_left_out(first_query_ + q, item)) continue;
      pool.add(score, item - packed_.begin, [&](Key* keys, size_t count) { decide(q, keys, count); });
    }
  }

  const Packed& packed_;
  const Rows& rows_;
  const float* queries_;
  const int64_t *first_, *left_out_;
  const Best& best_;
  const int64_t k_, first_query_, count_;  // k_: of the best, as many as are packed
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
  const int64_t k = std::min(best.k, packed.end - packed.begin);
  if (best.queries == 0 || packed.blocks.empty()) return;
  const int64_t group_bytes = packed.kernel.group * Pool::most(k) * int64_t(sizeof(Key) + sizeof(uint32_t));
  const int64_t groups = std::max<int64_t>(1, std::min(kGroups, kPoolBytes / group_bytes));
  const int64_t chunk = groups * packed.kernel.group, chunks = (best.queries + chunk - 1) / chunk;
  const int64_t blocks = int64_t(packed.blocks.size());
  const int64_t parts = std::max<int64_t>(1, std::min(blocks, (kTasksPerThread * threads + chunks - 1) / chunks));
  std::mutex guard;
  parallel(chunks * parts, threads, [&](int64_t number, int) {
    const int64_t c = number / parts, part = number % parts;
    Task task(packed, rows, queries, first, left_out, best, k, c * chunk, std::min(best.queries, (c + 1) * chunk));
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

// All of csrc but the Python module, for the sanitizers: every kernel of this machine, several callers at once,
// numbers that cannot be ranked, and memory that runs out. No interpreter takes part, so all code that runs is
// instrumented.
#include "checks.h"

#include <atomic>
#include <new>

#include "bits.h"
#include "threads.h"

namespace {

std::atomic<int64_t> allocations_left{std::numeric_limits<int64_t>::max()};

void check_callers(const karma::Kernel& kernel) {
  const Data data({50, 700, 24, 2, karma::Storage::float16, false}, 1);
  const karma::Packed packed(kernel, data.rows, 0, data.shape.items, 3);
  const Counted expected = counted(data, 0, data.shape.items, false);
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i)
    callers.emplace_back([&] {
      Counted found(data);
      karma::count_ranks(packed, data.rows, data.targets(), 0, data.shape.items, found.greater.data(),
                         found.equal.data(), 3);
      require(found == expected, "counts of several callers", kernel.name);
      check_top_k(kernel, data, 5, true, 3);
    });
  for (std::thread& caller : callers) caller.join();
}

void check_bad_numbers(const karma::Kernel& kernel) {
  const int64_t count = 300, width = 5;
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    std::vector<float> x(size_t(count * width), -12582913.0f);  // what rounds to whole numbers must not overflow on it
    x[size_t(250 * width + 4)] = bad;
    bool refused = false;
    try {
      const karma::Packed packed(kernel, {x.data(), karma::Storage::float32, count, width}, 0, count, 3);
    } catch (const karma::NotFinite& error) {
      refused = std::strstr(error.what(), "row 250 ");
    }
    require(refused, "a bad number is refused, with its row", kernel.name);
  }
}

// Each allocation in turn fails: the caller gets bad_alloc or, where a thread less will do, the right counts.
void check_memory_runs_out(const karma::Kernel& kernel) {
  const Data data({200, 3000, 4, 1, karma::Storage::float16, true}, 1);
  const karma::Packed packed(kernel, data.rows, 0, data.shape.items, 1);
  Counted expected(data);
  karma::count_ranks(packed, data.rows, data.targets(), 0, data.shape.items, expected.greater.data(),
                     expected.equal.data(), 1);
  bool refused = true;
  for (int64_t n = 0; n < 60 || refused; n += 1 + n / 16) {
    Counted found(data);
    refused = false;
    allocations_left = n;
    try {
      karma::count_ranks(packed, data.rows, data.targets(), 0, data.shape.items, found.greater.data(),
                         found.equal.data(), 4);
    } catch (const std::bad_alloc&) {
      refused = true;
    }
    allocations_left = std::numeric_limits<int64_t>::max();
    require(refused || found == expected, "counts after memory ran out", kernel.name);
  }
}

// All numbers of float16, also where the CPU takes subnormal numbers for zero.
void check_halves() {
  std::vector<float> expected, found(1 << 16);
  for (int x = 0; x < 1 << 16; ++x) expected.push_back(half_value(uint16_t(x), false));
#ifdef __SSE2__
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
#endif
  for (int x = 0; x < 1 << 16; ++x) found[size_t(x)] = half(uint16_t(x));
#ifdef __SSE2__
  _mm_setcsr(before);
#endif
  for (int x = 0; x < 1 << 16; ++x)  // beyond 0x7c00 are infinity and NaN
    require((x & 0x7fff) < 0x7c00   ? bits_of(found[size_t(x)]) == bits_of(expected[size_t(x)])
            : (x & 0x7fff) > 0x7c00 ? std::isnan(found[size_t(x)])
                                    : std::isinf(found[size_t(x)]) && std::signbit(found[size_t(x)]) == (x > 0x7fff),
            "the value of a float16", "half");
}

}  // namespace

void* operator new(size_t bytes) {
  void* p = allocations_left.fetch_sub(1) > 0 ? std::malloc(bytes) : nullptr;
  if (!p) throw std::bad_alloc();
  return p;
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

int main() {
  check_halves();
  for (const karma::Kernel* kernel : karma::kernels()) {
    check_kernel(*kernel, 3);
    check_callers(*kernel);
    check_bad_numbers(*kernel);
    check_memory_runs_out(*kernel);
    std::printf("%s\n", kernel->name);
  }
}

#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "threads.h"

namespace karma {

namespace {

constexpr int64_t kBlockBytes = 384 << 10;  // stays in a second-level cache beside a group of queries
constexpr int64_t kBlockRows = 512 << 10;   // likewise the float32 rows that a filter leaves undecided
constexpr int64_t kBlockItems = 4096;
constexpr double kLargest = 1e30, kSmallest = 1e-30;  // of vectors that can be rotated
constexpr double kHopeless = 1e300;

int64_t per_unit(Precision precision) {
  return precision == Precision::float32 ? 1 : precision == Precision::bfloat16 ? 2 : 4;
}

// What int8 copies are made of: the row rotated, so that a few large numbers do not set the scale for all the others.
void rotated(const Basics& basics, const float* row, int64_t width, float* out) {
  std::memcpy(out, row, size_t(width) * 4);
  basics.rotate(out, width);
}

// Tiny vectors become zeros; that is then their error.
double scale_for(float largest) { return largest > float(kSmallest) ? double(largest / 127) : 1.0; }

// One row as units; returns its lengths. For int8 `row` is rotated and `scale` known; shift and sum as in
// Basics::to_int8.
Lengths row_units(const Kernel& kernel, const float* row, int64_t width, double scale, int shift, uint32_t* out,
                  int64_t units, int32_t* sum) {
  const Basics& basics = *kernel.basics;
  double squares[3];
  if (kernel.precision == Precision::float32) {
    std::memcpy(out, row, size_t(width) * 4);
    std::memset(out + width, 0, size_t(units - width) * 4);
    squares[0] = squares[1] = basics.square(row, width);
    squares[2] = 0;
  } else if (kernel.precision == Precision::bfloat16) {
    basics.to_bfloat16(row, width, out, units, squares);
  } else {
    basics.to_int8(row, width, float(scale), shift, out, units, squares, sum);
  }
  Lengths found;
  found.full = std::sqrt(squares[0]);
  found.stored = std::sqrt(squares[1]);
  found.error = std::sqrt(squares[2]);
  found.scale = scale;
  if (kernel.precision == Precision::int8) {
    // Roundings of a number: 15 sums or differences and 2 of the shrinking, twice (or 16 and 2, once), and 3 in
    // to_int8.
    const double slack = 48 * 0x1p-24 * found.full;
    found.full += slack;
    found.stored += slack;
    found.error += slack;
  }
  return found;
}

// Lengths for a row that a kernel has no good copy of: rotated, it may overflow or lose bits. The bound then leaves
// every pair to float32.
Lengths hopeless(const Basics& basics, const float* row, int64_t width, double scale) {
  const double full = std::sqrt(basics.square(row, width));
  if (full == 0) return {0, 0, 0, scale};
  return {full, 1e41, kHopeless, scale};  // stored: longer than any copy
}

bool usable(const Kernel& kernel, const Lengths& one) {
  if (kernel.precision != Precision::int8) return std::isfinite(one.full);
  return one.full >= kSmallest && one.full <= kLargest;
}

// kPanel rows -> out[unit][row]. Line by line: rows often lie powers of two apart, where a cache holds few at a time.
template <class Unit>
void transpose(const Unit* const* rows, int64_t units, Unit* out) {
  constexpr int64_t line = 16;
  for (int64_t first = 0; first < units; first += line)
    for (int64_t i = 0; i < kPanel; ++i)
      for (int64_t s = first; s < std::min(first + line, units); ++s) out[s * kPanel + i] = rows[i][s];
}

void widen(Lengths& most, const Lengths& one) {
  most.full = std::max(most.full, one.full);
  most.stored = std::max(most.stored, one.stored);
  most.error = std::max(most.error, one.error);
}

}  // namespace

Units allocate(int64_t units) {
  constexpr size_t huge = 2 << 20;  // of a page, of which large copies need fewer
  const size_t least = size_t(std::max<int64_t>(units, 1)) * 4, align = least < 2 * huge ? 64 : huge;
  const size_t bytes = (least + align - 1) / align * align;
  void* p = std::aligned_alloc(align, bytes);
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (align == huge) madvise(p, bytes, MADV_HUGEPAGE);  // a wish; nothing is lost if it is not granted
#endif
  return Units(static_cast<uint32_t*>(p));
}

int64_t steps_of(const Kernel& kernel, int64_t width) {
  const int64_t per = per_unit(kernel.precision), units = (width + per - 1) / per;
  return (units + kernel.multiple - 1) / kernel.multiple * kernel.multiple;
}

int64_t panel_units_of(const Kernel& kernel, int64_t width) {
  return (steps_of(kernel, width) + (kernel.precision == Precision::int8)) * kPanel;
}

Packed::Packed(const Kernel& k, const Rows& rows, int64_t first, int64_t last, int threads)
    : kernel(k),
      begin(first),
      end(last),
      width(rows.width),
      steps(steps_of(k, rows.width)),
      panel_units(panel_units_of(k, rows.width)) {
  block_panels = std::min(kBlockBytes / (panel_units * 4), kBlockItems / kPanel);
  if (!k.exact) block_panels = std::min(block_panels, kBlockRows / (width * 4 * kPanel));
  block_panels = std::max<int64_t>(block_panels, 1);
  const int64_t count = (panels() + block_panels - 1) / block_panels;
  blocks.resize(size_t(count));
  units_ = allocate(panels() * panel_units);
  const Basics& basics = *kernel.basics;
  const bool int8 = kernel.precision == Precision::int8;
  struct Scratch {
    Units panel;
    std::vector<float> copy, turned;
  };
  std::vector<Scratch> scratches(size_t(std::clamp<int64_t>(threads, 1, std::max<int64_t>(count, 1))));
  parallel(count, threads, [&](int64_t b, int thread) {
    Scratch& scratch = scratches[size_t(thread)];
    if (!scratch.panel) {
      scratch.panel = allocate(kPanel * steps);
      if (rows.storage != Storage::float32) scratch.copy.resize(size_t(width));
      if (int8) scratch.turned.resize(size_t(block_items() * width));
    }
    std::vector<float>&copy = scratch.copy, &turned = scratch.turned;
    uint32_t* one_panel = scratch.panel.get();
    const int64_t start = begin + b * block_items(), stop = start + items_of(b);
    double scale = 1;
    if (int8) {
      for (int64_t i = start; i < stop; ++i)
        rotated(basics, rows.floats(basics, i, copy.data()), width, &turned[size_t((i - start) * width)]);
      const float most = basics.largest(turned.data(), (stop - start) * width);
      scale = scale_for(most < float(kLargest) ? most : 1);
    }
    Lengths& found = blocks[size_t(b)];
    for (int64_t panel = start; panel < stop; panel += kPanel) {
      uint32_t* out = units_.get() + (panel - begin) / kPanel * panel_units;
      int32_t sums[kPanel] = {};
      for (int64_t i = 0; i < kPanel; ++i) {
        uint32_t* units = one_panel + i * steps;
        if (panel + i >= stop) {
          std::memset(units, 0, size_t(steps) * 4);
          continue;
        }
        const float* row =
            int8 ? &turned[size_t((panel + i - start) * width)] : rows.floats(basics, panel + i, copy.data());
        Lengths one = row_units(kernel, row, width, scale, 0, units, steps, &sums[i]);
        if (!usable(kernel, one)) {
          one = hopeless(basics, rows.floats(basics, panel + i, copy.data()), width, scale);
          if (!std::isfinite(one.full)) throw NotFinite("items", panel + i);
        }
        widen(found, one);
      }
      if (int8) {
        for (int i = 0; i < kPanel; ++i) *out++ = uint32_t(-128 * sums[i]);
      }
      const uint32_t* units[kPanel];
      for (int64_t i = 0; i < kPanel; ++i) units[i] = one_panel + i * steps;
      transpose(units, steps, out);
    }
    found.scale = scale;
  });
}

Lengths Packed::most() const {
  Lengths found;
  for (const Lengths& b : blocks) widen(found, b);
  return found;
}

void pack_exact(const Kernel& kernel, const Rows& rows, int64_t first, int64_t last, uint32_t* out) {
  std::vector<float> copies(rows.storage == Storage::float32 ? 0 : size_t(kPanel * rows.width));
  const float* row[kPanel];
  for (int64_t i = 0; i < kPanel; ++i)
    row[i] = rows.floats(*kernel.basics, std::min(first + i, last - 1),
                         copies.empty() ? nullptr : &copies[size_t(i * rows.width)]);
  transpose(row, rows.width, reinterpret_cast<float*>(out));
}

void pack_group(const Kernel& kernel, const float* queries, int64_t first, int64_t count, int64_t width, uint32_t* out,
                Lengths* lengths) {
  const int64_t steps = steps_of(kernel, width), group = kernel.group;
  const Basics& basics = *kernel.basics;
  const Units one = allocate(steps);
  std::vector<float> turned(kernel.precision == Precision::int8 ? size_t(width) : 0);
  for (int64_t i = 0; i < group; ++i) {
    if (i < count) {
      const float* const original = queries + (first + i) * width;
      const float* q = original;
      double scale = 1;
      if (!turned.empty()) {
        rotated(basics, q, width, turned.data());
        q = turned.data();
        const float most = basics.largest(q, width);
        scale = scale_for(most < float(kLargest) ? most : 1);
      }
      int32_t sum;
      lengths[i] = row_units(kernel, q, width, scale, 128, one.get(), steps, &sum);
      if (!usable(kernel, lengths[i])) {
        lengths[i] = hopeless(basics, original, width, scale);
        if (!std::isfinite(lengths[i].full)) throw NotFinite("queries", first + i);
      }
    } else {
      std::memset(one.get(), 0, size_t(steps) * 4);
    }
    for (int64_t s = 0; s < steps; ++s) out[kernel.by_row ? i * steps + s : s * group + i] = one[size_t(s)];
  }
}

}  // namespace karma

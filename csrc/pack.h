// Catalogue rows as the caller has them, and packed copies that the kernels stream.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel.h"

namespace karma {

struct Rows {  // row-major
  const void* data;
  Storage storage;
  int64_t count, width;

  const void* at(int64_t row) const {
    const int64_t bytes = storage == Storage::float32 ? 4 : 2;
    return static_cast<const char*>(data) + row * width * bytes;
  }
  // The row itself if it is float32, else a copy in `buffer`.
  const float* floats(const Basics& basics, int64_t row, float* buffer) const {
    if (storage == Storage::float32) return static_cast<const float*>(at(row));
    basics.to_float(storage, at(row), width, buffer);
    return buffer;
  }
};

struct NotFinite : std::runtime_error {
  NotFinite(const char* what, int64_t row)
      : std::runtime_error(std::string(what) + ": NaN or infinite values in row " + std::to_string(row) +
                           " cannot be ranked; the model that made them has diverged") {}
};

struct Lengths {  // of a vector, of its packed copy, of their difference; or the largest of several vectors
  double full = 0, stored = 0, error = 0;
  double scale = 1;  // of int8
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Units = std::unique_ptr<uint32_t[], Free>;
Units allocate(int64_t units);  // aligned to a cache line, not initialised

int64_t steps_of(const Kernel& kernel, int64_t width);        // units of a packed row
int64_t panel_units_of(const Kernel& kernel, int64_t width);  // from one panel to the next

// Rows begin..end of a catalogue in panels, some panels a block: the piece that is compared at once with all queries.
class Packed {
 public:
  Packed(const Kernel& kernel, const Rows& rows, int64_t begin, int64_t end, int threads);

  const Kernel& kernel;
  const int64_t begin, end, width, steps, panel_units;
  int64_t block_panels;
  std::vector<Lengths> blocks;  // the largest of each block

  int64_t block_items() const { return block_panels * kPanel; }
  const uint32_t* block(int64_t i) const { return units_.get() + i * block_panels * panel_units; }
  int64_t items_of(int64_t block) const { return std::min(block_items(), end - begin - block * block_items()); }
  int64_t bytes() const { return panels() * panel_units * 4; }
  Lengths most() const;  // the largest of all blocks

 private:
  int64_t panels() const { return (end - begin + kPanel - 1) / kPanel; }
  Units units_;
};

// At most kPanel rows as one panel of a kernel with defined scores.
void pack_exact(const Kernel& kernel, const Rows& rows, int64_t first, int64_t last, uint32_t* out);

// Up to kernel.group queries for Kernel::scan; `out` takes kernel.group * steps units. count lengths are written.
void pack_group(const Kernel& kernel, const float* queries, int64_t first, int64_t count, int64_t width, uint32_t* out,
                Lengths* lengths);

}  // namespace karma

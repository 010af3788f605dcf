#include "kernel.h"

#ifdef KARMA_AMX
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16,bmi,popcnt")
#include "avx512.h"
#include "scan.h"

namespace {

// Four tile registers of 16 x 16 sums: 32 queries by the 32 items of a panel. A step of the instruction takes 16 units
// (32 numbers) of 16 rows of queries, and of items 16 lines of 16 units, just as they are packed.
struct Tile {
  static constexpr int group = 32;
  static constexpr int lines = 16, line_bytes = 64;

  Tile() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.bytes[i] = line_bytes, shape.rows[i] = lines;
    asm volatile("" ::: "memory");  // GCC 12 knows of 8 of the 64 bytes that are read here
    _tile_loadconfig(&shape);
  }
  ~Tile() { _tile_release(); }
  Tile(const Tile&) = delete;

  template <class Row>
  KARMA_INLINE void compute(const uint32_t* q, const uint32_t* x, int64_t steps, Row row) {
    alignas(64) float sums[group][karma::kPanel];
    const int64_t query_stride = steps * 4;
    constexpr int item_stride = karma::kPanel * 4;
    const uint32_t* lower = q + 16 * steps;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; s += lines) {
      const uint32_t* items = x + s * karma::kPanel;
      _tile_loadd(4, q + s, query_stride);
      _tile_loadd(5, lower + s, query_stride);
      _tile_loadd(6, items, item_stride);
      _tile_loadd(7, items + 16, item_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, &sums[0][0], item_stride);
    _tile_stored(1, &sums[0][16], item_stride);
    _tile_stored(2, &sums[16][0], item_stride);
    _tile_stored(3, &sums[16][16], item_stride);
    for (int i = 0; i < group; ++i) row(i, 0, Floats{_mm512_load_ps(sums[i]), _mm512_load_ps(sums[i] + 16)});
  }
};

}  // namespace

namespace karma {
extern const Basics kBasicsAvx512;
const Kernel kAmxBfloat16 = {"amx_bf16", Precision::bfloat16, false,          Tile::group,
                             true,       Tile::lines,         &kBasicsAvx512, scan<Tile>};
}  // namespace karma
#endif

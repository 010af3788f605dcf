// What one instruction set provides: scores of a group of queries against panels of items, and the arithmetic around.
#pragma once

#include <cstdint>

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || __FINITE_MATH_ONLY__
#error "karma_fast counts roundings and looks for NaN: build it without -ffast-math and what that stands for"
#endif

#define KARMA_INLINE inline __attribute__((always_inline))

namespace karma {

constexpr int kPanel = 32;  // items side by side in packed storage, for every instruction set

enum class Storage { float32, float16, bfloat16 };  // of the rows that the caller gives
enum class Precision { float32, bfloat16, int8 };   // of the packed copies; all come as units of four bytes

union Bound {  // whole: kernels on int8 compare their integer sums
  float real;
  int32_t whole;
};

struct Near {
  int32_t target;  // of the job
  int32_t item;    // from the first of the run
  Bound score;
};

// One group of packed queries against a run of packed panels.
struct Job {
  const uint32_t* queries;
  const uint32_t* items;
  int64_t first_panel, panels;  // of the run: where to go on, and the end
  int64_t panel_units;          // from one panel to the next
  int64_t steps;                // units of a row
  int64_t skip, valid;          // items of the run that count: from skip, before valid
  const int32_t* first_target;  // (group + 1): targets of each query of the group
  const Bound* high;            // a target: what is above counts
  const Bound* low;             // a target: what is not above high, but at least low, is level or has to be looked at
  int64_t* above;               // a target, added to
  int64_t* level;               // a target, added to; null: such items go to the list instead
  Near* list;
  int64_t room, listed;
};

// Arithmetic that several kernels of one instruction set share.
struct Basics {
  // out[i] = the defined score of q and rows[i]: acc = fma(q[d], x[d], acc) over d, from 0
  void (*chains_of_one)(const float* q, const float* const* rows, int64_t count, int64_t width, float* out);
  // likewise with a query for each row
  void (*chains_of_pairs)(const float* const* queries, const float* const* rows, int64_t count, int64_t width,
                          float* out);
  // out[n] = product, in some order of summation, of the query of target list[n].target and row list[n].item
  void (*dots)(const Near* list, int64_t count, const float* const* queries, const float* rows, int64_t width,
               float* out);
  void (*to_float)(Storage from, const void* row, int64_t width, float* out);
  float (*largest)(const float* row, int64_t width);  // absolute value
  // The row in lower precision as units of four bytes, padded with zeros; returns squares of three lengths: of the
  // row, of what is stored (times scale), and of the difference.
  void (*to_bfloat16)(const float* row, int64_t width, uint32_t* out, int64_t units, double* squares);
  // shift is added to each stored byte; sum: of the stored bytes before the shift
  void (*to_int8)(const float* row, int64_t width, float scale, int shift, uint32_t* out, int64_t units,
                  double* squares, int32_t* sum);
  double (*square)(const float* row, int64_t width);
  void (*rotate)(float* row, int64_t width);  // products of rotated rows are those of the rows
};

struct Kernel {
  const char* name;
  Precision precision;
  bool exact;    // its scores are the defined ones, to the last bit
  int group;     // queries at a time
  bool by_row;   // queries lie row by row, else unit by unit of the whole group
  int multiple;  // the number of units of a row is padded to a multiple of this
  const Basics* basics;
  // Returns the panel to go on with: not yet the end if the list could overflow in it.
  int64_t (*scan)(Job&);
};

extern const Kernel kPortable;
// Clang has no target pragma for a file. setup.py sets KARMA_NO_AMX for an assembler that is older than the compiler,
// and KARMA_PORTABLE where that is not enough.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(KARMA_PORTABLE)
#define KARMA_X86 1
extern const Kernel kAvx2, kAvx512, kAvx512Int8;
#if __GNUC__ >= 10  // the first with these instructions
#define KARMA_AVX512_BF16 1
extern const Kernel kAvx512Bfloat16;
#endif
#if __GNUC__ >= 11 && !defined(KARMA_NO_AMX)
#define KARMA_AMX 1
extern const Kernel kAmxBfloat16;
#endif
#endif

}  // namespace karma

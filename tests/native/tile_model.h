// A software model of the AMX instructions that kernel_amx.cpp uses, for CPUs that do not have them. There each of
// them raises SIGILL; the handler decodes the machine code that the compiler made, does in plain C++ what Intel's
// manual says (Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TDPBF16PS, TILESTORED, TILEZERO,
// TILERELEASE), and goes on after it. What the manual forbids ends the process. This is a model: the instructions
// themselves are not run.
#pragma once

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>

namespace tiles {

struct Tile {
  uint8_t rows;
  uint16_t bytes;  // of a row
  uint8_t data[16][64];
  const char* loaded_from;
};

struct State {
  uint8_t palette = 0;  // 0: not configured
  Tile tile[8];
  // what the first and the second factor of every product must have been loaded from
  const char *first_begin = nullptr, *first_end = nullptr, *second_begin = nullptr, *second_end = nullptr;
  int64_t products = 0;
};
inline State state;  // one thread uses it

inline void demand(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "an AMX instruction would have failed: %s\n", what);
  _exit(1);
}

inline void configure(const uint8_t* config) {
  demand(config[0] == 1, "the palette is not 1");
  demand(config[1] == 0, "start_row is not 0");
  for (int i = 2; i < 16; ++i) demand(config[i] == 0, "a reserved byte is set");
  for (int i = 0; i < 16; ++i) {
    uint16_t bytes;
    memcpy(&bytes, config + 16 + 2 * i, 2);
    const uint8_t rows = config[48 + i];
    demand(i < 8 ? bytes <= 64 && rows <= 16 : bytes == 0 && rows == 0, "a tile is too large, or there is none such");
    demand((bytes == 0) == (rows == 0), "a tile has rows or columns alone");
    if (i < 8) state.tile[i] = {rows, bytes, {}, nullptr};
  }
  state.palette = 1;
}

inline Tile& tile_of(int number) {
  demand(state.palette == 1, "no tiles are configured");
  demand(state.tile[number].rows > 0, "the tile is not configured");
  return state.tile[number];
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float element(const uint8_t* row, int i) {
  uint16_t half;
  memcpy(&half, row + 2 * i, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return flushed(x);
}

// sum.fp32[m][n] += over k, of pairs: sums of the even and of the odd elements are kept apart and added at the end;
// each step is one rounding to the nearest, and subnormal numbers are zeros.
inline void multiply(Tile& sum, const Tile& a, const Tile& b) {
  demand(&sum != &a && &sum != &b && &a != &b, "the same tile twice");
  demand(a.rows == sum.rows && b.bytes == sum.bytes && a.bytes == 4 * b.rows, "the shapes do not fit");
  if (state.first_begin) {
    demand(a.loaded_from >= state.first_begin && a.loaded_from < state.first_end, "the first factor is not a query");
    demand(b.loaded_from >= state.second_begin && b.loaded_from < state.second_end,
           "the second factor is not an item");
  }
  ++state.products;
  for (int m = 0; m < a.rows; ++m)
    for (int n = 0; n < b.bytes / 4; ++n) {
      float even = 0, odd = 0, out;
      for (int k = 0; k < a.bytes / 4; ++k) {
        even = flushed(std::fmaf(element(a.data[m], 2 * k), element(b.data[k], 2 * n), even));
        odd = flushed(std::fmaf(element(a.data[m], 2 * k + 1), element(b.data[k], 2 * n + 1), odd));
      }
      memcpy(&out, sum.data[m] + 4 * n, 4);
      out = flushed(flushed(out) + flushed(even + odd));
      memcpy(sum.data[m] + 4 * n, &out, 4);
    }
}

// A memory operand: its address, and the index register as the stride of the tile's rows.
struct Operand {
  char* address;
  int64_t stride;
  int length;  // of ModRM and what follows
};

inline Operand memory_operand(const uint8_t* modrm, uint8_t prefix, const greg_t* registers) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const int mode = *modrm >> 6, base_high = prefix & 0x20 ? 0 : 8, index_high = prefix & 0x40 ? 0 : 8;
  int base = *modrm & 7, length = 1;
  int64_t stride = 0, address = 0;
  bool has_base = true;
  if (base == 4) {
    const uint8_t sib = modrm[1];
    const int index = (sib >> 3 & 7) | index_high;
    base = sib & 7;
    length = 2;
    if (index != 4) stride = int64_t(registers[order[index]]) << (sib >> 6);
    has_base = !(base == 5 && mode == 0);
  } else {
    demand(!(base == 5 && mode == 0), "an address relative to the instruction, which this model does not know");
  }
  if (has_base) address = registers[order[base | base_high]];
  if (mode == 1) {
    address += int8_t(modrm[length]);
    length += 1;
  } else if (mode == 2 || !has_base) {
    int32_t displacement;
    memcpy(&displacement, modrm + length, 4);
    address += displacement;
    length += 4;
  }
  return {reinterpret_cast<char*>(address), stride, length};
}

inline void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint8_t* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  const uint8_t prefix = code[1], fields = code[2], opcode = code[3], *modrm = code + 4;
  demand(code[0] == 0xc4 && (prefix & 0x1f) == 2 && !(fields & 0x84), "an illegal instruction that is not AMX");
  const int kind = fields & 3, reg = *modrm >> 3 & 7;  // kind: the mandatory prefix none, 66, f3 or f2
  const bool in_memory = *modrm < 0xc0;
  int length = 1;
  if (opcode == 0x49 && kind == 0 && in_memory && reg == 0) {  // ldtilecfg
    const Operand at = memory_operand(modrm, prefix, registers);
    configure(reinterpret_cast<const uint8_t*>(at.address + at.stride));
    length = at.length;
  } else if (opcode == 0x49 && kind == 0 && *modrm == 0xc0) {  // tilerelease
    state.palette = 0;
  } else if (opcode == 0x49 && kind == 3 && !in_memory) {  // tilezero
    memset(tile_of(reg).data, 0, sizeof tile_of(reg).data);
  } else if (opcode == 0x4b && (kind == 2 || kind == 3) && in_memory && (*modrm & 7) == 4) {  // tilestored, tileloadd
    const Operand at = memory_operand(modrm, prefix, registers);
    Tile& tile = tile_of(reg);
    for (int row = 0; row < tile.rows; ++row) {
      char* line = at.address + row * at.stride;
      kind == 3 ? memcpy(tile.data[row], line, tile.bytes) : memcpy(line, tile.data[row], tile.bytes);
    }
    if (kind == 3) tile.loaded_from = at.address;
    length = at.length;
  } else if (opcode == 0x5c && kind == 2 && !in_memory) {  // tdpbf16ps
    multiply(tile_of(reg), tile_of(*modrm & 7), tile_of(~fields >> 3 & 7));
  } else {
    demand(false, "an illegal instruction that this model does not know");
  }
  registers[REG_RIP] += 4 + length;
}

inline void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace tiles

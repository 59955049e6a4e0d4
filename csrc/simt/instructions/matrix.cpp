// Tensor cores: ldmatrix, stmatrix, movmatrix, mma.
//
// mma sums products of halves, bf16, tf32 and bytes of floats exactly in double precision (in the
// order of k, starting with c) and rounds once. GPUs sum in an order and with a precision that
// NVIDIA does not publish, so results may differ in the last bits. Inputs of tf32 lose their low 13
// bits.
//
// Fragments of the shapes m16n8 and m8n8 (PTX ISA, "Matrix fragments for mma"): lane l is in group
// l / 4, at place l % 4 of it; a register holds E elements with consecutive k.
//   a: register r has row group + 8 (r % 2), k from E place + 4 E (r / 2)    (m8n8: row group)
//   b: register r has column group,          k from E place + 4 E r
//   c, d: element i has row group + 8 (i / 2), column 2 place + i % 2
#include <algorithm>
#include <bit>
#include <cstring>

#include "../numbers.h"
#include "request.h"

namespace evsam::simt {
namespace {

constexpr int ROWS = 8;  // of the matrices of ldmatrix, each row 16 bytes

void whole_warp(Decoding& d) {
  if (!d.take("sync") || !d.take("aligned")) d.unsupported();
  d.instruction().flow = Flow::converge;
  d.instruction().whole_warp = true;
}

void require_all_lanes(Warp& warp, const Instruction& instruction, Mask mask) {
  if (mask == ALL_LANES) return;
  warp.block->fault("divergent synchronisation", warp, instruction, std::countr_zero(mask),
                    "the instruction needs all 32 lanes of the warp, and lane " +
                        std::to_string(std::countr_zero(~mask)) + " does not take part");
}

// ---- ldmatrix, stmatrix: option is 1 for .trans

// Element (row, 2 place) and the one after it, as a register of the lane has them.
std::uint32_t pair_of(const std::uint16_t (&matrix)[ROWS][ROWS], int lane, bool transposed) {
  const int i = lane / 4, j = lane % 4 * 2;
  return transposed ? matrix[j][i] | std::uint32_t(matrix[j + 1][i]) << 16
                    : matrix[i][j] | std::uint32_t(matrix[i][j + 1]) << 16;
}

Request row_request(Warp& warp, const Instruction& instruction, Place base,
                    Request::Intent intent) {
  Request request;
  request.instruction = &instruction;
  request.mask = first_lanes(instruction.memory.elements * ROWS);
  request.intent = intent;
  request.bytes = 16;
  read_addresses(warp, instruction, base, request.mask, request.address);
  return request;
}

void load_matrices(Warp& warp, const Instruction& instruction, Mask mask) {
  require_all_lanes(warp, instruction, mask);
  const int count = instruction.memory.elements;
  Request request =
      row_request(warp, instruction, instruction.operands[count], Request::Intent::read);
  const Mask allowed = warp.block->access(warp, request);
  for (int m = 0; m < count; ++m) {
    std::uint16_t matrix[ROWS][ROWS] = {};
    for (int row = 0; row < ROWS; ++row) {
      const int lane = m * ROWS + row;
      if (has_lane(allowed, lane)) std::memcpy(matrix[row], request.data[lane], 16);
    }
    std::uint32_t* to = warp.lanes<std::uint32_t>(instruction.operands[m]);
    for_lanes(mask, [&](int lane) { to[lane] = pair_of(matrix, lane, instruction.option); });
  }
}

void store_matrices(Warp& warp, const Instruction& instruction, Mask mask) {
  require_all_lanes(warp, instruction, mask);
  const int count = instruction.memory.elements;
  std::uint16_t rows[LANES][ROWS];
  for (int m = 0; m < count; ++m) {
    const std::uint32_t* from = warp.lanes<std::uint32_t>(instruction.operands[1 + m]);
    for (int lane = 0; lane < LANES; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        const std::uint16_t value = std::uint16_t(from[lane] >> (16 * half));
        if (instruction.option) {
          rows[m * ROWS + j + half][i] = value;
        } else {
          rows[m * ROWS + i][j + half] = value;
        }
      }
    }
  }
  Request request = row_request(warp, instruction, instruction.operands[0], Request::Intent::write);
  for (int lane = 0; lane < count * ROWS; ++lane) {
    request.written[lane] = reinterpret_cast<const std::byte*>(rows[lane]);
  }
  warp.block->access(warp, request);
}

void decode_matrix_access(Decoding& d, bool store) {
  whole_warp(d);
  if (!d.take("m8n8")) d.unsupported();
  MemoryAccess& memory = d.instruction().memory;
  memory.elements =
      d.require<std::uint8_t>("a number of matrices", {{"x1", 1}, {"x2", 2}, {"x4", 4}});
  d.instruction().option = d.take("trans");
  const Space space = take_space(d).value_or(Space::generic);
  if ((space != Space::shared && space != Space::generic) || d.type() != Type::b16) d.unsupported();
  if (store) {
    d.address(0, space);
    d.read_vector(1, Type::b32, memory.elements);
  } else {
    d.write_vector(0, Type::b32, memory.elements);
    d.address(1, space);
  }
  d.set_kind(store ? "matrix store" : "matrix load");
  d.instruction().execute = store ? store_matrices : load_matrices;
}

void decode_ldmatrix(Decoding& d) { decode_matrix_access(d, false); }
void decode_stmatrix(Decoding& d) { decode_matrix_access(d, true); }

void transpose_matrix(Warp& warp, const Instruction& instruction, Mask mask) {
  require_all_lanes(warp, instruction, mask);
  const std::uint32_t* from = warp.lanes<std::uint32_t>(instruction.operands[1]);
  std::uint16_t matrix[ROWS][ROWS];
  for (int lane = 0; lane < LANES; ++lane) {
    matrix[lane / 4][lane % 4 * 2] = std::uint16_t(from[lane]);
    matrix[lane / 4][lane % 4 * 2 + 1] = std::uint16_t(from[lane] >> 16);
  }
  std::uint32_t* to = warp.lanes<std::uint32_t>(instruction.operands[0]);
  for_lanes(mask, [&](int lane) { to[lane] = pair_of(matrix, lane, true); });
}

void decode_movmatrix(Decoding& d) {
  whole_warp(d);
  if (!d.take("m8n8") || !d.take("trans") || d.type() != Type::b16) d.unsupported();
  same_types(d, Type::b32, 1);
  d.instruction().execute = transpose_matrix;
}

// ---- mma

constexpr int COLUMNS = 8;

// How the elements of a register are read.
struct F16Element {
  static constexpr int bits = 16;
  using Value = double;
  static double value(std::uint32_t word, int i) {
    return half_to_float(std::uint16_t(word >> (16 * i)));
  }
};
struct BF16Element {
  static constexpr int bits = 16;
  using Value = double;
  static double value(std::uint32_t word, int i) {
    return bfloat_to_float(std::uint16_t(word >> (16 * i)));
  }
};
struct TF32Element {
  static constexpr int bits = 32;
  using Value = double;
  static double value(std::uint32_t word, int) { return std::bit_cast<float>(word & ~0x1fffu); }
};
template <bool has_sign, int width>
struct IntegerElement {
  static constexpr int bits = width;
  using Value = std::int32_t;
  static std::int32_t value(std::uint32_t word, int i) {
    const std::uint32_t high = word << (32 - width * (i + 1));
    return has_sign ? std::int32_t(high) >> (32 - width) : std::int32_t(high >> (32 - width));
  }
};

template <class Element>
constexpr int PER_REGISTER = 32 / Element::bits;

// a is [rows][k], b is [k][COLUMNS].
template <class Element, int rows, int k>
void read_a(Warp& warp, const Place* registers, typename Element::Value* a) {
  constexpr int E = PER_REGISTER<Element>;
  constexpr int HALVES = rows / 8;
  for (int r = 0; r < k / (4 * E) * HALVES; ++r) {
    const std::uint32_t* words = warp.lanes<std::uint32_t>(registers[r]);
    for (int lane = 0; lane < LANES; ++lane) {
      const int row = lane / 4 + 8 * (r % HALVES);
      const int first = E * (lane % 4) + 4 * E * (r / HALVES);
      for (int i = 0; i < E; ++i) a[row * k + first + i] = Element::value(words[lane], i);
    }
  }
}

template <class Element, int k>
void read_b(Warp& warp, const Place* registers, typename Element::Value* b) {
  constexpr int E = PER_REGISTER<Element>;
  for (int r = 0; r < k / (4 * E); ++r) {
    const std::uint32_t* words = warp.lanes<std::uint32_t>(registers[r]);
    for (int lane = 0; lane < LANES; ++lane) {
      const int first = E * (lane % 4) + 4 * E * r;
      for (int i = 0; i < E; ++i)
        b[(first + i) * COLUMNS + lane / 4] = Element::value(words[lane], i);
    }
  }
}

// c[rows][COLUMNS] += a[rows][k] b[k][COLUMNS]
EVSAM_SIMT_CLONES
void multiply_double(double* c, const double* a, const double* b, int rows, int k) {
  for (int row = 0; row < rows; ++row) {
    double sum[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) sum[j] = c[row * COLUMNS + j];
    for (int i = 0; i < k; ++i) {
      const double factor = a[row * k + i];
      for (int j = 0; j < COLUMNS; ++j) sum[j] += factor * b[i * COLUMNS + j];
    }
    for (int j = 0; j < COLUMNS; ++j) c[row * COLUMNS + j] = sum[j];
  }
}

// The place of element i of a lane's c or d.
int element_at(int lane, int i) {
  return (lane / 4 + 8 * (i / 2)) * COLUMNS + lane % 4 * 2 + i % 2;
}

template <class A, int rows, int k, bool half_sums>
void multiply_floats(Warp& warp, const Instruction& instruction, Mask mask) {
  require_all_lanes(warp, instruction, mask);
  constexpr int E = PER_REGISTER<A>;
  constexpr int A_REGISTERS = k / (4 * E) * (rows / 8), B_REGISTERS = k / (4 * E);
  constexpr int SUMS = rows / 8 * (half_sums ? 1 : 2);  // registers
  double a[rows * k], b[k * COLUMNS], c[rows * COLUMNS];
  const Place* operands = instruction.operands + SUMS;
  read_a<A, rows, k>(warp, operands, a);
  read_b<A, k>(warp, operands + A_REGISTERS, b);
  const Place* sums = operands + A_REGISTERS + B_REGISTERS;
  for (int r = 0; r < SUMS; ++r) {
    const std::uint32_t* words = warp.lanes<std::uint32_t>(sums[r]);
    for (int lane = 0; lane < LANES; ++lane) {
      if (half_sums) {
        c[element_at(lane, 2 * r)] = half_to_float(std::uint16_t(words[lane]));
        c[element_at(lane, 2 * r + 1)] = half_to_float(std::uint16_t(words[lane] >> 16));
      } else {
        c[element_at(lane, r)] = std::bit_cast<float>(words[lane]);
      }
    }
  }
  multiply_double(c, a, b, rows, k);
  for (int r = 0; r < SUMS; ++r) {
    std::uint32_t* words = warp.lanes<std::uint32_t>(instruction.operands[r]);
    for_lanes(mask, [&](int lane) {
      if (half_sums) {
        words[lane] =
            std::uint32_t(encode(c[element_at(lane, 2 * r)], F16, Rounding::nearest_even)) |
            std::uint32_t(encode(c[element_at(lane, 2 * r + 1)], F16, Rounding::nearest_even))
                << 16;
      } else {
        const float sum = float(c[element_at(lane, r)]);
        words[lane] = sum != sum ? NAN_BITS : std::bit_cast<std::uint32_t>(sum);
      }
    });
  }
}

constexpr std::uint32_t CLAMP = 1;     // options of integer mma: .satfinite,
constexpr std::uint32_t BITS_AND = 2;  // and for single bits: .and instead of .xor

template <class A, class B, int rows, int k>
void multiply_integers(Warp& warp, const Instruction& instruction, Mask mask) {
  require_all_lanes(warp, instruction, mask);
  constexpr int E = PER_REGISTER<A>;
  constexpr int A_REGISTERS = k / (4 * E) * (rows / 8), B_REGISTERS = k / (4 * E);
  constexpr int SUMS = rows / 8 * 2;
  std::int32_t a[rows * k], b[k * COLUMNS];
  const Place* operands = instruction.operands + SUMS;
  read_a<A, rows, k>(warp, operands, a);
  read_b<B, k>(warp, operands + A_REGISTERS, b);
  const Place* sums = operands + A_REGISTERS + B_REGISTERS;
  const bool single = A::bits == 1;
  std::int64_t products[rows * COLUMNS];
  for (int row = 0; row < rows; ++row) {
    std::int32_t sum[COLUMNS] = {};
    for (int i = 0; i < k; ++i) {
      const std::int32_t factor = a[row * k + i];
      for (int j = 0; j < COLUMNS; ++j) {
        const std::int32_t other = b[i * COLUMNS + j];
        sum[j] += single && !(instruction.option & BITS_AND) ? factor ^ other : factor * other;
      }
    }
    std::copy_n(sum, COLUMNS, products + row * COLUMNS);
  }
  for (int r = 0; r < SUMS; ++r) {
    const std::int32_t* from = warp.lanes<std::int32_t>(sums[r]);
    std::int32_t* to = warp.lanes<std::int32_t>(instruction.operands[r]);
    for_lanes(mask, [&](int lane) {
      const std::int64_t sum = from[lane] + products[element_at(lane, r)];
      to[lane] = std::int32_t(
          instruction.option & CLAMP ? std::clamp<std::int64_t>(sum, INT32_MIN, INT32_MAX) : sum);
    });
  }
}

// m8n8k4 of doubles: lane l has a at row l / 4 and k l % 4, b at k l % 4 and column l / 4.
void multiply_f64(Warp& warp, const Instruction& instruction, Mask mask) {
  require_all_lanes(warp, instruction, mask);
  constexpr int SIZE = 8, DEPTH = 4;
  double a[SIZE * DEPTH], b[DEPTH * COLUMNS], c[SIZE * COLUMNS];
  const double* a_lanes = warp.lanes<double>(instruction.operands[2]);
  const double* b_lanes = warp.lanes<double>(instruction.operands[3]);
  for (int lane = 0; lane < LANES; ++lane) {
    a[lane] = a_lanes[lane];
    b[lane % 4 * COLUMNS + lane / 4] = b_lanes[lane];
    for (int i = 0; i < 2; ++i) {
      c[element_at(lane, i)] = warp.lanes<double>(instruction.operands[4 + i])[lane];
    }
  }
  for (int row = 0; row < SIZE; ++row) {
    for (int i = 0; i < DEPTH; ++i) {
      for (int j = 0; j < COLUMNS; ++j) {
        double& sum = c[row * COLUMNS + j];
        sum = std::fma(a[row * DEPTH + i], b[i * COLUMNS + j], sum);
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    double* to = warp.lanes<double>(instruction.operands[i]);
    for_lanes(mask, [&](int lane) { to[lane] = c[element_at(lane, i)]; });
  }
}

struct Shape {
  int rows, k;
  bool operator==(const Shape&) const = default;
};

// Appends d, a, b and c: registers of 32 bits, or of 64 for doubles.
void take_fragments(Decoding& d, Type sums, int sum_registers, Type factors, int a_registers,
                    int b_registers) {
  d.write_vector(0, sums, sum_registers);
  d.read_vector(1, factors, a_registers);
  d.read_vector(2, factors, b_registers);
  d.read_vector(3, sums, sum_registers);
}

template <class Element, int rows, int k>
Handler float_mma(Decoding& d, bool half_sums) {
  constexpr int E = PER_REGISTER<Element>;
  take_fragments(d, half_sums ? Type::b32 : Type::f32, rows / 8 * (half_sums ? 1 : 2), Type::b32,
                 k / (4 * E) * (rows / 8), k / (4 * E));
  return half_sums ? multiply_floats<Element, rows, k, true>
                   : multiply_floats<Element, rows, k, false>;
}

template <int width, int rows, int k>
Handler integer_mma(Decoding& d, bool a_signed, bool b_signed) {
  constexpr int E = 32 / width;
  take_fragments(d, Type::b32, rows / 8 * 2, Type::b32, k / (4 * E) * (rows / 8), k / (4 * E));
  using S = IntegerElement<true, width>;
  using U = IntegerElement<false, width>;
  return a_signed
             ? (b_signed ? multiply_integers<S, S, rows, k> : multiply_integers<S, U, rows, k>)
             : (b_signed ? multiply_integers<U, S, rows, k> : multiply_integers<U, U, rows, k>);
}

void decode_mma(Decoding& d) {
  whole_warp(d);
  const auto shape = d.choose<Shape>({{"m16n8k4", {16, 4}},
                                      {"m16n8k8", {16, 8}},
                                      {"m16n8k16", {16, 16}},
                                      {"m16n8k32", {16, 32}},
                                      {"m16n8k64", {16, 64}},
                                      {"m16n8k128", {16, 128}},
                                      {"m16n8k256", {16, 256}},
                                      {"m8n8k4", {8, 4}},
                                      {"m8n8k16", {8, 16}},
                                      {"m8n8k32", {8, 32}},
                                      {"m8n8k128", {8, 128}}});
  if (!shape || !d.take("row") || !d.take("col")) d.unsupported();
  Instruction& instruction = d.instruction();
  if (d.take("satfinite")) instruction.option |= CLAMP;
  const bool bits_and = d.take("and");
  const bool bits_xor = d.take("xor");
  if (bits_and) instruction.option |= BITS_AND;
  const bool popc = d.take("popc");
  const Type sums = d.type(), a = d.type(), b = d.type();
  if (d.type() != sums) d.unsupported();
  const bool half = sums == Type::f16;
  const auto is = [&](int rows, int k) { return *shape == Shape{rows, k}; };
  Handler found = nullptr;
  if (a == Type::f64) {
    if (b == a && sums == a && is(8, 4)) {
      take_fragments(d, Type::f64, 2, Type::f64, 1, 1);
      found = multiply_f64;
    }
  } else if (is_float(a)) {
    if (a == b && (sums == Type::f32 || (half && a == Type::f16))) {
      if (a == Type::f16 && is(16, 8)) found = float_mma<F16Element, 16, 8>(d, half);
      if (a == Type::f16 && is(16, 16)) found = float_mma<F16Element, 16, 16>(d, half);
      if (a == Type::bf16 && is(16, 8)) found = float_mma<BF16Element, 16, 8>(d, half);
      if (a == Type::bf16 && is(16, 16)) found = float_mma<BF16Element, 16, 16>(d, half);
      if (a == Type::tf32 && is(16, 4)) found = float_mma<TF32Element, 16, 4>(d, half);
      if (a == Type::tf32 && is(16, 8)) found = float_mma<TF32Element, 16, 8>(d, half);
    }
    if (instruction.option) d.unsupported();
  } else if (sums == Type::s32) {
    const auto bytes = [](Type type) { return type == Type::s8 || type == Type::u8; };
    const auto nibbles = [](Type type) { return type == Type::s4 || type == Type::u4; };
    const bool sa = a == Type::s8 || a == Type::s4, sb = b == Type::s8 || b == Type::s4;
    if (bytes(a) && bytes(b)) {
      if (is(8, 16)) found = integer_mma<8, 8, 16>(d, sa, sb);
      if (is(16, 16)) found = integer_mma<8, 16, 16>(d, sa, sb);
      if (is(16, 32)) found = integer_mma<8, 16, 32>(d, sa, sb);
    } else if (nibbles(a) && nibbles(b)) {
      if (is(8, 32)) found = integer_mma<4, 8, 32>(d, sa, sb);
      if (is(16, 32)) found = integer_mma<4, 16, 32>(d, sa, sb);
      if (is(16, 64)) found = integer_mma<4, 16, 64>(d, sa, sb);
    } else if (a == Type::b1 && b == Type::b1 && popc && bits_and != bits_xor) {
      if (is(8, 128)) found = integer_mma<1, 8, 128>(d, false, false);
      if (is(16, 128)) found = integer_mma<1, 16, 128>(d, false, false);
      if (is(16, 256)) found = integer_mma<1, 16, 256>(d, false, false);
    }
  }
  if (!found) d.unsupported();
  instruction.execute = found;
}

}  // namespace

std::span<const Opcode> matrix_opcodes() {
  static constexpr Opcode OPCODES[] = {
      {"ldmatrix", "matrix load", decode_ldmatrix},
      {"stmatrix", "matrix store", decode_stmatrix},
      {"movmatrix", "matrix load", decode_movmatrix},
      {"mma", "mma", decode_mma},
  };
  return OPCODES;
}

}  // namespace evsam::simt

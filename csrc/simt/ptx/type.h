// The types of PTX: their names, sizes and families.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace evsam::simt {

enum class Type : std::uint8_t {
  none,
  b8,
  b16,
  b32,
  b64,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  f16x2,
  bf16,
  bf16x2,
  tf32,
  f32,
  f64,
  e4m3x2,
  e5m2x2,
  b1,
  u4,
  s4,  // elements of mma only
  pred,
};

struct TypeInfo {
  std::string_view name;
  std::uint8_t bytes;  // in memory and in a register; 0 where several make a byte
};

inline constexpr TypeInfo TYPES[] = {
    {"", 0},       {"b8", 1},   {"b16", 2},    {"b32", 4},  {"b64", 8},  {"u8", 1},  {"u16", 2},
    {"u32", 4},    {"u64", 8},  {"s8", 1},     {"s16", 2},  {"s32", 4},  {"s64", 8}, {"f16", 2},
    {"f16x2", 4},  {"bf16", 2}, {"bf16x2", 4}, {"tf32", 4}, {"f32", 4},  {"f64", 8}, {"e4m3x2", 2},
    {"e5m2x2", 2}, {"b1", 0},   {"u4", 0},     {"s4", 0},   {"pred", 0},
};

inline std::string_view name_of(Type type) { return TYPES[int(type)].name; }
inline int bytes_of(Type type) { return TYPES[int(type)].bytes; }
inline bool is_signed(Type type) { return type >= Type::s8 && type <= Type::s64; }
inline bool is_integer(Type type) { return type >= Type::b8 && type <= Type::s64; }
inline bool is_float(Type type) { return type >= Type::f16 && type <= Type::f64; }

inline std::optional<Type> type_named(std::string_view name) {
  for (int i = 1; i <= int(Type::pred); ++i) {
    if (TYPES[i].name == name) return Type(i);
  }
  return std::nullopt;
}

}  // namespace evsam::simt

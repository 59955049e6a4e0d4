// Cuts a text of PTX into tokens.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace evsam::simt {

struct Token {
  enum class Kind : unsigned char {
    name,         // add, %r1, $L__BB0_2, _
    suffix,       // .global, .L1::no_allocate, .m16n8k16: the text without the dot
    number,       // 12, 0x1F, 0f3F800000, 1.5
    string,       // "file.cu": the text between the quotes
    punctuation,  // one character
    end,
  };
  Kind kind;
  std::string_view text;  // points into the text that was cut
  int line;

  bool is(char c) const { return kind == Kind::punctuation && text[0] == c; }
  bool is_suffix(std::string_view name) const { return kind == Kind::suffix && text == name; }
};

// The tokens of `text`, the last of which is `end`. Throws PtxError.
std::vector<Token> tokenize(std::string_view text);

// Line number `line` (the first is 1) of `text`, trimmed and shortened for a message.
std::string line_of(std::string_view text, int line);

}  // namespace evsam::simt

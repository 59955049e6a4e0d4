// Cuts a text of PTX into tokens.
#include "lexer.h"

#include <algorithm>
#include <cctype>

#include "error.h"

namespace evsam::simt {
namespace {

bool starts_name(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

bool continues_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$';
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) {}

  std::vector<Token> run() {
    while (skip_blank(), at_ < text_.size()) tokens_.push_back(next());
    tokens_.push_back({Token::Kind::end, {}, line_});
    return std::move(tokens_);
  }

 private:
  char peek(std::size_t ahead = 0) const {
    return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0';
  }

  [[noreturn]] void fail(const std::string& problem) const {
    throw PtxError(line_, problem, line_of(text_, line_));
  }

  void skip_blank() {
    while (at_ < text_.size()) {
      if (peek() == '/' && peek(1) == '/') {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else if (peek() == '/' && peek(1) == '*') {
        const std::size_t close = text_.find("*/", at_ + 2);
        if (close == std::string_view::npos) fail("a comment is not closed");
        line_ += int(std::count(text_.begin() + at_, text_.begin() + close, '\n'));
        at_ = close + 2;
      } else if (std::isspace(static_cast<unsigned char>(peek()))) {
        line_ += peek() == '\n';
        ++at_;
      } else {
        return;
      }
    }
  }

  Token take(Token::Kind kind, std::size_t length, std::size_t skip = 0) {
    const Token token{kind, text_.substr(at_ + skip, length - skip), line_};
    at_ += length;
    return token;
  }

  Token next() {
    const char c = peek();
    std::size_t n = 1;
    if (starts_name(c)) {
      while (continues_name(peek(n))) ++n;
      return take(Token::Kind::name, n);
    }
    if (c == '.' && continues_name(peek(1))) {
      while (continues_name(peek(n)) || (peek(n) == ':' && peek(n + 1) == ':')) {
        n += peek(n) == ':' ? 2 : 1;
      }
      return take(Token::Kind::suffix, n, 1);
    }
    if (is_digit(c)) {
      while (std::isalnum(static_cast<unsigned char>(peek(n)))) ++n;
      // A decimal fraction such as 1.5 or 1.0e-3.
      if (peek(n) == '.' && is_digit(peek(n + 1))) {
        ++n;
        while (std::isalnum(static_cast<unsigned char>(peek(n)))) ++n;
        const char last = peek(n - 1);
        if ((last == 'e' || last == 'E') && (peek(n) == '-' || peek(n) == '+')) {
          ++n;
          while (is_digit(peek(n))) ++n;
        }
      }
      return take(Token::Kind::number, n);
    }
    if (c == '"') {
      while (peek(n) != '"') {
        if (at_ + n >= text_.size() || peek(n) == '\n') fail("a string is not closed");
        ++n;
      }
      Token token = take(Token::Kind::string, n, 1);
      ++at_;
      return token;
    }
    if (std::string_view(",;:()[]{}<>@!+-*=|&.").find(c) != std::string_view::npos) {
      return take(Token::Kind::punctuation, 1);
    }
    fail("unexpected character");
  }

  std::string_view text_;
  std::size_t at_ = 0;
  int line_ = 1;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view text) { return Lexer(text).run(); }

std::string line_of(std::string_view text, int line) {
  std::size_t begin = 0;
  for (int i = 1; i < line; ++i) {
    const std::size_t newline = text.find('\n', begin);
    if (newline == std::string_view::npos) return {};
    begin = newline + 1;
  }
  std::string_view found = text.substr(begin, text.find('\n', begin) - begin);
  const std::size_t first = found.find_first_not_of(" \t\r");
  if (first == std::string_view::npos) return {};
  found = found.substr(first, found.find_last_not_of(" \t\r") + 1 - first);
  constexpr std::size_t LONGEST = 160;
  std::string shown(found.substr(0, LONGEST));
  if (found.size() > LONGEST) shown += "...";
  // A message has to be text whatever was given.
  for (char& c : shown) {
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) > 0x7e) c = '?';
  }
  return shown;
}

}  // namespace evsam::simt

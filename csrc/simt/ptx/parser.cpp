// Parses a text of PTX by recursive descent.
#include "parser.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <unordered_map>

#include "error.h"
#include "lexer.h"

namespace evsam::simt {
namespace {

// Text beyond these sizes is refused rather than allowed to exhaust memory or the stack.
constexpr int DEEPEST = 64;
constexpr std::size_t MOST_REGISTERS = 1 << 20;
constexpr std::uint64_t LARGEST_VARIABLE = std::uint64_t(1) << 32;
constexpr std::uint64_t LARGEST_INITIALISED = std::uint64_t(1) << 28;

// Names that a brace of a function's body declares.
struct Scope {
  int parent = -1;
  std::unordered_map<std::string_view, int> registers;
  std::unordered_map<std::string_view, int> variables;
  std::unordered_map<std::string_view, int> labels;
  std::unordered_map<std::string_view, int> tables;
};

// Where the instructions that follow come from. A line inside of an inlined function of another
// file, such as a header of the toolkit, is followed to the line that called it.
class SourceMap {
 public:
  void start_function() {
    file_ = 0;
    current_ = {};
    callers_.clear();
  }

  void move_to(Location at, std::optional<Location> caller) {
    if (at.line == 0) return;  // made by the compiler: stays with what was before
    if (caller) {
      callers_[at] = *caller;
    } else {
      callers_.erase(at);
    }
    if (file_ == 0) file_ = at.file;
    Location line = at;
    for (int depth = 0; line.file != file_ && depth < DEEPEST; ++depth) {
      const auto found = callers_.find(line);
      if (found == callers_.end()) break;
      line = found->second;
    }
    current_ = line.file == file_ ? line : at;
  }

  Location current() const { return current_; }

 private:
  int file_ = 0;  // of the function itself
  Location current_;
  std::map<Location, Location> callers_;
};

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text), tokens_(tokenize(text)) {}

  Module run() {
    while (peek().kind != Token::Kind::end) top_level();
    if (module_.target.empty()) fail("there is no .target", peek());
    return std::move(module_);
  }

 private:
  // ---- tokens

  const Token& peek(std::size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }

  const Token& take() {
    const Token& token = peek();
    if (at_ < tokens_.size()) ++at_;
    return token;
  }

  [[noreturn]] void fail(const std::string& problem, const Token& token) const {
    throw PtxError(token.line, problem, line_of(text_, token.line));
  }

  bool accept(char c) {
    const bool found = peek().is(c);
    if (found) take();
    return found;
  }

  bool accept_suffix(std::string_view name) {
    const bool found = peek().is_suffix(name);
    if (found) take();
    return found;
  }

  void expect(char c) {
    if (!accept(c)) fail(std::string("expected '") + c + "'", peek());
  }

  std::string_view expect_kind(Token::Kind kind, const char* what) {
    if (peek().kind != kind) fail(std::string("expected ") + what, peek());
    return take().text;
  }

  std::string_view expect_name() { return expect_kind(Token::Kind::name, "a name"); }

  std::uint64_t expect_integer() {
    const bool negative = accept('-');
    const Token& token = peek();
    const Operand number = parse_number();
    if (number.kind != Operand::Kind::integer) fail("expected an integer", token);
    return negative ? -number.bits : number.bits;
  }

  int expect_int() {
    const Token& token = peek();
    const std::uint64_t value = expect_integer();
    if (value > 0x7fffffff) fail("the number is too large", token);
    return int(value);
  }

  Operand parse_number() {
    const Token token = peek();
    const std::string digits(expect_kind(Token::Kind::number, "a number"));
    Operand number;
    number.kind = Operand::Kind::integer;
    const auto parse_as = [&](std::size_t skip, int base, std::size_t expected = 0) {
      std::string body = digits.substr(skip);
      if (expected == 0 && !body.empty() && (body.back() == 'U' || body.back() == 'u')) {
        body.pop_back();
      }
      char* end = nullptr;
      errno = 0;
      number.bits = std::strtoull(body.c_str(), &end, base);
      if (body.empty() || !std::isalnum(static_cast<unsigned char>(body[0])) || *end || errno ||
          (expected && body.size() != expected)) {
        fail("not a number", token);
      }
    };
    const char second = digits.size() > 1 ? char(std::tolower(digits[1])) : '\0';
    if (digits[0] == '0' && second == 'f') {
      number.kind = Operand::Kind::single;
      parse_as(2, 16, 8);
    } else if (digits[0] == '0' && second == 'd') {
      number.kind = Operand::Kind::real;
      parse_as(2, 16, 16);
    } else if (digits[0] == '0' && second == 'x') {
      parse_as(2, 16);
    } else if (digits[0] == '0' && second == 'b') {
      parse_as(2, 2);
    } else if (digits.find_first_of(".eE") != std::string::npos) {
      number.kind = Operand::Kind::real;
      char* end = nullptr;
      number.bits = std::bit_cast<std::uint64_t>(std::strtod(digits.c_str(), &end));
      if (*end) fail("not a number", token);
    } else {
      parse_as(0, digits[0] == '0' && digits.size() > 1 ? 8 : 10);
    }
    return number;
  }

  // ---- declarations

  void top_level() {
    const Token& token = peek();
    bool external = false;
    while (peek().is_suffix("visible") || peek().is_suffix("extern") || peek().is_suffix("weak") ||
           peek().is_suffix("common")) {
      external |= take().text == "extern";
    }
    if (token.kind == Token::Kind::punctuation && accept(';')) return;
    if (peek().kind != Token::Kind::suffix) fail("expected a directive", token);
    const std::string_view name = take().text;
    if (name == "version") {
      expect_kind(Token::Kind::number, "a version");
    } else if (name == "target") {
      module_.target = expect_name();
      while (accept(',')) expect_name();
    } else if (name == "address_size") {
      if (expect_int() != 64) fail("only .address_size 64 is supported", token);
    } else if (name == "file") {
      parse_file();
    } else if (name == "loc") {
      parse_loc();
    } else if (name == "section") {
      skip_section();
    } else if (name == "pragma") {
      skip_statement();
    } else if (name == "entry" || name == "func") {
      parse_function(name == "entry");
    } else if (name == "global") {
      parse_variables(Space::global, external, module_.variables, nullptr);
    } else if (name == "const") {
      parse_variables(Space::constant, external, module_.variables, nullptr);
    } else if (name == "shared") {
      parse_variables(Space::shared, external, module_.variables, nullptr);
    } else {
      fail("unsupported directive ." + std::string(name), token);
    }
  }

  void parse_file() {
    const int index = expect_int();
    module_.files.emplace_back(index, expect_kind(Token::Kind::string, "a file name"));
    while (accept(',')) expect_integer();
  }

  Location parse_location() {
    Location location;
    location.file = expect_int();
    location.line = expect_int();
    location.column = expect_int();
    return location;
  }

  void parse_loc() {
    const Location at = parse_location();
    std::optional<Location> caller;
    while (accept(',')) {
      const std::string_view attribute = expect_name();
      if (attribute == "inlined_at") {
        caller = parse_location();
      } else if (attribute == "function_name") {
        expect_name();
        if (accept('+')) expect_integer();
      } else {
        fail("unknown attribute of .loc", peek());
      }
    }
    source_.move_to(at, caller);
  }

  void skip_section() {
    take();  // .debug_str
    expect('{');
    for (int depth = 1; depth > 0;) {
      if (peek().kind == Token::Kind::end) fail("a section is not closed", peek());
      const Token& token = take();
      depth += token.is('{') - token.is('}');
    }
  }

  void skip_statement() {
    while (!accept(';')) {
      if (peek().kind == Token::Kind::end) fail("expected ';'", peek());
      take();
    }
  }

  // `.align 4 .b8 name[8] = {...}`, without what follows; the space was taken.
  Variable parse_variable(Space space) {
    Variable variable;
    variable.space = space;
    variable.line = peek().line;
    std::uint64_t lanes = 1;
    while (peek().kind == Token::Kind::suffix) {
      const Token token = take();
      if (token.text == "align") {
        variable.align = expect_integer();
        if (!std::has_single_bit(variable.align) || variable.align > 4096) {
          fail("the alignment is not a power of two up to 4096", token);
        }
      } else if (token.text == "ptr") {
        variable.pointer = true;
      } else if (token.text == "v2" || token.text == "v4") {
        lanes = token.text[1] - '0';
      } else if (token.text == "attribute") {
        expect('(');
        while (!accept(')')) {
          if (peek().kind == Token::Kind::end) fail("expected ')'", peek());
          take();
        }
      } else if (const auto type = type_named(token.text)) {
        variable.type = *type;
      } else if (!(variable.pointer && (token.text == "global" || token.text == "const" ||
                                        token.text == "shared" || token.text == "local"))) {
        fail("unsupported attribute ." + std::string(token.text), token);
      }
    }
    const std::uint64_t element = bytes_of(variable.type);
    if (element == 0) fail("the variable has no type that memory can hold", peek());
    variable.align = std::max(variable.align, element * lanes);
    variable.name = expect_name();
    std::uint64_t count = lanes;
    while (accept('[')) {
      const Token token = peek();
      const std::uint64_t extent = token.is(']') ? 0 : expect_integer();
      expect(']');
      if (extent > LARGEST_VARIABLE) fail("the variable is too large", token);
      count *= extent;
      if (count > LARGEST_VARIABLE) fail("the variable is too large", token);
    }
    variable.size = count * element;
    if (accept('=')) parse_initialiser(variable);
    return variable;
  }

  void parse_initialiser(Variable& variable) {
    const Token start = peek();
    if (variable.size > LARGEST_INITIALISED) fail("the variable is too large", start);
    std::uint64_t at = 0;
    initialise(variable, at, 0);
    if (variable.size == 0) variable.size = at;  // int table[] = {...}
    variable.bytes.resize(variable.size);
  }

  void initialise(Variable& variable, std::uint64_t& at, int depth) {
    if (depth > DEEPEST) fail("braces are nested too deeply", peek());
    if (accept('{')) {
      if (accept('}')) return;
      do initialise(variable, at, depth + 1);
      while (accept(','));
      expect('}');
      return;
    }
    const Token start = peek();
    const std::uint64_t element = bytes_of(variable.type);
    if (variable.size > 0 && at + element > variable.size) {
      fail("more values than the variable has room for", start);
    }
    std::uint64_t bits = 0;
    if (peek().kind == Token::Kind::name) {
      const bool generic = peek().text == "generic" && peek(1).is('(');
      if (generic) take(), take();
      std::string symbol(expect_name());
      if (generic) expect(')');
      const std::int64_t offset = accept('+') ? std::int64_t(expect_integer()) : 0;
      if (element != 8) fail("an address takes eight bytes", start);
      variable.relocations.push_back({at, std::move(symbol), offset});
    } else {
      const bool negative = accept('-');
      const Operand number = parse_number();
      bits = negative ? -number.bits : number.bits;
      if (number.kind == Operand::Kind::real) {
        const double value = std::bit_cast<double>(number.bits) * (negative ? -1 : 1);
        bits = element == 4 ? std::bit_cast<std::uint32_t>(float(value))
                            : std::bit_cast<std::uint64_t>(value);
      }
    }
    for (std::uint64_t i = 0; i < element; ++i) {
      variable.bytes.push_back(std::uint8_t(bits >> (8 * i)));
    }
    at += element;
  }

  void parse_variables(Space space, bool external, std::vector<Variable>& into, Scope* scope) {
    const std::size_t start = at_;
    for (std::size_t attributes_end = 0;;) {
      into.push_back(parse_variable(space));
      into.back().external = external;
      if (scope) scope->variables[take_view(into.back().name)] = int(into.size()) - 1;
      if (!accept(',')) break;
      // The attributes hold for every name of the list: read them again.
      if (attributes_end == 0) {
        for (attributes_end = start; tokens_[attributes_end].kind != Token::Kind::name;) {
          ++attributes_end;
        }
      }
      std::vector<Token> again(tokens_.begin() + start, tokens_.begin() + attributes_end);
      tokens_.insert(tokens_.begin() + at_, again.begin(), again.end());
    }
    expect(';');
  }

  // A view of a name that lives as long as the parser.
  std::string_view take_view(const std::string& name) {
    return names_.emplace_back(std::make_unique<std::string>(name))->c_str();
  }

  // ---- functions

  void parse_function(bool entry) {
    source_.start_function();
    Function function;
    function.entry = entry;
    function.line = peek().line;
    scopes_.clear();
    scopes_.emplace_back();
    uses_.clear();
    if (peek().is('(')) function.returns = parse_parameters();
    function.name = expect_name();
    if (peek().is('(')) function.parameters = parse_parameters();
    while (peek().kind == Token::Kind::suffix) parse_tuning(function);
    if (!accept(';')) {
      function.defined = true;
      expect('{');
      parse_body(function, 0, 0);
      resolve_labels(function);
    }
    const auto declared =
        std::find_if(module_.functions.begin(), module_.functions.end(),
                     [&](const Function& other) { return other.name == function.name; });
    if (declared == module_.functions.end()) {
      module_.functions.push_back(std::move(function));
    } else if (function.defined) {
      if (declared->defined) {
        throw PtxError(function.line, "the function is defined twice", function.name);
      }
      *declared = std::move(function);
    }
  }

  std::vector<Variable> parse_parameters() {
    std::vector<Variable> parameters;
    expect('(');
    if (accept(')')) return parameters;
    do {
      if (!accept_suffix("param")) fail("expected .param", peek());
      parameters.push_back(parse_variable(Space::param));
    } while (accept(','));
    expect(')');
    return parameters;
  }

  void parse_tuning(Function& function) {
    const Token token = take();
    const auto block = [&](std::uint32_t (&sizes)[3]) {
      sizes[0] = sizes[1] = sizes[2] = 1;
      int axis = 0;
      do {
        if (axis == 3) fail("a block has three axes", token);
        sizes[axis++] = std::uint32_t(expect_int());
      } while (accept(','));
    };
    if (token.text == "maxntid") {
      block(function.maximum_block);
    } else if (token.text == "reqntid") {
      block(function.required_block);
    } else if (token.text == "minnctapersm" || token.text == "maxnreg" ||
               token.text == "maxnctapersm" || token.text == "maxclusterrank") {
      expect_integer();
    } else if (token.text == "pragma") {
      skip_statement();
    } else if (token.text != "noreturn") {
      fail("unsupported directive ." + std::string(token.text), token);
    }
  }

  void parse_body(Function& function, int scope, int depth) {
    if (depth > DEEPEST) fail("braces are nested too deeply", peek());
    while (!accept('}')) {
      const Token token = peek();
      if (token.kind == Token::Kind::end) fail("a function is not closed", token);
      if (accept(';')) continue;
      if (accept('{')) {
        scopes_.emplace_back().parent = scope;
        parse_body(function, int(scopes_.size()) - 1, depth + 1);
      } else if (token.kind == Token::Kind::suffix) {
        parse_local_directive(function, scope);
      } else if (token.kind == Token::Kind::name && peek(1).is(':')) {
        take(), take();
        if (accept_suffix("branchtargets")) {
          parse_branch_targets(function, scope, token);
        } else if (accept_suffix("callprototype") || accept_suffix("calltargets")) {
          skip_statement();  // of indirect calls, which are refused where they are made
        } else if (!scopes_[scope]
                        .labels.emplace(token.text, int(function.statements.size()))
                        .second) {
          fail("the label is defined twice", token);
        }
      } else {
        parse_instruction(function, scope);
      }
    }
  }

  void parse_local_directive(Function& function, int scope) {
    const Token token = take();
    Scope* names = &scopes_[scope];
    if (token.text == "reg") {
      parse_registers(function, *names);
    } else if (token.text == "local") {
      parse_variables(Space::local, false, function.variables, names);
    } else if (token.text == "param") {
      parse_variables(Space::param, false, function.variables, names);
    } else if (token.text == "shared") {
      parse_variables(Space::shared, false, function.variables, names);
    } else if (token.text == "loc") {
      parse_loc();
    } else if (token.text == "file") {
      parse_file();
    } else if (token.text == "pragma") {
      skip_statement();
    } else {
      fail("unsupported directive ." + std::string(token.text), token);
    }
  }

  void parse_registers(Function& function, Scope& scope) {
    const Token token = take();
    const auto type = token.kind == Token::Kind::suffix ? type_named(token.text) : std::nullopt;
    if (!type || (bytes_of(*type) == 0 && *type != Type::pred)) {
      fail("unsupported type of registers", token);
    }
    do {
      const Token name = peek();
      const std::string_view prefix = expect_name();
      std::uint64_t count = 1;
      const bool range = accept('<');
      if (range) {
        count = expect_integer();
        expect('>');
      }
      if (count > MOST_REGISTERS || function.registers.size() + count > MOST_REGISTERS) {
        fail("too many registers", name);
      }
      for (std::uint64_t i = 0; i < count; ++i) {
        std::string full(prefix);
        if (range) full += std::to_string(i);
        scope.registers[take_view(full)] = int(function.registers.size());
        function.registers.push_back({std::move(full), *type});
      }
    } while (accept(','));
    expect(';');
  }

  void parse_branch_targets(Function& function, int scope, const Token& label) {
    const int table = int(function.branch_tables.size());
    if (!scopes_[scope].tables.emplace(label.text, table).second) {
      fail("the label is defined twice", label);
    }
    function.branch_tables.emplace_back();
    do {
      const Token target = peek();
      expect_name();
      uses_.push_back({target, scope, -1, -1, table});
    } while (accept(','));
    expect(';');
  }

  // ---- instructions

  void parse_instruction(Function& function, int scope) {
    Statement statement;
    const Token first = peek();
    const std::size_t begin = at_;
    statement.line = first.line;
    statement.location = source_.current();
    if (accept('@')) {
      statement.guard_negated = accept('!');
      const Token guard = peek();
      statement.guard = find_register(scope, expect_name());
      if (statement.guard < 0 || function.registers[statement.guard].type != Type::pred) {
        fail("the guard is not a predicate", guard);
      }
    }
    statement.opcode = expect_name();
    while (peek().kind == Token::Kind::suffix) statement.modifiers.emplace_back(take().text);
    if (!peek().is(';')) {
      do statement.operands.push_back(parse_operand(function, scope, 0));
      while (accept(','));
    }
    if (!peek().is(';')) fail("expected ',' or ';'", peek());
    statement.text = text_between(tokens_[begin], take());
    for (std::size_t i = 0; i < statement.operands.size(); ++i) {
      if (statement.operands[i].kind == Operand::Kind::symbol &&
          (statement.opcode == "bra" || statement.opcode == "brx")) {
        uses_.push_back({first, scope, int(function.statements.size()), int(i), -1});
      }
    }
    function.statements.push_back(std::move(statement));
  }

  // What stands from token `first` up to token `last`, blanks squeezed and comments dropped.
  std::string text_between(const Token& first, const Token& last) const {
    std::string text;
    bool blank = false;
    for (const char* c = first.text.data(); c < last.text.data(); ++c) {
      if (c[0] == '/' && c[1] == '/') {
        while (c + 1 < last.text.data() && c[1] != '\n') ++c;
      } else if (std::isspace(static_cast<unsigned char>(*c))) {
        blank = true;
      } else {
        if (blank && !text.empty()) text += ' ';
        blank = false;
        text += *c;
      }
    }
    return text;
  }

  int find_register(int scope, std::string_view name) const {
    for (; scope >= 0; scope = scopes_[scope].parent) {
      const auto found = scopes_[scope].registers.find(name);
      if (found != scopes_[scope].registers.end()) return found->second;
    }
    return -1;
  }

  Operand parse_operand(const Function& function, int scope, int depth) {
    Operand operand = parse_single_operand(function, scope, depth);
    if (accept('|')) {
      Operand pair;
      pair.kind = Operand::Kind::vector;
      pair.children.push_back(std::move(operand));
      pair.children.push_back(parse_single_operand(function, scope, depth));
      return pair;
    }
    return operand;
  }

  Operand parse_single_operand(const Function& function, int scope, int depth) {
    if (depth > DEEPEST) fail("operands are nested too deeply", peek());
    const Token token = peek();
    Operand operand;
    if (accept('!')) {
      operand = parse_single_operand(function, scope, depth + 1);
      operand.negated = !operand.negated;
      return operand;
    }
    if (accept('{')) return parse_list(function, scope, depth, '}');
    if (accept('(')) return parse_list(function, scope, depth, ')');
    if (accept('[')) {
      operand = parse_list(function, scope, depth, ']');
      operand.kind = Operand::Kind::address;
      if (operand.children.empty()) fail("the address is empty", token);
      return operand;
    }
    if (peek().is('-') || peek().kind == Token::Kind::number) {
      const bool negative = accept('-');
      operand = parse_number();
      if (negative) {
        switch (operand.kind) {
          case Operand::Kind::single:
            operand.bits ^= std::uint64_t(1) << 31;
            break;
          case Operand::Kind::real:
            operand.bits ^= std::uint64_t(1) << 63;
            break;
          default:
            operand.bits = -operand.bits;
        }
      }
      return operand;
    }
    const std::string_view name = expect_name();
    if (name == "_") return operand;
    operand.index = find_register(scope, name);
    if (operand.index >= 0) {
      operand.kind = Operand::Kind::reg;
      if (peek().kind == Token::Kind::suffix) fail("a part of a register is not supported", token);
    } else if (name == "WARP_SZ") {
      operand.kind = Operand::Kind::integer;
      operand.bits = 32;
      return operand;
    } else {
      operand.kind = Operand::Kind::symbol;
      operand.name = name;
      if (name[0] == '%' && peek().kind == Token::Kind::suffix) {
        operand.name += '.';
        operand.name += take().text;
      }
      operand.index = find_variable(scope, name);
    }
    if (accept('+')) {
      operand.offset = std::int64_t(expect_integer());
    } else if (peek().is('-')) {
      operand.offset = std::int64_t(expect_integer());
    }
    return operand;
  }

  int find_variable(int scope, std::string_view name) const {
    for (; scope >= 0; scope = scopes_[scope].parent) {
      const auto found = scopes_[scope].variables.find(name);
      if (found != scopes_[scope].variables.end()) return found->second;
    }
    return -1;
  }

  Operand parse_list(const Function& function, int scope, int depth, char close) {
    Operand list;
    list.kind = Operand::Kind::vector;
    if (accept(close)) return list;
    do list.children.push_back(parse_operand(function, scope, depth + 1));
    while (accept(','));
    expect(close);
    return list;
  }

  // ---- labels, which may be used before they are defined

  struct LabelUse {
    Token token;
    int scope;
    int statement;  // or -1
    int operand;
    int table;  // whose entry it is, or -1
  };

  void resolve_labels(Function& function) {
    for (const LabelUse& use : uses_) {
      Operand* operand =
          use.statement < 0 ? nullptr : &function.statements[use.statement].operands[use.operand];
      const std::string_view name = operand ? std::string_view(operand->name) : use.token.text;
      bool found = false;
      for (int scope = use.scope; scope >= 0 && !found; scope = scopes_[scope].parent) {
        const Scope& names = scopes_[scope];
        if (const auto label = names.labels.find(name); label != names.labels.end()) {
          found = true;
          if (operand) {
            operand->kind = Operand::Kind::label;
            operand->index = label->second;
          } else {
            function.branch_tables[use.table].push_back(label->second);
          }
        } else if (const auto table = names.tables.find(name);
                   operand && table != names.tables.end()) {
          found = true;
          operand->kind = Operand::Kind::table;
          operand->index = table->second;
        }
      }
      if (!found) fail("there is no label " + std::string(name), use.token);
    }
  }

  std::string_view text_;
  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  Module module_;
  SourceMap source_;
  std::vector<Scope> scopes_;  // of the function that is being parsed; the first is its body
  std::vector<LabelUse> uses_;
  std::vector<std::unique_ptr<std::string>> names_;
};

}  // namespace

Module parse(std::string_view text) { return Parser(text).run(); }

}  // namespace evsam::simt

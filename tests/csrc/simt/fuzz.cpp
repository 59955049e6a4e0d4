// Breaks texts of PTX at random, and parses, decodes and runs what is left: malformed text is an
// error, a broken kernel has faults, and neither ever reads or writes where it must not.
//
// fuzz ROUNDS FILE... ; built with sanitizers, which end the program where something is wrong.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"
#include "program.h"

using namespace evsam::simt;

namespace {

using Random = std::mt19937;

std::size_t below(Random& random, std::size_t bound) {
  return random() % std::max<std::size_t>(bound, 1);
}

// One change: a byte, a piece taken away, a piece of another place put in, two words swapped.
void change(std::string& text, Random& random) {
  if (text.empty()) return;
  const std::size_t at = below(random, text.size());
  const std::size_t length = 1 + below(random, 1 << below(random, 6));
  switch (std::min<std::size_t>(below(random, 12), 7)) {
    case 0:
      text[at] = char(random());
      break;
    case 1:
      text.erase(at, length);
      break;
    case 2:
      text.insert(at, text.substr(below(random, text.size()), length));
      break;
    case 3: {
      static const char* const PIECES[] = {"0",
                                           "-1",
                                           "0xffffffffffffffff",
                                           "99999999999",
                                           "%r1",
                                           "%rd1",
                                           "%p1",
                                           "{",
                                           "}",
                                           "[",
                                           "]",
                                           ";",
                                           ",",
                                           "@!%p1 ",
                                           ".v4",
                                           ".wide",
                                           ".u8",
                                           ".f64",
                                           ".pred",
                                           ".shared",
                                           ".local",
                                           ".param",
                                           "bar.sync 0;",
                                           "ret;",
                                           "bra ",
                                           "// ",
                                           "/*",
                                           "\"",
                                           ".align 4096",
                                           "0f7FC00000",
                                           "_"};
      text.insert(at, PIECES[below(random, std::size(PIECES))]);
      break;
    }
    case 4: {  // a line in another place
      const std::size_t begin = text.rfind('\n', at);
      const std::size_t end = text.find('\n', at);
      if (begin == std::string::npos || end == std::string::npos) break;
      const std::string line = text.substr(begin, end - begin);
      text.erase(begin, end - begin);
      const std::size_t to = text.find('\n', below(random, text.size()));
      if (to != std::string::npos) text.insert(to, line);
      break;
    }
    default: {  // a number, an operand or a modifier for another that begins alike
      static const char BREAKS[] = " \t\n,;.[]{}";
      const auto word = [&](std::size_t start) {
        const std::size_t end = text.find_first_of(BREAKS, start + 1);
        return text.substr(start + 1, end == std::string::npos ? end : end - start - 1);
      };
      const std::size_t from = text.find_first_of(BREAKS, at);
      if (from == std::string::npos) break;
      const std::string old = word(from);
      for (int attempt = 0; attempt < 50; ++attempt) {
        const std::size_t other = text.find_first_of(BREAKS, below(random, text.size()));
        if (other == std::string::npos) continue;
        const std::string taken = word(other);
        if (taken != old && taken[0] == old[0]) {
          text.replace(from + 1, old.size(), taken);
          break;
        }
      }
    }
  }
}

// How far a text got.
struct Tally {
  int refused = 0, launched = 0, with_faults = 0;
};

void run(const std::string& text, Random& random, Tally& tally) {
  std::vector<std::uint64_t> memory(4096);
  try {
    Program program(text);
    for (const auto& kernel : program.kernels()) {
      LaunchOptions options;
      options.grid = {2, 1, 1};
      options.block = {kernel->required_block[0] ? kernel->required_block[0] : 40, 1, 1};
      options.dynamic_shared = 4096;
      options.check = below(random, 4) != 0;
      options.threads = 1 + int(below(random, 2));
      options.step_limit = 3000;
      options.buffers = {{"memory", reinterpret_cast<std::uint64_t>(memory.data()),
                          memory.size() * 8, true, below(random, 2) == 0}};
      options.parameters.resize(kernel->parameter_bytes);
      for (std::size_t i = 0; i < kernel->parameters.size(); ++i) {
        const std::uint64_t value = kernel->parameters[i].size == 8
                                        ? reinterpret_cast<std::uint64_t>(memory.data())
                                        : below(random, 200);
        const auto* bytes = reinterpret_cast<const std::byte*>(&value);
        std::copy_n(bytes, std::min<std::uint64_t>(8, kernel->parameters[i].size),
                    options.parameters.begin() + kernel->parameter_offsets[i]);
      }
      const LaunchResult result = launch(program, kernel->name, options, [] { return false; });
      ++tally.launched;
      tally.with_faults += !result.faults.empty();
    }
  } catch (const std::exception& error) {
    ++tally.refused;
    if (error.what()[0] == '\0') std::abort();
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    std::fprintf(stderr, "usage: fuzz ROUNDS FILE...\n");
    return 2;
  }
  const int rounds = std::atoi(arguments[1]);
  Tally tally;
  for (int i = 2; i < count; ++i) {
    std::ifstream file(arguments[i]);
    const std::string original{std::istreambuf_iterator<char>(file), {}};
    for (int round = 0; round < rounds; ++round) {
      Random random(round);
      std::string text = original;
      for (std::size_t n = round == 0 ? 0 : 1 + below(random, 2); n > 0; --n) change(text, random);
      run(text, random, tally);
    }
  }
  std::printf("%d refused, %d launched, %d with faults\n", tally.refused, tally.launched,
              tally.with_faults);
  return 0;
}

// Picks, at run time, the instruction set whose copy of the kernels runs.
//
// This file is compiled once, for the baseline, and so are the standard library's templates that it
// uses. The idea is that of ggml's CPU variants, within one shared library.

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "evsam/attend_keys.h"
#include "evsam/attend_tokens.h"
#include "evsam/conv_act.h"
#include "evsam/feed_forward.h"
#include "evsam/fused_mbconv.h"
#include "evsam/isa.h"
#include "evsam/layer_norm_2d.h"
#include "evsam/map_values.h"
#include "evsam/mbconv.h"
#include "evsam/measure_masks.h"
#include "evsam/multi_scale_attention.h"
#include "evsam/relu_linear_attention.h"
#include "evsam/update_keys.h"
#include "evsam/upsample_add.h"
#include "evsam/upscale_masks.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// Every operation that has CPU kernels: the function and the type of its argument.
#define EVSAM_OPERATIONS(X)                          \
  X(conv_act, ConvActArgs)                           \
  X(fused_mbconv, FusedMBConvArgs)                   \
  X(mbconv, MBConvArgs)                              \
  X(relu_linear_attention, ReluLinearAttentionArgs)  \
  X(multi_scale_attention, MultiScaleAttentionArgs)  \
  X(layer_norm_2d, LayerNorm2dArgs)                  \
  X(upsample_add, UpsampleAddArgs)                   \
  X(measure_masks, MeasureMasksArgs)                 \
  X(resize_masks, ResizeMasksArgs)                   \
  X(attend_keys, AttendKeysArgs)                     \
  X(attend_tokens, AttendTokensArgs)                 \
  X(feed_forward, FeedForwardArgs)                   \
  X(map_values, MapValuesArgs)                       \
  X(update_keys, UpdateKeysArgs)                     \
  X(upscale_masks, UpscaleMasksArgs)

// Those whose weights are packed, and the type of the weights.
#define EVSAM_PACKED_OPERATIONS(X)         \
  X(conv_act_pack, ConvActWeights)         \
  X(fused_mbconv_pack, FusedMBConvWeights) \
  X(mbconv_pack, MBConvWeights)            \
  X(multi_scale_attention_pack, MultiScaleAttentionWeights)

namespace evsam {
namespace {

struct Kernels {
#define EVSAM_MEMBER(operation, Args) void (*operation)(const Args&);
  EVSAM_OPERATIONS(EVSAM_MEMBER)
#define EVSAM_PACK_MEMBER(pack, Weights) std::int64_t (*pack)(const Weights&, void*);
  EVSAM_PACKED_OPERATIONS(EVSAM_PACK_MEMBER)
};

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*runs_here)();
  bool (*gains_here)();  // Whether it is any faster than those before it.
};

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system saves the registers. It does not
// know f16c and avx512bf16 in every compiler we support; these use the same registers.
bool has_avx2() {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() {
  constexpr unsigned avx512_bf16_bit = 1u << 5;
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx512_bf16_bit);
}

// AMD's processors gain by it. On Intel's, which have AMX for that, the instruction takes so long that products
// come at half the rate of float32 (an Emerald Rapids: 2 cycles, for twice the products, against half a cycle).
bool multiplies_bfloat16_faster() { return __builtin_cpu_is("amd"); }
#endif

}  // namespace

#define EVSAM_DECLARE(operation, Args) void operation(const Args&);
#define EVSAM_PACK_DECLARE(pack, Weights) std::int64_t pack(const Weights&, void*);
#define EVSAM_ADDRESS(function, Args) function,
#define EVSAM_KERNELS_OF(isa)                                         \
  namespace isa {                                                     \
  EVSAM_OPERATIONS(EVSAM_DECLARE)                                     \
  EVSAM_PACKED_OPERATIONS(EVSAM_PACK_DECLARE)                         \
  static const Kernels kernels = {EVSAM_OPERATIONS(EVSAM_ADDRESS)     \
                                  EVSAM_PACKED_OPERATIONS(EVSAM_ADDRESS)}; \
  }

EVSAM_KERNELS_OF(portable)
#if defined(EVSAM_WITH_AVX2)
EVSAM_KERNELS_OF(avx2)
#endif
#if defined(EVSAM_WITH_AVX512)
EVSAM_KERNELS_OF(avx512)
#endif
#if defined(EVSAM_WITH_AVX512_BF16)
EVSAM_KERNELS_OF(avx512_bf16)
#endif

namespace {

const Isa compiled_in[] = {
    {"portable", &portable::kernels, always, always},
#if defined(EVSAM_WITH_AVX2)
    {"avx2", &avx2::kernels, has_avx2, always},
#endif
#if defined(EVSAM_WITH_AVX512)
    {"avx512", &avx512::kernels, has_avx512, always},
#endif
#if defined(EVSAM_WITH_AVX512_BF16)
    {"avx512_bf16", &avx512_bf16::kernels, has_avx512_bf16, multiplies_bfloat16_faster},
#endif
};

const Isa* fastest() {
  const Isa* found = nullptr;
  for (const Isa& isa : compiled_in)
    if (isa.runs_here() && isa.gains_here()) found = &isa;
  return found;
}

const Isa* find(const std::string& asked_by, const std::string& name) {
  std::string accepted;
  for (const Isa& isa : compiled_in) {
    if (!isa.runs_here()) continue;
    if (name == isa.name) return &isa;
    accepted += (accepted.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument(asked_by + " must be one of " + accepted +
                              " (what was built and runs on this CPU), got '" + name + "'");
}

std::atomic<const Isa*> in_use{nullptr};

const Isa& current() {
  const Isa* isa = in_use.load(std::memory_order_relaxed);
  if (isa == nullptr) {
    const char* wanted = std::getenv("EVSAM_CPU_ISA");
    isa = wanted == nullptr || *wanted == '\0' ? fastest() : find("EVSAM_CPU_ISA", wanted);
    in_use.store(isa, std::memory_order_relaxed);
  }
  return *isa;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : compiled_in)
    if (isa.runs_here()) names.push_back(isa.name);
  return names;
}

std::string isa() { return current().name; }

void use_isa(const std::string& name) { in_use.store(find("isa", name)); }

#define EVSAM_DEFINE(operation, Args) \
  void operation(const Args& args) { current().kernels->operation(args); }
EVSAM_OPERATIONS(EVSAM_DEFINE)
#define EVSAM_PACK_DEFINE(pack, Weights)                      \
  std::int64_t pack(const Weights& weights, void* packed) {   \
    return current().kernels->pack(weights, packed);          \
  }
EVSAM_PACKED_OPERATIONS(EVSAM_PACK_DEFINE)

}  // namespace evsam

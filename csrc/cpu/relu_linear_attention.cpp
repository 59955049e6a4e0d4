// ReLU linear attention (arXiv 2205.14756, equation 3) over the pixels of a map.
//
// Layout: NHWC with q, k and v of a head side by side. Tile: one head of one image for each thread, copied
// to float32, so that float16 cannot overflow the sums. On chip: the head, and in L1 its state of
// head_dim * (head_dim + 1) sums. Main memory: qkv and y once.

#include "evsam/relu_linear_attention.h"

#include "attention.h"
#include "map.h"
#include "parallel.h"
#include "scratch.h"

namespace evsam::EVSAM_ISA {
namespace {

template <class Storage>
void run(const ReluLinearAttentionArgs& args) {
  const std::int64_t dim = args.head_dim, heads = args.heads, tokens = args.tokens;
  Pieces counted;
  const Head one(counted, tokens, dim);
  const Scratch memory = scratch(counted.bytes(), args.num_threads);
  const Output<Storage> output{static_cast<Storage*>(args.y), nullptr, heads * dim};
  const std::int64_t operations = args.batch * heads * tokens * dim * dim;
  parallel(args.num_threads, operations, [&](int member) {
    Pieces pieces(own_piece(memory, member));
    const Head head(pieces, tokens, dim);
    for_each(args.batch * heads, [&](std::int64_t task) {
      const std::int64_t image = task / heads, index = task % heads;
      const auto* from = static_cast<const Storage*>(args.qkv) +
                         (image * tokens * heads + index) * 3 * dim;
      for (std::int64_t n = 0; n < tokens; ++n, from += heads * 3 * dim)
        for (std::int64_t d = 0; d < head.width; d += lanes) {
          const std::int64_t at = n * head.width + d, count = most(dim - d, 0);
          store(head.q + at, load(from + d, count));
          store(head.k + at, load(from + dim + d, count));
          store(head.v + at, load(from + 2 * dim + d, count));
        }
      attend(head, static_cast<float>(args.eps),
             [&](std::int64_t token) { return output.line(image * tokens + token, index * dim, dim); });
    });
  });
}

}  // namespace

void relu_linear_attention(const ReluLinearAttentionArgs& args) {
  switch (args.dtype) {
    case DType::float16: return run<Float16>(args);
    case DType::bfloat16: return run<BFloat16>(args);
    default: return run<float>(args);
  }
}

}  // namespace evsam::EVSAM_ISA

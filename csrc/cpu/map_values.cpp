// Values of tokens times a table, which gives the mask decoder's vectors their rows.
//
// Tile: a few rows and two vectors of columns, in registers. A product's inner dimension is that of a head,
// 16: what is written is most of the work. Main memory: rows once; the tables from L2 or L3. Threads take
// the blocks of prompts.

#include "evsam/map_values.h"

#include "parallel.h"
#include "positions.h"

namespace evsam::EVSAM_ISA {
namespace {

// Writes `count` rows from `row` on.
void write_rows(const MapValuesArgs& args, std::int64_t prompt, std::int64_t row, std::int64_t count,
                const Product& product) {
  const std::int64_t rank = args.block_count * (args.heads * args.others + 1);
  for (std::int64_t group = 0; group < args.groups; ++group) {
    const float* table = product.b + group * args.columns;
    float* rows = args.rows + ((prompt * args.groups + group) * rank + row) * args.columns;
    over_panels(count, [&](std::int64_t begin, std::int64_t some) {
      const float* a = product.a + begin;
      float* c = rows + begin * args.columns;
      const auto columns_at = [&](std::int64_t at) {
        return Product{product.inner, a, product.a_stride, table + at, product.b_stride};
      };
      std::int64_t at = 0;
      for (; at + 2 * lanes <= args.columns; at += 2 * lanes)
        columns_of_panel<2>(some, columns_at(at), 0, Store{c + at, zeros, args.columns});
      for (; at + lanes <= args.columns; at += lanes)
        columns_of_panel<1>(some, columns_at(at), 0, Store{c + at, zeros, args.columns});
      for (; at < args.columns; ++at)
        for (std::int64_t i = 0; i < some; ++i) {
          float sum = 0;
          for (std::int64_t k = 0; k < product.inner; ++k)
            sum += a[k * product.a_stride + i] * table[k * product.b_stride + at];
          c[i * args.columns + at] = sum;
        }
    });
  }
}

}  // namespace

void map_values(const MapValuesArgs& args) {
  const std::int64_t head_dim = args.head_dim, inner = args.heads * head_dim, others = args.others;
  const std::int64_t all_columns = args.groups * args.columns;
  const std::int64_t tasks = args.batch * args.block_count;
  parallel(args.num_threads, tasks * inner * (others + 1) * all_columns, [&](int) {
    for_each(tasks, [&](std::int64_t task) {
      const std::int64_t prompt = task / args.block_count, block_index = task % args.block_count;
      const MappedValues& of = args.blocks[block_index];
      const std::int64_t first_row = block_index * (args.heads * others + 1);
      for (std::int64_t head = 0; head < args.heads; ++head)
        write_rows(args, prompt, first_row + head * others, others,
                   {head_dim, of.differences + (prompt * args.heads + head) * head_dim * others, others,
                    of.table + head * head_dim * all_columns, all_columns});
      write_rows(args, prompt, first_row + args.heads * others, 1,
                 {inner + 1, of.last + prompt * (inner + 1), 1, of.table, all_columns});
    });
  });
}

}  // namespace evsam::EVSAM_ISA

// paged_prefill.cu's attention on Hopper, by warpgroups whose tensor cores read shared memory by
// themselves (wgmma.cuh).
//
// The warps' roles and the order of their work are those of Shah et al. 2024 (FlashAttention-3). A
// thread block has two or three warpgroups that multiply, each with 64 of a tile's columns, and one
// that copies. K and V of 128 positions, a step, are gathered from the pages into a ring of stages
// that all multiplying warpgroups read. Barriers tell that K or V of a stage is there (`full`), and
// that nobody reads it any more (`free`): copies wait for nothing else, and those of a tile begin
// while the one before is still multiplied. As many thread blocks as there are multiprocessors draw
// the tiles one after the other, a row's last ones first, as they see most positions.
//
// Of a step, a warpgroup:
//   scores = Q K^T           begun, and right after it
//   values += weights V      of the step before, under way until the new weights are known
//   weights = 2^(scores - the maximum)
//   values *= 2^(the maximum before - the maximum), where it moved
// The products of one warpgroup are under way while others find weights. Scores, weights and values
// stay in registers: 64, 32 and D / 2 of a thread. Results go out of registers, by four lanes that
// swap until each has 16 bytes.
//
//   head_dim                     64       96, 128
//   columns of a tile            192      128
//   queries                      shared   registers: 24 or 32
//   registers                    160      224      and of those that copy 32, 56
//   stages                       4        3
//   shared, kB                   180      229
// A step of 64 channels takes the tensor cores as long as the special-function units take for its
// weights, and two warpgroups that wait for each product and each maximum leave gaps in both: so
// there are three. Head_dim 96 has the place of 128 in shared memory, and values of its last 32
// channels that nobody reads.
//
// The bits of a query depend on its row's K and V up to it, and on nothing else: steps begin at
// multiples of 128 wherever its tile begins, columns do not see each other, and a step that a
// column does not see multiplies by 1 and adds zeros. They are not those of paged_prefill.cu, whose
// steps are half as long.
//
// H200, bfloat16, pages of 16, us, beside paged_prefill.cu and SDPA's flash kernel without pages:
//                            32 q, 8 kv heads of 64      24 q, 8 kv heads of 128
//   8 x 4096                   1282   1893   1894          1647   2762   2578
//   1 x 8192                    598    906   1003           786   1338   1341
//   8 x 512 after 3,584         313    455    446           415    786    603
// 430 and 500 TFLOP/s, 55 and 64 % of a matrix product's rate. Tried: warpgroups that take turns at
// beginning products, so that one's are under way while others find weights, 2 % slower: they fall
// into step by themselves; two warpgroups for 64 channels 16 %, two stages for 128 11 % slower.
// Few new tokens over many cached ones leave the last tiles alone with long walks; a split over
// positions is what to try there.

#include <algorithm>
#include <type_traits>

#include "async_copy.cuh"
#include "exponential.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "matrix.cuh"
#include "prefill_deal.cuh"
#include "roles.cuh"
#include "rows.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

namespace reasoners {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kStep = 128;   // positions; each warp that copies has 32 of them
constexpr int kCopiersBarrier = 1, kGroupBarrier = 2;  // the latter of each multiplying warpgroup

template <typename data, int dim, int groups, int places, bool held>
struct Shape {
  using data_t = data;
  static constexpr int kDim = dim, kWidth = (dim + 63) / 64 * 64;
  static constexpr int kGroups = groups, kStages = places;
  // Queries in registers leave shared memory to those of the next tile.
  static constexpr bool kHeld = held;
  static constexpr int kTiles = kHeld ? 1 : 2;
  static constexpr int kColumns = 64 * kGroups, kThreads = kGroup * (1 + kGroups);
  // Of the threads that copy and of those that multiply, of 168 or 128 at the start.
  static constexpr int kCopierRegisters = kGroups == 2 ? 56 : 32;
  static constexpr int kWorkerRegisters = kGroups == 2 ? 224 : 160;

  struct Stage {
    Panels<data_t, kStep, kWidth> k, v;
  };
  struct Shared {
    Panels<data_t, kColumns, kWidth> columns[kTiles];  // queries
    Stage stages[kStages];
    PrefillTask tasks[kTiles + 1];  // read after the queries have been left
    uint64_t columns_full[kTiles], columns_free[kTiles];
    uint64_t k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
  };
};

// As far as the last query of the task sees.
__device__ inline int steps_of(const PrefillTask& task) {
  return (max(task.end(), 0) + kStep - 1) / kStep;
}

// p.tickets: how many tiles have been drawn beside the first of each thread block, and how many
// thread blocks found none any more.
template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1)
    prefill_wgmma_kernel(const PagedAttentionParams p, const PageSize pages, const PrefillDeal deal,
                         const int count) {
#ifdef REASONERS_WGMMA
  using data_t = typename T::data_t;
  constexpr int kDim = T::kDim, kWidth = T::kWidth, kGroups = T::kGroups, kStages = T::kStages;
  constexpr bool kHeld = T::kHeld;
  constexpr int kTiles = T::kTiles;
  // A line is a vector of kDim; a warp copies kLines of them at once, 16 bytes a lane.
  constexpr int kRuns = kWidth / 8, kLines = 32 / kRuns;
  extern __shared__ __align__(1024) char shared_memory[];
  auto& shared = *reinterpret_cast<typename T::Shared*>(shared_memory);
  const int warp = same_in_warp(static_cast<int>(threadIdx.x) / 32), lane = threadIdx.x % 32;
  const int line = lane / kRuns, run = lane % kRuns;
  let_next_start();
  wait_for_inputs();
  if (threadIdx.x == 0) {
    for (int b = 0; b < kTiles; ++b) {
      init_barrier(&shared.columns_full[b], kGroup + 1);
      init_barrier(&shared.columns_free[b], kGroups * kGroup / 32);
    }
    for (int s = 0; s < kStages; ++s) {
      init_barrier(&shared.k_full[s], kGroup);
      init_barrier(&shared.v_full[s], kGroup);
      init_barrier(&shared.k_free[s], kGroups * kGroup / 32);
      init_barrier(&shared.v_free[s], kGroups * kGroup / 32);
    }
  }
  __syncthreads();

  if (warp < kGroup / 32) {
    keep_registers<T::kCopierRegisters>();
    // visit(i, the place of line i, where this lane's run of it goes to) of 32 lines, of which this
    // lane knows the place of line `mine`, and the first of which lies at `first`.
    const int mine = run * kLines + line;
    const auto each_line = [&](const auto& panels, int first, auto place, const auto& visit) {
      const uint32_t to = shared_address(&panels) + panels.offset(line, run) + first * 128;
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        const auto at = __shfl_sync(kAll, place, i, kRuns);
        if (run * 8 < kDim)
          visit(i * kLines + line, at, (to ^ i * kLines % 8 * 16) + i * kLines * 128);
      }
    };
    // This lane's run of a vector, without sums of what is the same for all lanes and what is not.
    const auto first_of = [&](const void* data) {
      const auto* from = static_cast<const data_t*>(data) + run * 8;
      asm volatile("" : "+l"(from));
      return from;
    };
    const auto *q = first_of(p.q), *k_cache = first_of(p.k_cache), *v_cache = first_of(p.v_cache);
    int next = static_cast<int>(blockIdx.x);  // in the first thread
    unsigned n = 0;                           // steps so far
#pragma unroll 1
    for (int turn = 0;; ++turn) {
      const int b = turn % kTiles;
      if (turn >= kTiles) wait_for(&shared.columns_free[b], (turn / kTiles - 1) & 1);
      if (warp == 0) {
        PrefillTask task;
        do {
          const int number = same_in_warp(next);
          task.tile.row = -1;
          if (number >= count) break;
          if (lane == 0) next = static_cast<int>(gridDim.x + atomicAdd(&p.tickets[0], 1u));
          task = find_task(p, deal, number);
        } while (task.tile.queries <= 0);
        if (lane == 0) shared.tasks[turn % (kTiles + 1)] = task;
      }
      wait_at<kCopiersBarrier, kGroup>();
      const PrefillTask& task = shared.tasks[turn % (kTiles + 1)];
      const int row = task.tile.row;
      if (row >= 0) {
#pragma unroll 1
        for (int first = warp * 32; first < T::kColumns; first += kGroup) {
          const int query = (first + mine) / deal.heads, head = (first + mine) % deal.heads;
          const bool is_there = query < task.tile.queries && head < task.heads;
          const int64_t token = task.tile.token + query;
          const int64_t source =
              is_there ? token * p.q_stride + int64_t(task.first_head + head) * kDim : -1;
          each_line(shared.columns[b], first, source, [&](int, int64_t at, uint32_t to) {
            copy_async_once(to, q + (at < 0 ? 0 : at), at < 0 ? 0 : 16);
          });
        }
      }
      arrive_after_copies(&shared.columns_full[b]);
      if (threadIdx.x == 0) arrive(&shared.columns_full[b]);  // the task is there
      if (row < 0) break;

      // Places are counted in vectors. Positions past the end are zeros: weights of 0 would make
      // NaN of NaN.
      const int end = task.end(), steps = steps_of(task), kv_head = task.kv_head;
      const int32_t* table = p.page_table + row * p.table_stride;
      const auto look_up = [&](int step) {
        const int position = min(step * kStep + warp * 32 + mine, end - 1);
        const int page = pages.page(position);
        return (__ldg(&table[page]) * p.kv_heads + kv_head) * p.page_size +
               (position - page * p.page_size);
      };
      int place = steps > 0 ? look_up(0) : 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step, ++n) {
        const int after = look_up(step + 1);
        const int left = end - step * kStep - warp * 32;
        const unsigned s = n % kStages;
        auto& stage = shared.stages[s];
        const auto wait_for_place = [&](uint64_t* free) {
          if (n >= kStages) wait_for(&free[s], (n / kStages - 1) & 1);
        };
        const auto copy = [&](auto takes_k, auto takes_v) {
          const auto copy_lines = [&](auto all) {
            each_line(stage.k, warp * 32, place, [&](int i, int at, uint32_t to) {
              const int bytes = all || i < left ? 16 : 0;
              if (takes_k) copy_async_once(to, k_cache + int64_t(at) * kDim, bytes);
              if (takes_v)
                copy_async_once(to + sizeof(stage.k), v_cache + int64_t(at) * kDim, bytes);
            });
          };
          left >= 32 ? copy_lines(std::true_type()) : copy_lines(std::false_type());
        };
        // Together takes fewer instructions, which the other warps have to wait for; apart, K has
        // its place sooner.
        if (kStages > 3) {
          wait_for_place(shared.k_free);
          wait_for_place(shared.v_free);
          copy(std::true_type(), std::true_type());
          arrive_after_copies(&shared.k_full[s]);
        } else {
          wait_for_place(shared.k_free);
          copy(std::true_type(), std::false_type());
          arrive_after_copies(&shared.k_full[s]);
          wait_for_place(shared.v_free);
          copy(std::false_type(), std::true_type());
        }
        arrive_after_copies(&shared.v_full[s]);
        place = after;
      }
    }
    wait_copies();
    if (threadIdx.x == 0 && atomicAdd(&p.tickets[1], 1u) == gridDim.x - 1)
      p.tickets[0] = p.tickets[1] = 0;
    return;
  }

  take_registers<T::kWorkerRegisters>();
  constexpr int kDepth = kDim / 16, kScores = kStep / 8, kValues = kWidth / 8;
  const int w = warp / 4 - 1, r = warp % 4, g = lane / 4, t = lane % 4;
  const float scale = positive_scale(p.scale);
  const uint32_t sign = p.scale < 0.f ? 0x80008000u : 0u;
  auto* out = static_cast<data_t*>(p.out);

  const auto leave = [&](uint64_t* free) {
    __syncwarp();
    if (lane == 0) arrive(free);
  };
  const auto wait_for_k = [&](unsigned n) {
    wait_for(&shared.k_full[n % kStages], n / kStages & 1);
  };
  const auto wait_for_v = [&](unsigned n) {
    wait_for(&shared.v_full[n % kStages], n / kStages & 1);
  };
  const auto leave_k = [&](unsigned n) { leave(&shared.k_free[n % kStages]); };
  const auto leave_v = [&](unsigned n) { leave(&shared.v_free[n % kStages]); };
  // The warpgroup's threads.
  const auto meet = [&] { wait_at<kGroup>(kGroupBarrier + w); };

  uint64_t rows = 0;  // of queries, in shared memory
  uint32_t held[kHeld ? kDepth : 1][4], weights[kStep / 16][4];
  float score[kScores][4], values[kValues][4];
  const auto begin_scores = [&](unsigned n) {
    const uint64_t k = describe(shared.stages[n % kStages].k);
    begin_products();
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
      if constexpr (kHeld)
        multiply_held<data_t>(score, held[i], k + depth_step<kStep>(i), i > 0);
      else
        multiply_shared<data_t>(score, rows + depth_step<T::kColumns>(i), k + depth_step<kStep>(i),
                                i > 0);
    commit_products();
  };
  const auto begin_values = [&](unsigned n) {
    const uint64_t v = describe_tall(shared.stages[n % kStages].v);
    begin_products();
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i)
      multiply_tall<data_t>(values, weights[i], v + tall_step(i));
    commit_products();
  };

  unsigned n = 0;  // steps so far
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    const int b = turn % kTiles;
    wait_for(&shared.columns_full[b], turn / kTiles & 1);
    const PrefillTask& task = shared.tasks[turn % (kTiles + 1)];
    if (same_in_warp(task.tile.row) < 0) break;
    const int queries = same_in_warp(task.tile.queries);
    const int position = same_in_warp(task.tile.position);
    const int steps = same_in_warp(steps_of(task));
    auto& columns = shared.columns[b];

    // What the warpgroup's columns see: its first column less than all others.
    const int first_query = w * 64 / deal.heads;
    const int last_query = min((w * 64 + 63) / deal.heads, queries - 1);
    const int first_end = position + first_query + 1;
    const int mine =
        first_query <= last_query ? (max(position + last_query + 1, 0) + kStep - 1) / kStep : 0;
    const int first_row = w * 64 + r * 16;  // of the warp's columns
    int seen[2];                            // of this thread's two columns, positions
#pragma unroll
    for (int h = 0; h < 2; ++h)
      seen[h] = position + 1 + min((first_row + h * 8 + g) / deal.heads, queries - 1);

    auto* from = reinterpret_cast<char*>(&columns);
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        load_matrices(held[i], from + columns.offset(first_row + lane % 16, 2 * i + lane / 16));
#pragma unroll
        for (int j = 0; j < 4; ++j) held[i][j] ^= sign;
      }
      leave(&shared.columns_free[b]);
    } else {
      rows = describe(columns) + w * (64 * 128 / 16);
      if (sign != 0) {
        for (int i = line; i < 16; i += kLines) {
          auto& chunk =
              *reinterpret_cast<Vec<uint32_t, 4>*>(from + columns.offset(first_row + i, run));
#pragma unroll
          for (int j = 0; j < 4; ++j) chunk.at[j] ^= sign;
        }
        show_to_copies();
        meet();
      }
    }
    float max[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kValues; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] = 0.f;

    // The maximum is subtracted scaled, so that one rounding of it serves all steps.
    const auto weigh = [&](int step, float (&fade)[2]) {
      const int begin = step * kStep;
      if (begin + kStep > first_end) {
#pragma unroll
        for (int i = 0; i < kScores; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (8 * i + j % 2 >= seen[j / 2] - begin - 2 * t) score[i][j] = kMinusInfinity;
      }
      float top[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float largest = kMinusInfinity;
#pragma unroll
        for (int i = 0; i < kScores; ++i)
          largest = fmaxf(largest, fmaxf(score[i][2 * h], score[i][2 * h + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 2));
        const float now = fmaxf(max[h], __fmul_rn(largest, scale));
        fade[h] = weight(max[h], now);
        sum[h] = __fmul_rn(sum[h], fade[h]);
        max[h] = now;
        top[h] = now == kMinusInfinity ? 0.f : now;
      }
#pragma unroll
      for (int i = 0; i < kScores; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          score[i][j] = exp2_fast(__fmaf_rn(score[i][j], scale, -top[j / 2]));
          sum[j / 2] = __fadd_rn(sum[j / 2], score[i][j]);
        }
    };
    // A product's result has its columns where the next one takes them.
    const auto pack_weights = [&] {
#pragma unroll
      for (int i = 0; i < kStep / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // columns g and g + 8, then the next 8 positions
          const float* pair = &score[2 * i + j / 2][j % 2 * 2];
          weights[i][j] = pack<data_t>(pair[0], pair[1]);
        }
      settle(weights);
    };

    // The wait for a step's values begins the next round: the compiler would move it before what
    // shall be done meanwhile, but not out of the loop.
    float fade[2] = {0.f, 0.f};
    const auto take_values = [&](bool begun, unsigned n) {
      wait_for_products<0>();
      settle(values);
      if (begun) leave_v(n);
      // After the first steps a maximum seldom moves, and times 1 is the same.
      if (__any_sync(kAll, fade[0] != 1.f || fade[1] != 1.f)) {
#pragma unroll
        for (int i = 0; i < kValues; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) values[i][j] *= fade[j / 2];
      }
      settle(values);
      pack_weights();
    };
    // What the products after those of step n's scores take; asked for while these are under way.
    const auto wait_for_next = [&](bool has_k, unsigned n) {
      if (has_k) wait_for_k(n + 1);
      wait_for_v(n);
      show_to_copies();  // what other threads' copies brought
    };
    if (mine > 0) {
      wait_for_k(n);
      show_to_copies();
      if constexpr (kHeld) settle(held);
      begin_scores(n);
      wait_for_next(mine > 1, n);
      wait_for_products<0>();
      settle(score);
      leave_k(n);
      weigh(0, fade);
#pragma unroll 1
      for (int step = 1; step < mine; ++step) {
        const unsigned at = n + step;
        take_values(step > 1, at - 2);
        begin_scores(at);
        begin_values(at - 1);
        wait_for_next(step + 1 < mine, at);
        wait_for_products<1>();
        settle(score);
        leave_k(at);
        weigh(step, fade);
      }
      if (!kHeld) leave(&shared.columns_free[b]);
      const unsigned last = n + mine - 1;
      take_values(mine > 1, last - 1);
      begin_values(last);
      wait_for_products<0>();
      settle(values);
      leave_v(last);
    } else if (!kHeld) {
      leave(&shared.columns_free[b]);
    }

    if (first_query <= last_query) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = first_row + h * 8 + g;
        const int query = column / deal.heads, head = column % deal.heads;
        const bool is_there = query < queries && head < task.heads;
        const int64_t place = int64_t(task.tile.token + query) * p.heads + task.first_head + head;
        float all = sum[h];
        all += __shfl_xor_sync(kAll, all, 1);
        all += __shfl_xor_sync(kAll, all, 2);
        if (p.lse != nullptr && t == 0 && is_there) p.lse[place] = log_sum_exp(max[h], all);
        const float inverse = all > 0.f ? 1.f / all : 0.f;
        // Of four eights of channels, lane t has two neighbours in each, and swaps what it has for
        // all of the t-th.
#pragma unroll
        for (int i = 0; i < kDim / 8; i += 4) {
          Vec<uint32_t, 4> eight;
#pragma unroll
          for (int j = 0; j < 4; ++j)
            eight.at[j] =
                pack<data_t>(values[i + j][2 * h] * inverse, values[i + j][2 * h + 1] * inverse);
#pragma unroll
          for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
            for (int j = 0; j < 4; ++j)
              if ((j & bit) == 0) {
                const bool high = t & bit;
                const uint32_t other =
                    __shfl_xor_sync(kAll, high ? eight.at[j] : eight.at[j + bit], bit);
                (high ? eight.at[j] : eight.at[j + bit]) = other;
              }
          if (is_there)
            *reinterpret_cast<Vec<uint32_t, 4>*>(out + place * kDim + (i + t) * 8) = eight;
        }
      }
    }

    // Steps that only other warpgroups see.
#pragma unroll 1
    for (int step = mine; step < steps; ++step) {
      wait_for_k(n + step);
      wait_for_v(n + step);
      leave_k(n + step);
      leave_v(n + step);
    }
    n += steps;
  }
#endif
}

template <typename T>
void launch(const PagedAttentionParams& p, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename T::Shared);
  static_assert(kBytes <= 232448);
  const PrefillDeal deal(p, T::kColumns);
  const int count = deal.tiles * p.kv_heads * deal.slices;
  const auto kernel = prefill_wgmma_kernel<T>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  launch_overlapping(kernel, std::min(count, count_processors()), T::kThreads, kBytes, stream, p,
                     PageSize(p.page_size), deal, count);
}

template <typename data_t>
using Small = Shape<data_t, 64, 3, 4, false>;

template <typename data_t>
void dispatch(const PagedAttentionParams& p, cudaStream_t stream) {
  if (p.head_dim == 64) return launch<Small<data_t>>(p, stream);
  if (p.head_dim == 96) return launch<Shape<data_t, 96, 2, 3, true>>(p, stream);
  launch<Shape<data_t, 128, 2, 3, true>>(p, stream);
}

}  // namespace

bool runs_paged_prefill_wgmma() { return runs_here(prefill_wgmma_kernel<Small<__half>>); }

void launch_paged_prefill_wgmma(const PagedAttentionParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kBFloat16) return dispatch<__nv_bfloat16>(p, stream);
  dispatch<__half>(p, stream);
}

}  // namespace reasoners

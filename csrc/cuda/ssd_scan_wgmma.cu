// ssd_scan.cu's recurrence for large heads on Hopper: the same chunks, segments and products, by
// warpgroups whose tensor cores read shared memory by themselves (wgmma.cuh).
//
// A block has two warpgroups that multiply and one that copies. Of head_dim above 64 the two share
// a head, each with up to 64 of its columns of x; otherwise each has a head, and the two heads lie
// in the same groups of B and C. So a chunk's B and C are copied once for both. Where heads that
// share B and C do not come in pairs, ssd_walk.cuh serves.
//
//   copies: free | x, B, C of chunk k on their way; of chunk k - 1 here | full, with its scalars
//   others: full | scores = C B^T; y = C S^T | mask and weigh scores; weigh y | y += scores x;
//           S = whole S + (gain x)^T B | y out | free | S's copy for the next chunk
//
// Each step's products are under way while the warpgroup's threads compute the next one's factors,
// and the two warpgroups take their turns at the tensor cores as they come. D x is added to y as D
// on the diagonal of the scores. Nothing of a warpgroup is read by the other, so they need not
// meet.
//
// Of a thread's registers, N 128: 128 for the state, carried and local, 32 each for y and scores.
//
//   N                  64      128
//   chunks in flight    3        3
//   shared, kB        130      221       one block a multiprocessor
#include <algorithm>
#include <type_traits>

#include "async_copy.cuh"
#include "convert.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "mma.cuh"
#include "roles.cuh"
#include "scan.cuh"
#include "ssd_chunk.cuh"
#include "ssd_deal.cuh"
#include "wgmma.cuh"

namespace reasoners {
namespace {

constexpr int kGroup = 128, kGroups = 2, kWidth = 64;  // threads, warpgroups, columns of x of each
constexpr int kThreads = kGroup * (1 + kGroups);
constexpr int kStages = 3;
// Registers of the threads that copy and of those that multiply, of 168 at the start.
constexpr int kCopierRegisters = 40, kWalkerRegisters = 232;

// kHeads: of a block, 1 or 2.
template <typename data_t, int kN, int kHeads>
struct Shared {
  struct Stage {
    Panels<data_t, kChunk, kWidth> x[kGroups];
    Panels<data_t, kChunk, kN> b, c;
  } stages[kStages];
  Panels<data_t, kWidth, kN> states[kGroups][2];  // one in use while the next is written
  Scalars scalars[kStages][kHeads];
  uint64_t full[kStages], free[kStages];
};

// kAdds: leaves what each segment adds, and no y.
template <typename data_t, int kN, int kHeads, bool kAdds>
__global__ void __launch_bounds__(kThreads, 1)
    ssd_scan_wgmma_kernel(const SsdScanParams p, const Deal deal) {
#ifdef REASONERS_WGMMA
  extern __shared__ __align__(1024) char shared_memory[];
  auto& shared = *reinterpret_cast<Shared<data_t, kN, kHeads>*>(shared_memory);
  let_next_start();
  wait_for_inputs();

  const int units = p.heads / kHeads;
  const int first_head = static_cast<int>(blockIdx.x % units) * kHeads, unit = blockIdx.x / units;
  const int blocks = max(deal.blocks, 1), index = unit / blocks;
  const Sequence sequence = sequence_at(p.cu_seqlens, p.length, index);
  const int length = static_cast<int>(sequence.end - sequence.begin);
  const int chunks = (length + kChunk - 1) / kChunk, segments = (chunks + kSegment - 1) / kSegment;
  const int first = unit % blocks * deal.each,
            last = deal.blocks > 0 ? min(first + deal.each, segments) : segments;
  if (deal.blocks > 0 && first >= last) return;
  const int first_chunk = first * kSegment, last_chunk = min(last * kSegment, chunks);

  // By a shuffle, so that the compiler knows it to be the same for all lanes.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0)
    for (int s = 0; s < kStages; ++s) {
      init_barrier(&shared.full[s], kGroup);
      init_barrier(&shared.free[s], kGroups * kGroup / 32);
    }
  __syncthreads();

  if (warp < kGroup / 32) {  // copies
    keep_registers<kCopierRegisters>();
    const int b_offset = first_head / (p.heads / p.b_groups) * p.state_dim,
              c_offset = first_head / (p.heads / p.c_groups) * p.state_dim;
    const auto x_offset = [&](int head) { return head / (p.heads / p.x_heads) * p.head_dim; };
    // Rows of up to kColumns of the chunk that begins at token t.
    const auto copy_rows = [&](auto& to, const void* data, TokenStrides strides, int offset,
                               int width, int t) {
      constexpr int kRuns = sizeof(to.at) / sizeof(data_t) / kChunk / 8, kStep = kGroup / kRuns;
      const int row = threadIdx.x / kRuns, run = threadIdx.x % kRuns;
      const auto* from = static_cast<const data_t*>(data) + sequence.batch * strides.batch +
                         (sequence.begin + t + row) * strides.token + offset + run * 8;
      const uint32_t target = shared_address(&to) + to.offset(row, run);
      const int left = run * 8 < width ? length - t - row : 0;
#pragma unroll
      for (int u = 0; u < kChunk / kStep; ++u)
        copy_async_once(target + u * kStep * 128,
                        left > u * kStep ? from + u * kStep * strides.token : data,
                        left > u * kStep ? 16 : 0);
    };
    float next_decay[2], next_scale[2];  // of tokens 2 lane and 2 lane + 1
    const auto read_scalars = [&](int t) {
      const auto of = [&](const float* values, TokenStrides strides, int i) {
        return values[sequence.batch * strides.batch + (sequence.begin + i) * strides.token +
                      first_head + warp];
      };
      if (warp >= kHeads) return;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int i = t + 2 * lane + k;
        next_decay[k] = i < length ? of(p.log_decay, p.log_decay_strides, i) : 0.f;
        next_scale[k] = i < length && p.scale ? of(p.scale, p.scale_strides, i) : 1.f;
      }
    };
#pragma unroll 1
    for (int chunk = first_chunk, n = 0; chunk <= last_chunk; ++chunk, ++n) {
      const int stage = n % kStages, before = (n + kStages - 1) % kStages;
      if (n > 0 && warp < kHeads) put_scalars(shared.scalars[before][warp], next_decay, next_scale);
      if (chunk < last_chunk) {
        read_scalars(chunk * kChunk);
        if (n >= kStages) wait_for(&shared.free[stage], (n / kStages - 1) & 1);
        auto& to = shared.stages[stage];
        const int t = chunk * kChunk;
#pragma unroll
        for (int w = 0; w < kGroups; ++w)
          copy_rows(to.x[w], p.x, p.x_strides,
                    kHeads == 1 ? x_offset(first_head) + w * kWidth : x_offset(first_head + w),
                    kHeads == 1 ? p.head_dim - w * kWidth : p.head_dim, t);
        copy_rows(to.b, p.B, p.b_strides, b_offset, p.state_dim, t);
        if (!kAdds) copy_rows(to.c, p.C, p.c_strides, c_offset, p.state_dim, t);
      }
      commit_copies();
      if (n > 0) {
        wait_for_copies<1>();
        show_to_copies();
        arrive(&shared.full[before]);
      }
    }
    return;
  }
  take_registers<kWalkerRegisters>();
  const int w = warp / 4 - 1, r = warp % 4, g = lane / 4, q = lane % 4;
  const int head = kHeads == 1 ? first_head : first_head + w;
  const int p_part = kHeads == 1 ? w * kWidth : 0;  // of x's columns
  const int i0 = 16 * r + g;  // and i0 + 8 are the rows, of y and of the state, of this thread
  const float skip = p.D ? p.D[head] : 0.f;

  // ---- The state in registers, shared and global memory.
  constexpr int kTiles = kN / 8;
  using State = float[kTiles][4];
  State carried = {}, local;
  float since = 1.f;  // decay from the segment's start
  // visit(values, offset) of the neighbours that a thread has of a state tensor.
  const auto each_pair = [&](State& state, auto&& visit) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = p_part + i0 + half * 8, j = 8 * n + 2 * q;
        visit(&state[n][2 * half], i < p.head_dim && j < p.state_dim ? i * p.state_dim + j : -1);
      }
  };
  const auto read_state = [&](const float* data, State& to) {
    each_pair(to, [&](float* values, int offset) {
      const bool in = data != nullptr && offset >= 0;
      const float2 pair = in ? *reinterpret_cast<const float2*>(data + offset) : float2{0.f, 0.f};
      values[0] = pair.x;
      values[1] = pair.y;
    });
  };
  const auto write_state = [&](State& from, float* data) {
    each_pair(from, [&](const float* values, int offset) {
      if (offset >= 0) *reinterpret_cast<float2*>(data + offset) = {values[0], values[1]};
    });
  };
  const auto begin_segment = [&] {
    since = 1.f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int v = 0; v < 4; ++v) local[n][v] = 0.f;
  };
  const auto whole_state = [&](int n, int v) { return fmaf(since, carried[n][v], local[n][v]); };
  // The state as the products read it, and then the warpgroup's threads meet: so nobody reads the
  // other copy any more either.
  const auto put_state = [&](const Panels<data_t, kWidth, kN>& to) {
    const uint32_t row = shared_address(&to) + to.offset(16 * r + lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2)
      store_matrices((row ^ n % 8 * 16) + n / 8 * to.kPanel,
                     pack<data_t>(whole_state(n, 0), whole_state(n, 1)),
                     pack<data_t>(whole_state(n, 2), whole_state(n, 3)),
                     pack<data_t>(whole_state(n + 1, 0), whole_state(n + 1, 1)),
                     pack<data_t>(whole_state(n + 1, 2), whole_state(n + 1, 3)));
    show_to_copies();
    if (w == 0)
      wait_at<1, kGroup>();
    else
      wait_at<2, kGroup>();
  };

  const Places places(p, sequence, index, head);
  const int64_t size = int64_t(p.head_dim) * p.state_dim;
  const int64_t home = (int64_t(index) * p.heads + head) * size;  // in a state tensor
  const float* from = deal.blocks > 0   ? p.scratch + deal.states + places.of(first) * size
                      : p.initial_state ? p.initial_state + home
                                        : nullptr;
  read_state(kAdds ? nullptr : from, carried);
  begin_segment();
  if (!kAdds) put_state(shared.states[w][0]);

  // ---- The walk.
#pragma unroll 1
  for (int chunk = first_chunk, n = 0; chunk < last_chunk; ++chunk, ++n) {
    const int stage = n % kStages, t = chunk * kChunk;
    const auto& in = shared.stages[stage];
    const Scalars& scalars = shared.scalars[stage][kHeads == 1 ? 0 : w];
    wait_for(&shared.full[stage], n / kStages & 1);
    float y[8][4];
    if constexpr (!kAdds) {
      float scores[8][4];
      const uint64_t c = describe(in.c), b = describe(in.b), s = describe(shared.states[w][n & 1]);
      begin_products();
#pragma unroll
      for (int k = 0; k < kN / 16; ++k)
        multiply_shared<data_t>(scores, c + depth_step<kChunk>(k), b + depth_step<kChunk>(k),
                                k > 0);
      commit_products();
#pragma unroll
      for (int k = 0; k < kN / 16; ++k)
        multiply_shared<data_t>(y, c + depth_step<kChunk>(k), s + depth_step<kWidth>(k), k > 0);
      commit_products();
      const float since_of[2] = {scalars.since[i0], scalars.since[i0 + 8]},
                  c_of[2] = {scalars.c[i0], scalars.c[i0 + 8]};
      wait_for_products<1>();
      settle(scores);
      uint32_t a[4][4];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int v = 0; v < 4; ++v) a[block][v] = 0;
        if (block > r) continue;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const int j0 = block * kBlock + tile * 8 + 2 * q;
          const float2 c_from = *reinterpret_cast<const float2*>(&scalars.c[j0]),
                       scale_of = *reinterpret_cast<const float2*>(&scalars.scale[j0]);
          float weights[4];
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const int i = i0 + v / 2 * 8, j = j0 + v % 2;
            const float passes = exp2_fast(c_of[v / 2] - (v % 2 ? c_from.y : c_from.x));
            const float weight = passes * (v % 2 ? scale_of.y : scale_of.x);
            weights[v] =
                j > i ? 0.f : fmaf(scores[2 * block + tile][v], weight, j == i ? skip : 0.f);
          }
          a[block][2 * tile] = pack<data_t>(weights[0], weights[1]);
          a[block][2 * tile + 1] = pack<data_t>(weights[2], weights[3]);
        }
      }
      wait_for_products<0>();
      settle(y);
#pragma unroll
      for (int m = 0; m < 8; ++m)
#pragma unroll
        for (int v = 0; v < 4; ++v) y[m][v] *= since_of[v / 2];
      const uint64_t x = describe_tall(in.x[w]);
      settle(y);
      begin_products();
#pragma unroll
      for (int k = 0; k < kBlocks; ++k) multiply_tall<data_t>(y, a[k], x + tall_step(k));
      commit_products();
    }

    // local = whole local + (gain x)^T B, summed over the chunk's tokens.
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int v = 0; v < 4; ++v) local[m][v] *= scalars.whole;
    since *= scalars.whole;
    uint32_t a[4][4];
    const uint32_t x_rows =
        shared_address(&in.x[w]) + in.x[w].offset(lane % 8 + lane / 16 * 8, 2 * r + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      const float2 low = *reinterpret_cast<const float2*>(&scalars.gain[16 * k + 2 * q]),
                   high = *reinterpret_cast<const float2*>(&scalars.gain[16 * k + 2 * q + 8]);
      load_matrices_transposed(a[k], x_rows + k * 16 * 128);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float2 pair = unpack<data_t>(a[k][v]), weight = v < 2 ? low : high;
        a[k][v] = pack<data_t>(pair.x * weight.x, pair.y * weight.y);
      }
    }
    const uint64_t b = describe_tall(in.b);
    settle(local);
    begin_products();
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) multiply_tall<data_t>(local, a[k], b + tall_step(k));
    commit_products();

    if constexpr (!kAdds) {
      wait_for_products<1>();
      settle(y);
      // Lanes trade halves of tiles so that each writes 8 bytes and four write a whole sector.
      auto* to = static_cast<data_t*>(p.y) +
                 ((sequence.batch * p.length + sequence.begin + t + i0) * p.heads + head) *
                     int64_t(p.head_dim);
      const bool odd = q & 1;
#pragma unroll
      for (int m = 0; m < 8; m += 2)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t mine[2];
#pragma unroll
          for (int e = 0; e < 2; ++e)
            mine[e] = pack<data_t>(y[m + e][2 * half], y[m + e][2 * half + 1]);
          const uint32_t theirs = __shfl_xor_sync(~0u, odd ? mine[0] : mine[1], 1);
          const int column = p_part + m * 8 + (odd ? 8 + 2 * (q - 1) : 2 * q);
          if (t + i0 + half * 8 < length && column < p.head_dim)
            *reinterpret_cast<uint2*>(to + int64_t(half * 8) * p.heads * p.head_dim + column) =
                odd ? uint2{theirs, mine[1]} : uint2{mine[0], theirs};
        }
    }
    wait_for_products<0>();
    settle(local);
    __syncwarp();
    if (lane == 0) arrive(&shared.free[stage]);
    if (chunk + 1 == last_chunk || (chunk + 1) % kSegment == 0) {
      if (kAdds) {
        const int64_t place = places.of(chunk / kSegment);
        write_state(local, p.scratch + deal.states + place * size);
        if (threadIdx.x % kGroup == 0 && p_part == 0) p.scratch[deal.decays + place] = since;
      } else {
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int v = 0; v < 4; ++v) carried[m][v] = whole_state(m, v);
      }
      begin_segment();
    }
    if (!kAdds && chunk + 1 < last_chunk) put_state(shared.states[w][(n + 1) & 1]);
  }
  if (!kAdds && deal.blocks == 0) write_state(carried, p.final_state + home);
#endif
}

template <typename data_t, int kN, int kHeads>
void launch(const SsdScanParams& p, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<data_t, kN, kHeads>);
  static_assert(kBytes <= 232448);
  const auto scan = ssd_scan_wgmma_kernel<data_t, kN, kHeads, false>;
  cudaFuncSetAttribute(scan, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const Deal deal = make_deal(p, 1, kHeads);
  const auto blocks =
      static_cast<unsigned>(p.sequences * p.heads / kHeads * std::max(deal.blocks, 1));
  if (deal.blocks > 0) {
    const auto add = ssd_scan_wgmma_kernel<data_t, kN, kHeads, true>;
    cudaFuncSetAttribute(add, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    launch_overlapping(add, blocks, kThreads, kBytes, stream, p, deal);
    launch_carry(p, deal, stream);
  }
  launch_overlapping(scan, blocks, kThreads, kBytes, stream, p, deal);
}

// use(N, heads of a block) as constants.
template <typename Use>
auto with_tile(const SsdScanParams& p, const Use& use) {
  using One = std::integral_constant<int, 1>;
  if (p.head_dim <= 64)
    return use(std::integral_constant<int, 128>(), std::integral_constant<int, 2>());
  if (p.state_dim <= 64) return use(std::integral_constant<int, 64>(), One());
  return use(std::integral_constant<int, 128>(), One());
}

// Not where this is compiled for other machines: the kernel is empty then, and has few registers.
bool runs_here() {
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, ssd_scan_wgmma_kernel<__half, 64, 1, false>);
  return attributes.numRegs > 64;
}

}  // namespace

bool suits_ssd_scan_wgmma(const SsdScanParams& p) {
  if (!on_tensor_cores(p)) return false;
  const bool pairs = p.heads / p.b_groups % 2 == 0 && p.heads / p.c_groups % 2 == 0;
  return (p.head_dim > 64 || (p.state_dim > 64 && pairs)) && runs_here();
}

int64_t count_ssd_scan_wgmma_scratch(const SsdScanParams& p) {
  return with_tile(p, [&](auto, auto heads) { return make_deal(p, 1, heads()).size; });
}

void launch_ssd_scan_wgmma(const SsdScanParams& p, cudaStream_t stream) {
  with_tile(p, [&](auto columns, auto heads) {
    if (p.dtype == DType::kBFloat16)
      launch<__nv_bfloat16, columns(), heads()>(p, stream);
    else
      launch<__half, columns(), heads()>(p, stream);
  });
}

}  // namespace reasoners

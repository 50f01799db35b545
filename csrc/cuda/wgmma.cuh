// Products by a warpgroup, four warps that are neighbours and begin at a multiple of four (sm_90a):
// D (64, n) += A (64, 16) B (16, n), in fp32. Warp w has the rows 16 w to 16 w + 15 of D, and of A
// where that is in registers, each of its lanes the elements that multiply_add of mma.cuh gives it.
// What is not in registers the tensor cores read from shared memory by themselves, later: what is
// there must have been made visible with show_to_copies and a barrier, and neither it nor the
// registers may be touched until wait_for_products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "async_copy.cuh"
#include "matrix.cuh"
#include "mma.cuh"

namespace reasoners {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define REASONERS_WGMMA 1
#endif

// Whether a kernel of these products has been compiled for the device at hand: for others it is
// empty, and has few registers.
template <typename... Parameters>
bool runs_here(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, kernel);
  return attributes.numRegs > 64;
}

// A matrix in shared memory, in panels of 64 columns: a row of a panel is 128 bytes, whose eight
// runs of 16 bytes are permuted by the row, so that the same run of eight rows lies in different
// banks. Begins on 1024 bytes.
template <typename data_t, int kRows, int kColumns>
struct alignas(1024) Panels {
  static constexpr int kPanel = kRows * 128;  // bytes
  data_t at[kRows * kColumns];

  // Where run `run` of a row is, in bytes. Runs that differ in bits of `run` below 8 alone lie the
  // same bits, 16 bytes each, of the address apart.
  __device__ static int offset(int row, int run) {
    return run / 8 * kPanel + row * 128 + ((run ^ row) & 7) * 16;
  }
};

// Says to the tensor cores where a matrix lies. A step of 16 in the depth of a product is 32 bytes
// within a panel where the matrix's rows are those of A, or the columns of B; where its rows are
// the product's depth (`tall`) it is 16 rows.
constexpr uint64_t kSwizzled128 = uint64_t(1) << 62, kEightRows = uint64_t(1024 / 16) << 32;
template <typename data_t, int kRows, int kColumns>
__device__ uint64_t describe(const Panels<data_t, kRows, kColumns>& m) {
  return kSwizzled128 | kEightRows | (1 << 16) | (shared_address(&m) >> 4);
}
template <typename data_t, int kRows, int kColumns>
__device__ uint64_t describe_tall(const Panels<data_t, kRows, kColumns>& m) {
  return kSwizzled128 | kEightRows | (m.kPanel / 16 << 16) | (shared_address(&m) >> 4);
}
template <int kRows>
__device__ constexpr uint64_t depth_step(int k) {  // of the k-th 16 columns
  return (k / 4 * (kRows * 128) + k % 4 * 32) / 16;
}
__device__ constexpr uint64_t tall_step(int k) { return k * (16 * 128) / 16; }

// Before the first product that reads registers that were written since the last one.
__device__ inline void begin_products() {
#ifdef REASONERS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void commit_products() {
#ifdef REASONERS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kGroups>  // that may still be under way
__device__ inline void wait_for_products() {
#ifdef REASONERS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}
// The compiler shall not use what these had before, nor move what reads them to before this point.
template <int kTiles>
__device__ void settle(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int v = 0; v < 4; ++v) asm volatile("" : "+f"(d[n][v])::"memory");
}
template <int kSteps>
__device__ void settle(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int v = 0; v < 4; ++v) asm volatile("" : "+r"(a[k][v])::"memory");
}

#define TILE(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define TILES_4(n) TILE(n), TILE(n + 1), TILE(n + 2), TILE(n + 3)
#define REGISTERS_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_32                                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31"
#define REGISTERS_48 REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define REGISTERS_64 REGISTERS_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// MULTIPLY_32, _64, _96 or _128 (TYPE), for kTiles tiles and the type of the data.
#define MULTIPLY_DATA(multiply)                        \
  if constexpr (std::is_same_v<data_t, __nv_bfloat16>) \
    multiply("bf16");                                  \
  else                                                 \
    multiply("f16")
#define MULTIPLY_TILES                 \
  if constexpr (kTiles == 4) {         \
    MULTIPLY_DATA(MULTIPLY_32);        \
  } else if constexpr (kTiles == 8) {  \
    MULTIPLY_DATA(MULTIPLY_64);        \
  } else if constexpr (kTiles == 12) { \
    MULTIPLY_DATA(MULTIPLY_96);        \
  } else {                             \
    static_assert(kTiles == 16);       \
    MULTIPLY_DATA(MULTIPLY_128);       \
  }

// D = A B, or D += A B, of D's N columns. With the rows of A and the columns of B as rows in shared
// memory; of a tall one the other way round.
#define SHARED(N, REGISTERS, A, B, ADD, TALL_A, TALL_B, TYPE, ...)                           \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                   \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS \
               "}, " A ", " B ", add, 1, 1, " TALL_A ", " TALL_B ";\n}"                      \
               : __VA_ARGS__                                                                 \
               : "l"(a), "l"(b), "r"(int(add)), "n"(int(kTallA)), "n"(int(kTallB)))
template <typename data_t, bool kTallA = false, bool kTallB = false, int kTiles>
__device__ void multiply_shared(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool add) {
#ifdef REASONERS_WGMMA
#define MULTIPLY_32(TYPE) \
  SHARED("32", REGISTERS_16, "%16", "%17", "%18", "%19", "%20", TYPE, TILES_4(0))
#define MULTIPLY_64(TYPE) \
  SHARED("64", REGISTERS_32, "%32", "%33", "%34", "%35", "%36", TYPE, TILES_4(0), TILES_4(4))
#define MULTIPLY_96(TYPE)                                                                     \
  SHARED("96", REGISTERS_48, "%48", "%49", "%50", "%51", "%52", TYPE, TILES_4(0), TILES_4(4), \
         TILES_4(8))
#define MULTIPLY_128(TYPE)                                                                     \
  SHARED("128", REGISTERS_64, "%64", "%65", "%66", "%67", "%68", TYPE, TILES_4(0), TILES_4(4), \
         TILES_4(8), TILES_4(12))
  MULTIPLY_TILES;
#undef MULTIPLY_32
#undef MULTIPLY_64
#undef MULTIPLY_96
#undef MULTIPLY_128
#endif
}
#undef SHARED

// The same with A in registers.
#define HELD(N, REGISTERS, A0, A1, A2, A3, B, ADD, TALL_B, TYPE, ...)                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                   \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS \
               "}, {" A0 "," A1 "," A2 "," A3 "}, " B ", add, 1, 1, " TALL_B ";\n}"          \
               : __VA_ARGS__                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)),          \
                 "n"(int(kTallB)))
template <typename data_t, bool kTallB = false, int kTiles>
__device__ void multiply_held(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add) {
#ifdef REASONERS_WGMMA
#define MULTIPLY_32(TYPE) \
  HELD("32", REGISTERS_16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", TYPE, TILES_4(0))
#define MULTIPLY_64(TYPE)                                                                     \
  HELD("64", REGISTERS_32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", TYPE, TILES_4(0), \
       TILES_4(4))
#define MULTIPLY_96(TYPE)                                                                     \
  HELD("96", REGISTERS_48, "%48", "%49", "%50", "%51", "%52", "%53", "%54", TYPE, TILES_4(0), \
       TILES_4(4), TILES_4(8))
#define MULTIPLY_128(TYPE)                                                                     \
  HELD("128", REGISTERS_64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", TYPE, TILES_4(0), \
       TILES_4(4), TILES_4(8), TILES_4(12))
  MULTIPLY_TILES;
#undef MULTIPLY_32
#undef MULTIPLY_64
#undef MULTIPLY_96
#undef MULTIPLY_128
#endif
}
#undef HELD
// D += A B with A in registers and the rows of B as rows in shared memory.
template <typename data_t, int kTiles>
__device__ void multiply_tall(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  multiply_held<data_t, true>(d, a, b, true);
}
#undef TILE
#undef TILES_4
#undef REGISTERS_16
#undef REGISTERS_32
#undef REGISTERS_48
#undef REGISTERS_64
#undef MULTIPLY_DATA
#undef MULTIPLY_TILES

// Four (8, 8) tiles to shared memory, the reverse of load_matrices of mma.cuh; `row` is a shared
// address.
__device__ inline void store_matrices(uint32_t row, uint32_t r0, uint32_t r1, uint32_t r2,
                                      uint32_t r3) {
#ifdef REASONERS_WGMMA
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
#endif
}

// By a warp, the 16 rows from `row` on of the first kTiles tiles of 8 columns; pair(tile, half) are
// a lane's neighbours of its row of D in that half of the rows.
template <int kTiles, typename data_t, int kRows, int kColumns, typename Pair>
__device__ void store_rows(const Panels<data_t, kRows, kColumns>& to, int row, const Pair& pair) {
  const int lane = threadIdx.x % 32;
  const uint32_t at = shared_address(&to) + to.offset(row + lane % 16, lane / 16);
#pragma unroll
  for (int n = 0; n < kTiles; n += 2)
    store_matrices((at ^ n % 8 * 16) + n / 8 * to.kPanel, pair(n, 0), pair(n, 1), pair(n + 1, 0),
                   pair(n + 1, 1));
}

// A warp's 16 rows of A of a transposed matrix, its columns from `column` on, every row of which is
// weighed: `weight` gives the address of the weights of the eight rows from one on.
template <typename data_t, int kSteps, int kRows, int kColumns, typename Weight>
__device__ void load_weighed(uint32_t (&a)[kSteps][4], const Panels<data_t, kRows, kColumns>& from,
                             int column, const Weight& weight) {
  const int lane = threadIdx.x % 32, q = lane % 4;
  const uint32_t row =
      shared_address(&from) + from.offset(lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const float2 low = *reinterpret_cast<const float2*>(weight(16 * k) + 2 * q),
                 high = *reinterpret_cast<const float2*>(weight(16 * k + 8) + 2 * q);
    load_matrices_transposed(a[k], row + k * 16 * 128);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float2 pair = unpack<data_t>(a[k][v]), by = v < 2 ? low : high;
      a[k][v] = pack<data_t>(pair.x * by.x, pair.y * by.y);
    }
  }
}

}  // namespace reasoners

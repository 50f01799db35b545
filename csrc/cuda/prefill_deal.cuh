// Prefill's tiles: neighbouring queries of one row of the batch, of each all heads that share a kv
// head, so that all of them use one read of K and V.
//
// Which tiles a row has is found on the device: row r begins at tile starts[r] / queries + r, which
// leaves each row room for all of its tiles, and launch geometry depends on shapes alone.
#pragma once

#include "kernels.h"
#include "softmax.cuh"

namespace reasoners {

// How queries and heads are dealt out, by shapes alone. Column i of a tile is head i % heads of
// query i / heads.
struct PrefillDeal {
  static constexpr int kMostHeads = 16;  // of a tile; larger groups are cut
  int heads, slices;                     // of a tile, of a group
  int queries;                           // of a tile
  int tiles;                             // at most

  PrefillDeal(const PagedAttentionParams& p, int columns) {
    const int group = p.heads / p.kv_heads;
    heads = group < kMostHeads ? group : kMostHeads;
    slices = (group + heads - 1) / heads;
    queries = columns / heads;
    tiles = p.tokens / queries + p.rows;
  }
};

// The queries of a tile: the first of them in the batch, how many, and where the first one stands.
struct PrefillTile {
  int row = -1, token = 0, queries = 0, position = 0;
};

// By a warp. The row is the last one that begins at tile `index` or before; 32 of them are asked at
// once.
__device__ inline PrefillTile find_tile(const PagedAttentionParams& p, const PrefillDeal& deal,
                                        int index) {
  const int lane = threadIdx.x % 32;
  int row = 0;
  for (int rows = p.rows; rows > 1;) {
    const int stride = (rows + 31) / 32, mine = row + lane * stride;
    const bool begun =
        lane * stride < rows && __ldcg(&p.cu_seqlens_q[mine]) / deal.queries + mine <= index;
    const int last = __popc(__ballot_sync(kAll, begun)) - 1;
    row += last * stride;
    rows = min(stride, rows - last * stride);
  }
  const int start = __ldcg(&p.cu_seqlens_q[row]), end = __ldcg(&p.cu_seqlens_q[row + 1]);
  const int length = __ldcg(&p.kv_lengths[row]);
  const int first = (index - start / deal.queries - row) * deal.queries;
  PrefillTile tile;
  tile.row = row;
  tile.token = start + first;
  tile.queries = min(deal.queries, end - start - first);
  tile.position = length <= 0 ? -deal.queries : length - end + tile.token;
  return tile;
}

// What a thread block does at a time: a tile and heads.
struct PrefillTask {
  PrefillTile tile;                // of no row: there are no more
  int kv_head, first_head, heads;  // of the query heads

  __device__ int end() const { return tile.position + tile.queries; }  // of what is seen
};

// The task with this number, counted from the last one; by a warp.
__device__ inline PrefillTask find_task(const PagedAttentionParams& p, const PrefillDeal& deal,
                                        int number) {
  const int group = p.heads / p.kv_heads;
  const int slice = number % deal.slices;
  PrefillTask task;
  task.kv_head = number / deal.slices % p.kv_heads;
  task.first_head = task.kv_head * group + slice * deal.heads;
  task.heads = min(deal.heads, group - slice * deal.heads);
  task.tile = find_tile(p, deal, deal.tiles - 1 - number / deal.slices / p.kv_heads);
  return task;
}

}  // namespace reasoners

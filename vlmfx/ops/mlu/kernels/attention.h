// What the attention kernels share: rows out of a paged cache, and a tile of queries with its online softmax.
#pragma once
#include "launch.h"

#define INDEX_PIECE 1024  // numbers of a table in device memory that are in NRAM at a time
// A score that is not one, and the greatest score before any. Both are finite, as their difference is, and the first is so far
// below the second that its power is 0: a key that is not seen has no weight, even where no other is seen.
#define NO_SCORE -3e38f
#define NO_TOP -1e30f

// What one sequence has in a paged cache, for one KV head
template <typename T>
struct Cache {
  const T *k, *v;    // [num_blocks, kv_heads, block_size, dim]
  const int *table;  // the sequence's blocks in device memory; null: it owns block `sequence`
  int *piece;        // [INDEX_PIECE] of them, from `first` on
  int first, max_blocks, sequence, kv_head, kv_heads, block_size, dim, padded;
};

// dst [num, padded] = rows of dim elements that begin `stride` elements apart; asynchronous
template <typename T>
__mlu_func__ void load_rows(T *dst, const T *src, int num, int dim, int padded, int stride) {
  if (dim == padded && dim == stride)
    __memcpy_async(dst, src, num * dim * (int)sizeof(T), GDRAM2NRAM);
  else
    __memcpy_async(dst, src, dim * sizeof(T), GDRAM2NRAM, padded * sizeof(T), stride * sizeof(T), num - 1);
}

// keys, values [end - begin, padded] = positions begin to end; asynchronous. No block is read but those that hold them.
template <typename T>
__mlu_func__ void load_cached(T *keys, T *values, Cache<T> &cache, int begin, int end) {
  for (int at = begin; at < end;) {
    const int column = at / cache.block_size, offset = at - column * cache.block_size;
    const int num = MIN(cache.block_size - offset, end - at);
    if (cache.table && (column < cache.first || column >= cache.first + INDEX_PIECE)) {
      cache.first = column / INDEX_PIECE * INDEX_PIECE;
      __memcpy(cache.piece, cache.table + cache.first, MIN(INDEX_PIECE, cache.max_blocks - cache.first) * (int)sizeof(int),
               GDRAM2NRAM);
    }
    const int block = cache.table ? cache.piece[column - cache.first] : cache.sequence;
    const int64_t row = (((int64_t)block * cache.kv_heads + cache.kv_head) * cache.block_size + offset) * cache.dim;
    load_rows(keys + (at - begin) * cache.padded, cache.k + row, num, cache.dim, cache.padded, cache.dim);
    load_rows(values + (at - begin) * cache.padded, cache.v + row, num, cache.dim, cache.padded, cache.dim);
    at += num;
  }
}

// piece[i % INDEX_PIECE] = all[i], and its successor, for each i that is asked for from 0 on; `all` has `total` numbers
__mlu_func__ void load_index(int *piece, const int *all, int i, int total) {
  if (i % INDEX_PIECE == 0 && i < total)
    __memcpy(piece, all + i, MIN(INDEX_PIECE + 1, total - i) * (int)sizeof(int), GDRAM2NRAM);
}

// A task's items, back and forth: where each is longer than the one before, two rounds together are alike.
__mlu_func__ int item_of(int round) { return round * taskDim + (round % 2 ? taskDim - 1 - taskId : taskId); }

// ---- a tile of queries -------------------------------------------------------------------------------------------------------
// Queries are the lanes of all vectors, and an element of a key or a value is a scalar beside them: a product is one fused pass,
// sums over the head and over keys need no transpose and no fold, and what lies beyond a tail is never touched. Lane
// j * group + g is head g of query j. A lane's result depends on nothing but its query and its keys by tiles of KEYS from the
// first position on.
//
// Cycles of a lane and a key, in 32nds: 2 dim of products, 5 of softmax (scale, greatest, less it, power, sum), and dim / KEYS to
// fade the sums. On 3xx a fused multiply-add is one pass through two units and rounds twice (yao-matrix/mblog: "Vector FMA
// 数值问题分析"); products are 98 % of all. [?] What a pass costs beside its vectors, at 14 of them for 448 lanes: its start, and its
// scalar's load.
#define KEYS 32

// A core's NRAM for a tile, whose kernel names T, padded and lanes
#define QUERY_TILE(X)              \
  X(float, queries, padded *lanes) \
  X(float, sums, padded *lanes)    \
  X(float, scores, KEYS *lanes)    \
  X(float, top, lanes)             \
  X(float, greatest, lanes)        \
  X(float, fade, lanes)            \
  X(float, total, lanes)           \
  X(float, count, FLOATS)          \
  X(float, hidden, FLOATS)         \
  X(float, keys, KEYS *padded)     \
  X(float, values, KEYS *padded)   \
  X(T, keys_in, 2 * KEYS * padded) \
  X(T, values_in, 2 * KEYS * padded)

struct QueryTile {
  float *queries, *sums;                 // [padded, lanes]
  float *scores;                         // [KEYS, lanes], then weights
  float *top, *greatest, *fade, *total;  // [lanes]
  float *count, *hidden;                 // [FLOATS]: 0, 1, …; scratch
  float *keys, *values;                  // [KEYS, padded]
  int dim, padded, lanes, num, group;    // num queries of `group` heads in `lanes` lanes, a multiple of FLOATS
};

// The state before any key, of rows q [num, stride] of which each begins with `group` heads
template <typename T>
__mlu_func__ void start_queries(QueryTile &t, const T *q, int num, int group, int stride) {
  t.num = num, t.group = group, t.lanes = PAD_UP(num * group, FLOATS);
  const int size = t.padded * t.lanes;
  T *rows = (T *)t.sums, *columns = sizeof(T) == sizeof(float) ? (T *)t.queries : (T *)t.sums + size;
  __bang_write_value(rows, size, (T)0);
  __sync_compute();
  for (int g = 0; g < group; ++g) load_rows(rows + g * t.padded, q + g * t.dim, num, t.dim, group * t.padded, stride);
  __sync();
  __bang_transpose(columns, rows, t.lanes, t.padded);
  to_float(t.queries, columns, size);
  __bang_write_value(t.sums, size, 0.f);
  __bang_write_value(t.total, t.lanes, 0.f);
  __bang_write_value(t.top, t.lanes, NO_TOP);
}

// Adds NO_SCORE to the lanes of scores [FLOATS] before, or with is_end from, lane `at`.
__mlu_func__ void hide(QueryTile &t, float *scores, int at, bool is_end) {
  if (is_end)
    __bang_ge_scalar(t.hidden, t.count, (float)at, FLOATS);
  else
    __bang_lt_scalar(t.hidden, t.count, (float)at, FLOATS);
  __bang_mul_scalar(t.hidden, t.hidden, NO_SCORE, FLOATS);
  __bang_add(scores, scores, t.hidden, FLOATS);
}

// The state after rows [begin, end) of keys and values, each seen by some query: row r by those from shift + r on, with a window
// by so many. scale has log2(e) in it, as powers are of 2; it multiplies sums, so that equal ones stay equal.
// Source: Milakov and Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691, algorithm 1.
__mlu_func__ void attend(QueryTile &t, int begin, int end, int shift, int window, float scale) {
  const int lanes = t.lanes, num_scores = (end - begin) * lanes;
  int first[KEYS], last[KEYS], from[KEYS], size[KEYS];  // the lanes that see a row, and the whole vectors that hold them
  for (int r = begin; r < end; ++r) {
    first[r] = MAX(shift + r, 0) * t.group;
    last[r] = window ? MIN(shift + r + window, t.num) * t.group : lanes;
    from[r] = first[r] / FLOATS * FLOATS;
    size[r] = PAD_UP(last[r], FLOATS) - from[r];
  }
  for (int d = 0; d < t.dim; ++d)
    for (int r = begin; r < end; ++r) {  // no pass waits for the one before
      float *scores = t.scores + r * lanes + from[r], *q = t.queries + d * lanes + from[r];
      if (d == 0)
        __bang_mul_scalar(scores, q, t.keys[r * t.padded], size[r]);
      else
        __bang_fusion(FUSION_FMA, scores, q, t.keys[r * t.padded + d], scores, size[r], size[r]);
    }
  for (int r = begin; r < end; ++r) {
    float *scores = t.scores + r * lanes;
    const int till = from[r] + size[r];
    __bang_mul_scalar(scores + from[r], scores + from[r], scale, size[r]);
    if (from[r] > 0) __bang_write_value(scores, from[r], NO_SCORE);
    if (till < lanes) __bang_write_value(scores + till, lanes - till, NO_SCORE);
    if (first[r] > from[r]) hide(t, scores + from[r], first[r] - from[r], false);
    if (last[r] < till) hide(t, scores + till - FLOATS, last[r] - till + FLOATS, true);
    __bang_maxequal(t.greatest, r == begin ? t.top : t.greatest, scores, lanes);
  }
  float *weights = t.scores + begin * lanes;
  __bang_sub(t.fade, t.top, t.greatest, lanes);
  __bang_pow2(t.fade, t.fade, lanes);
  __bang_mul_scalar(t.top, t.greatest, 1.f, lanes);
  __bang_cycle_sub(weights, weights, t.greatest, num_scores, lanes);
  __bang_pow2(weights, weights, num_scores);
  __bang_mul(t.total, t.total, t.fade, lanes);
  __bang_cycle_mul(t.sums, t.sums, t.fade, t.dim * lanes, lanes);
  for (int r = begin; r < end; ++r) {
    __bang_add(t.total, t.total, t.scores + r * lanes, lanes);
    for (int d = 0; d < t.dim; ++d) {
      float *sums = t.sums + d * lanes + from[r];
      __bang_fusion(FUSION_FMA, sums, t.scores + r * lanes + from[r], t.values[r * t.padded + d], sums, size[r], size[r]);
    }
  }
}

// out = the means of values, zero where no key was seen; laid out as q for start_queries
template <typename T>
__mlu_func__ void finish_queries(QueryTile &t, T *out, int stride) {
  const int size = t.padded * t.lanes;
  T *rows = (T *)t.sums, *columns = (T *)t.queries;
  __bang_eq_scalar(t.fade, t.total, 0.f, t.lanes);
  __bang_add(t.total, t.total, t.fade, t.lanes);
  __bang_recip(t.fade, t.total, t.lanes);
  __bang_cycle_mul(t.sums, t.sums, t.fade, size, t.lanes);
  from_float(columns, t.sums, size);
  __bang_transpose(rows, columns, t.padded, t.lanes);
  __sync();
  for (int g = 0; g < t.group; ++g)
    __memcpy_async(out + g * t.dim, rows + g * t.padded, t.dim * sizeof(T), NRAM2GDRAM, stride * sizeof(T),
                   t.group * t.padded * sizeof(T), t.num - 1);
  __sync();
}

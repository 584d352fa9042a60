// What rotary.mlu and rotary_cache_write.mlu share: how tokens are cut into tiles, and the turning of a tile.
//
// A tile lies on the chip as in memory, dim elements a head. To be turned its halves are parted: the first halves of its heads
// into one plane, the second into another, each half at a multiple of `pitch`, which is half_dim made a multiple of 32, so that
// any half_dim is aligned. Then
//   first = first * cos − second * sin, second = second * cos + first * sin
// in float, cos and sin the second half of the token's row of the table, whose first half differs in the sign of sin alone.
#pragma once
#include "launch.h"

#define PLANE 10240  // floats of a plane and of its tokens' cos: half of what a tile turns

// tile_tokens * dim = table_tile; plane and table_plane: multiples of 64
#define ROTARY_BUFFERS(X)                                    \
  X(Table, cos_in, 2 * table_tile)                           \
  X(Table, sin_in, 2 * table_tile)                           \
  X(Table, cos_half, (sizeof(Table) == 2) * table_plane)     \
  X(Table, sin_half, (sizeof(Table) == 2) * table_plane)     \
  X(float, cos_row, table_plane)                             \
  X(float, sin_row, table_plane)                             \
  X(T, parted, (sizeof(T) == 2) * 2 * plane)                 \
  X(float, planes, 2 * plane)                                \
  X(float, products, 2 * plane)

struct Tile {
  int token, head, tokens, heads;  // the first, and how many
};

// A tile is all heads of some tokens or some heads of one token: one run of memory in either case.
static inline Tile tile_shape(int tasks, int tokens, int heads, int dim) {
  const int fit = MAX(1, PLANE / PAD_UP(dim / 2, FLOATS) - 1), share = (tokens * heads + tasks - 1) / tasks;
  Tile shape = {0, 0, 1, heads};
  if (heads <= MIN(fit, share)) {
    shape.tokens = MAX(1, MIN((fit + 1) / (heads + 1), (tokens + tasks - 1) / tasks));
  } else {
    const int parts = (heads + MIN(fit, share) - 1) / MIN(fit, share);
    shape.heads = (heads + parts - 1) / parts;
  }
  return shape;
}

__mlu_func__ int tiles_of(int tokens, int heads, int tile_tokens, int tile_heads) {
  return (tokens + tile_tokens - 1) / tile_tokens * ((heads + tile_heads - 1) / tile_heads);
}

__mlu_func__ Tile tile_at(int index, int tokens, int heads, int tile_tokens, int tile_heads) {
  const int parts = (heads + tile_heads - 1) / tile_heads;
  Tile tile = {index / parts * tile_tokens, index % parts * tile_heads, 0, 0};
  tile.tokens = MIN(tile_tokens, tokens - tile.token);
  tile.heads = MIN(tile_heads, heads - tile.head);
  return tile;
}

// row[tokens, pitch] = the second halves of a table's rows [tokens, 2 * half_dim], as float; narrow: room for them in half
template <typename Table>
__mlu_func__ void widen_table(float *row, Table *narrow, Table *table, int tokens, int half_dim, int pitch) {
  Table *to = sizeof(Table) == 2 ? narrow : (Table *)row;
  const int size = half_dim * sizeof(Table);
  __memcpy(to, table + half_dim, size, NRAM2NRAM, pitch * sizeof(Table), 2 * size, tokens - 1);
  if (sizeof(Table) == 2) to_float(row, narrow, PAD_UP(tokens * pitch, HALVES));
}

// The two halves of heads [rows, 2 * half_dim] into the planes, at row `first`
template <typename T>
__mlu_func__ void part(T *planes, T *heads, int first, int rows, int half_dim, int pitch, int plane) {
  const int size = half_dim * sizeof(T);
  __memcpy(planes + first * pitch, heads, size, NRAM2NRAM, pitch * sizeof(T), 2 * size, rows - 1);
  __memcpy(planes + first * pitch + plane, heads + half_dim, size, NRAM2NRAM, pitch * sizeof(T), 2 * size, rows - 1);
}

// And back
template <typename T>
__mlu_func__ void join(T *heads, T *planes, int rows, int half_dim, int pitch, int plane) {
  const int size = half_dim * sizeof(T);
  __memcpy(heads, planes, size, NRAM2NRAM, 2 * size, pitch * sizeof(T), rows - 1);
  __memcpy(heads + half_dim, planes + plane, size, NRAM2NRAM, 2 * size, pitch * sizeof(T), rows - 1);
}

// Turns the parted heads [tokens, heads, pitch] of both planes; of float planes == parted
template <typename T>
__mlu_func__ void turn(T *parted, float *planes, float *products, float *cos_row, float *sin_row, int tokens, int heads,
                       int pitch, int plane) {
  float *first = planes, *second = planes + plane, *first_sin = products, *second_sin = products + plane;
  const int row = heads * pitch, count = tokens * row, padded = PAD_UP(count, HALVES);
  if (sizeof(T) == 2) {
    to_float(first, parted, padded);
    to_float(second, parted + plane, padded);
  }
  for (int token = 0; token < tokens; ++token) {
    const int at = token * row;
    float *cos_of = cos_row + token * pitch, *sin_of = sin_row + token * pitch;
    __bang_cycle_mul(first_sin + at, first + at, sin_of, row, pitch);
    __bang_cycle_mul(second_sin + at, second + at, sin_of, row, pitch);
    __bang_cycle_mul(first + at, first + at, cos_of, row, pitch);
    __bang_cycle_mul(second + at, second + at, cos_of, row, pitch);
  }
  __bang_sub(first, first, second_sin, count);
  __bang_add(second, second, first_sin, count);
  if (sizeof(T) == 2) {
    from_float(parted, first, padded);
    from_float(parted + plane, second, padded);
  }
}

// What the kernels over a vocabulary share. A row of logits does not fit a core's NRAM, so it comes in tiles.
#pragma once
#include "launch.h"

#define INFINITE __builtin_inff()

// Logits of a tile: a power of two from 64 to `most`, and of a small vocabulary a sixteenth, so that tests see several.
static inline int tile_of(int vocab, int most) {
  int tile = HALVES;
  while (tile < most && tile * 16 < vocab) tile *= 2;
  return tile;
}

// x[0:padded] = the logits of a tile as float, the pad -inf; padded is num made a multiple of 64. What is in input's pad must be numbers.
template <typename T>
__mlu_func__ void widen(float *x, T *input, int num, int padded) {
  to_float(x, input, padded);
  for (int i = num; i < padded; ++i) x[i] = -INFINITE;
}

// Whether NaN may be among n numbers, n a multiple of 64: always where there is, and where both infinities are. Destroys buf[0:n / 2].
// By a sum, as that NaN comes out of a sum is surer than what it does in a comparison.
__mlu_func__ bool may_hold_nan(float *x, float *buf, int n) {
  __bang_add(buf, x, x + n / 2, n / 2);
  const float sum = fold_sum(buf, n / 2);
  return sum != sum;
}

// The largest of n numbers, n a multiple of 32, none of them NaN; buf holds 32.
__mlu_func__ float largest(float *x, float *buf, int n) {
  __bang_argmax(buf, x, n);
  return buf[0];
}

// The index of the first of n numbers that equals value, which is among them. Destroys buf[0:n]. Of several largest, the one that
// __bang_argmax names need not be the first.
__mlu_func__ int first_equal(float *x, float value, float *buf, int n) {
  __bang_eq_scalar(buf, x, value, n);
  return (int)__bang_findfirst1(buf, n);
}

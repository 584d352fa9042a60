// The weights of `sample`: whole numbers round(2^44 * exp((x - best) / T)) of a tile, by sums and products of float alone.
//
// The vector pipe has no float64. Here a number is a pair of floats whose sum it is, so that 48 bits are kept: sums and products leave an
// error that is itself a float (T. J. Dekker, "A floating-point technique for extending the available precision", 1971), and 2^u is
// a polynomial. In the emulator a weight differs from one by exp in float64 by 1 at most, in 6 of 100 tokens at most; by that one draw in
// 4 * 10^7 is another token's with 260,000 normal logits of a deviation of 5, one in 10^10 with a deviation of 1, one in 10^11 at 30
// degrees (what of the two distributions does not overlap). All of it wants float32 to round to the nearest, as IEEE 754 does; where the
// pipe rounds otherwise, draws are as random and as reproducible, but more often not those of other devices.
#pragma once
#include "logits.h"

#define WEIGHT_SLOTS 13  // of a tile each, in what weigh is given to work in
#define LIMBS 4          // of a weight: ((limb0 * 2^11 + limb1) * 2^11 + limb2) * 2^11 + limb3, none above 2^11
#define ROUNDER 12582912.f  // 1.5 * 2^23: what is added to it loses its fraction

// hi + lo is the number; first is hi's first 12 bits, rest the others: products of these are exact.
struct Pair {
  float *hi, *lo, *first, *rest;
};

// What the weights of a row have in common.
struct Scale {
  float best, floor;    // the largest logit; a logit of floor or less weighs nothing
  Pair per_degree;      // log2(e) / T, a tile of it
  float *least;         // what smaller logits are taken for, a tile of it
  int32_t *first_bits;  // 128 bytes
};

// Integers in the order of the numbers, the same of both zeros; and back.
__mlu_func__ int32_t key_of(float value) {
  union { float number; int32_t bits; } x;
  x.number = value;
  return x.bits < 0 ? -(x.bits & 0x7FFFFFFF) : x.bits;
}
__mlu_func__ float value_of(int32_t key) {
  union { float number; int32_t bits; } x;
  x.bits = key < 0 ? -key : key;
  return key < 0 ? -x.number : x.number;
}

__mlu_func__ void split(Pair &a, int32_t *first_bits, int n) {
  __bang_cycle_band((int8_t *)a.first, (int8_t *)a.hi, (int8_t *)first_bits, n * sizeof(float), NFU_ALIGN);
  __bang_sub(a.rest, a.hi, a.first, n);
}

// p + e = a * b
__mlu_func__ void multiply(float *p, float *e, const Pair &a, const Pair &b, float *work, int n) {
  __bang_mul(p, a.hi, b.hi, n);
  __bang_mul(e, a.first, b.first, n);
  __bang_sub(e, e, p, n);
  float *const left[5] = {a.first, a.rest, a.rest, a.hi, a.lo}, *const right[5] = {b.rest, b.first, b.rest, b.lo, b.hi};
  for (int i = 0; i < 5; ++i) {
    __bang_mul(work, left[i], right[i], n);
    __bang_add(e, e, work, n);
  }
}

// hi + lo = p + e, p the larger; hi is not p
__mlu_func__ void add_up(float *hi, float *lo, float *p, float *e, float *work, int n) {
  __bang_add(hi, p, e, n);
  __bang_sub(work, hi, p, n);
  __bang_sub(lo, e, work, n);
}

__mlu_func__ Pair pair_at(float *slots, int n) {
  Pair a = {slots, slots + n, slots + 2 * n, slots + 3 * n};
  return a;
}

// hi + lo = 2^b, b of -127 to 0, by slots of n floats: a's 4, b's 4, and 4 to work in. Cut in a whole number, which is an exponent, and
// -1/2 to 1/2, of which 2^ is a series: its last terms in float, the first 7 in pairs.
__mlu_func__ void power_of_2(float *hi, float *lo, Pair a, Pair b, float *work, float *p, float *whole, int32_t *first_bits, int n) {
  // ln(2)^k / k!, and of the first what float leaves
  const float terms[13] = {1.f,           0.693147182f,    0.240226507f,   0.0555041097f,  0.00961812865f, 0.00133335579f, 1.54035297e-4f,
                           1.52527336e-5f, 1.32154867e-6f, 1.01780863e-7f, 7.05491177e-9f, 4.44553838e-10f, 2.56784368e-11f};
  const float rests[7] = {0.f, -1.90465421e-9f, -2.2778894e-10f, -1.04563336e-9f, 4.57738042e-10f, 2.74326777e-11f, 7.06062639e-12f};
  __bang_add_scalar(whole, b.hi, ROUNDER, n);
  __bang_sub_scalar(whole, whole, ROUNDER, n);
  __bang_sub(p, b.hi, whole, n);
  add_up(b.hi, b.lo, p, b.lo, work, n);
  split(b, first_bits, n);
  __bang_mul_scalar(a.hi, b.hi, terms[12], n);
  for (int k = 11; k > 7; --k) {
    __bang_add_scalar(a.hi, a.hi, terms[k], n);
    __bang_mul(a.hi, a.hi, b.hi, n);
  }
  __bang_add_scalar(a.hi, a.hi, terms[7], n);
  __bang_write_value(a.lo, n, 0.f);
  for (int k = 6; k >= 0; --k) {
    split(a, first_bits, n);
    multiply(p, lo, a, b, work, n);
    __bang_add_scalar(a.hi, p, terms[k], n);  // the term is the larger
    __bang_sub_scalar(work, a.hi, terms[k], n);
    __bang_sub(work, p, work, n);
    __bang_add(a.lo, lo, work, n);
    __bang_add_scalar(a.lo, a.lo, rests[k], n);
  }
  add_up(hi, lo, a.hi, a.lo, work, n);
  __bang_add_scalar(whole, whole, 127.f, n);
  __bang_mul_scalar(whole, whole, 8388608.f, n);
  __bang_float2int32_tz((int32_t *)whole, whole, n, 0);  // the bits of 2^whole
  __bang_mul(hi, hi, whole, n);
  __bang_mul(lo, lo, whole, n);
}

// The limbs [LIMBS, n] of the weights of n logits, each times kept, which is 1 or 0, and 0 for a logit of floor or less; n is a multiple of
// 64, and of slots there are WEIGHT_SLOTS. Tokens of less than min_p of the best's probability weigh nothing.
__mlu_func__ float *weigh(float *x, float *kept, float min_p, const Scale &scale, float *slots, int n) {
  Pair a = pair_at(slots, n), b = pair_at(slots + 4 * n, n);
  float *p = slots + 8 * n, *lo = slots + 9 * n, *work = slots + 10 * n, *hi = slots + 11 * n, *limbs = b.hi;
  __bang_maxequal(p, x, scale.least, n);
  __bang_sub_scalar(a.hi, p, scale.best, n);  // and in a.lo what is lost: D. E. Knuth's sum
  __bang_sub(work, a.hi, p, n);
  __bang_sub(lo, a.hi, work, n);
  __bang_sub(lo, p, lo, n);
  __bang_add_scalar(work, work, scale.best, n);
  __bang_sub(a.lo, lo, work, n);
  split(a, scale.first_bits, n);
  multiply(b.hi, b.lo, a, scale.per_degree, work, n);
  power_of_2(hi, lo, a, b, work, p, slots + 12 * n, scale.first_bits, n);
  __bang_mul(hi, hi, kept, n);
  __bang_mul(lo, lo, kept, n);
  if (min_p > 0.f) {
    __bang_sub_scalar(work, hi, min_p, n);
    __bang_add(work, work, lo, n);
    __bang_ge_scalar(work, work, 0.f, n);
    __bang_mul(hi, hi, work, n);
    __bang_mul(lo, lo, work, n);
  }
  __bang_mul_scalar(lo, lo, 4194304.f, n);  // 2^22
  for (int i = 0; i < LIMBS; ++i) {
    float *limb = limbs + i * n;
    if (i == 2) __bang_add(hi, hi, lo, n);
    __bang_mul_scalar(hi, hi, 2048.f, n);
    __bang_add_scalar(limb, hi, ROUNDER, n);
    __bang_sub_scalar(limb, limb, ROUNDER, n);
    __bang_sub(hi, hi, limb, n);
  }
  return limbs;
}

// The whole number of limbs that lie n apart.
__mlu_func__ int64_t number_of(float *limbs, int n) {
  int64_t number = 0;
  for (int i = 0; i < LIMBS; ++i) number = number * 2048 + (int32_t)limbs[i * n];
  return number;
}

// The sum of n weights, exact up to 4096 of them; destroys limbs
__mlu_func__ int64_t sum_of(float *limbs, int n) {
  for (int i = 0; i < LIMBS; ++i) fold_sum(limbs + i * n, n);
  return number_of(limbs, n);
}

// For a row whose largest logit is best, at temperature degrees, a positive number. Fills what scale points to; tile is a multiple of 64.
__mlu_func__ void set_scale(Scale &scale, float best, float degrees, float *slots, int tile) {
  degrees = MIN(degrees, 4e36f);  // where all are alike: 64 times it is a float
  const int n = HALVES;
  const float floor = MAX(best - 64.f * degrees, -3.4028235e38f);
  // Where floats are further apart than degrees, only what equals the best weighs anything.
  const bool is_cold = degrees < 1e-36f || !(floor < best);
  scale.best = best;
  scale.floor = !is_cold ? floor : best == 0.f ? -1.17549435e-38f : value_of(key_of(best) - 1);
  __bang_write_value(scale.least, tile, is_cold ? best : floor);
  if (is_cold) degrees = 1.f;
  // 1 / degrees: the quotient and, from what it leaves, the rest
  Pair a = pair_at(slots, n), b = pair_at(slots + 4 * n, n);
  float *p = slots + 8 * n, *e = slots + 9 * n, *work = slots + 10 * n;
  __bang_write_value(a.hi, n, degrees);
  __bang_write_value(a.lo, n, 0.f);
  __bang_write_value(b.hi, n, 1.f / degrees);
  __bang_write_value(b.lo, n, 0.f);
  split(a, scale.first_bits, n);
  split(b, scale.first_bits, n);
  multiply(p, e, a, b, work, n);
  __bang_sub_scalar(p, p, 1.f, n);
  __bang_add(p, p, e, n);
  __bang_mul(p, p, b.hi, n);
  __bang_mul_scalar(b.lo, p, -1.f, n);
  __bang_write_value(a.hi, n, is_cold ? 0.f : LOG2_E);
  __bang_write_value(a.lo, n, is_cold ? 0.f : 1.92596299e-8f);
  split(a, scale.first_bits, n);
  multiply(p, e, a, b, work, n);
  add_up(a.hi, a.lo, p, e, work, n);
  __bang_write_value(scale.per_degree.hi, tile, a.hi[0]);
  __bang_write_value(scale.per_degree.lo, tile, a.lo[0]);
  split(scale.per_degree, scale.first_bits, tile);
}

// Random numbers and shares of whole numbers of 64 bits, by scalar code.
#pragma once
#include "launch.h"

__mlu_func__ uint32_t high_of(uint32_t a, uint32_t b) { return (uint32_t)(((uint64_t)a * b) >> 32); }

// a * b / 2^64, and whether that is less than the product
__mlu_func__ uint64_t high_of(uint64_t a, uint64_t b, bool &has_rest) {
  const uint32_t a1 = (uint32_t)(a >> 32), a0 = (uint32_t)a, b1 = (uint32_t)(b >> 32), b0 = (uint32_t)b;
  const uint64_t low = (uint64_t)a0 * b0, middle = (uint64_t)a1 * b0 + (low >> 32), other = (uint64_t)a0 * b1 + (uint32_t)middle;
  has_rest = (uint32_t)low || (uint32_t)other;
  return (uint64_t)a1 * b1 + (middle >> 32) + (other >> 32);
}

// 53 random bits: Philox4x32-10 with the 64 bits of seed as key, and position and sample_index as counter.
__mlu_func__ uint64_t random_bits(const uint32_t seed[2], const uint32_t position[2], uint32_t sample_index) {
  uint32_t a = position[0], b = position[1], c = sample_index, d = 0, k0 = seed[0], k1 = seed[1];
  for (int round = 0; round < 10; ++round) {
    const uint32_t p = 0xD2511F53u * a, p_high = high_of(0xD2511F53u, a), q = 0xCD9E8D57u * c, q_high = high_of(0xCD9E8D57u, c);
    a = q_high ^ b ^ k0;
    b = q;
    c = p_high ^ d ^ k1;
    d = p;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return ((uint64_t)(a >> 5) << 26) | (b >> 6);
}

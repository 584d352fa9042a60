// What every .mlu file of this folder includes: how a kernel is launched, where its NRAM lies, and the arithmetic that kernels share.
//
// A .mlu file has two readers: cncc, for the card, and g++ with ../emu/bang_emu.h, for tests. They differ in this file and nowhere else.
#pragma once
#include <stdint.h>
#include <stdio.h>
#ifdef BANG_EMU
#include "bang_emu.h"
#else  // cncc, which defines __BANG__
#include <bang.h>
// null, or what the runtime says of a launch that it did not take
static inline const char *launched() {
  const cnrtRet_t code = cnrtGetLastError();
  return code == cnrtSuccess ? 0 : cnrtGetErrorStr(code);
}
#define BANG_LAUNCH(kernel, dim, type, queue, ...) (kernel<<<dim, type, queue>>>(__VA_ARGS__), launched())
#endif
#include "entries.h"

#define NFU_ALIGN 128  // bytes: vector operands that begin at and are multiples of so many are taken by every architecture
#define NRAM_BYTES (640 * 1024)  // a core's, less the 128 KB that cncc keeps for the stack; in the host's pass there is no __MLU_NRAM_SIZE__
#ifdef __BANG_ARCH__
static_assert(NRAM_BYTES <= (__MLU_NRAM_SIZE__ - 128) * 1024, "a core has less NRAM than the kernels count on");
#endif
#define PAD_UP(x, y) (((x) + (y) - 1) / (y) * (y))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define FLOATS 32  // in 128 bytes: counts of elements are padded to this for float, and to HALVES for half
#define HALVES 64

#define NRAM_BUFFER __nram__ __attribute__((aligned(NFU_ALIGN))) char nram_buffer[NRAM_BYTES]  // each file's, at its top

// A kernel's NRAM is one list, read twice: `#define BUFFERS(X) X(float, row, 2 * padded) X(T, input, padded)`.
// In the kernel `NRAM_LAYOUT(BUFFERS)` declares the pointers one after another, each at a multiple of 128 bytes; in the entry
// `NRAM_NEED(BUFFERS)` is the sum. Both see the same names, so T and the sizes are called alike in both.
#ifdef BANG_EMU  // which remembers them, and what lies between
#define NRAM_TAKE(type, name, count) \
  type *name = (type *)emu::take(#name, nram_at, PAD_UP((count) * (int)sizeof(type), NFU_ALIGN));
#else
#define NRAM_TAKE(type, name, count)                 \
  type *name = (type *)(nram_buffer + nram_at);      \
  nram_at += PAD_UP((count) * (int)sizeof(type), NFU_ALIGN);
#endif
#define NRAM_COUNT(type, name, count) +PAD_UP((int64_t)(count) * (int64_t)sizeof(type), NFU_ALIGN)
#define NRAM_LAYOUT(BUFFERS) \
  int nram_at = 0;           \
  BUFFERS(NRAM_TAKE)
#define NRAM_NEED(BUFFERS) ((int64_t)0 BUFFERS(NRAM_COUNT))

// What an entry returns for arguments that a core has no room for; null where they fit.
static inline const char *over_capacity(const char *argument, int64_t need) {
  static thread_local char text[160];
  if (need <= NRAM_BYTES) return 0;
  snprintf(text, sizeof text, "%s needs %lld bytes of a core's NRAM but it has %d; run it on another device.", argument,
           (long long)need, NRAM_BYTES);
  return text;
}

static inline cnrtDim3_t tasks_of(int tasks) {
  cnrtDim3_t dim = {(unsigned)tasks, 1, 1};
  return dim;
}

// dst[0:n] = src[0:n] as float, and back; n a multiple of 64
__mlu_func__ void to_float(float *dst, half *src, int n) { __bang_half2float(dst, src, n); }
__mlu_func__ void to_float(float *dst, float *src, int n) { __bang_mul_scalar(dst, src, 1.f, n); }
__mlu_func__ void from_float(half *dst, float *src, int n) { __bang_float2half_rn(dst, src, n); }
__mlu_func__ void from_float(float *dst, float *src, int n) { __bang_mul_scalar(dst, src, 1.f, n); }

// buf[0:cols] = the sum of the rows of buf[rows, cols], cols a multiple of 32; destroys buf
__mlu_func__ void fold_rows(float *buf, int rows, int cols) {
  while (rows > 1) {
    const int keep = (rows + 1) / 2;
    __bang_add(buf, buf, buf + keep * cols, (rows - keep) * cols);
    rows = keep;
  }
}

// The sum of n floats, n a multiple of 32; destroys buf
__mlu_func__ float fold_sum(float *buf, int n) {
  fold_rows(buf, n / FLOATS, FLOATS);
  __bang_reduce_sum(buf, buf, FLOATS);
  return buf[0];
}

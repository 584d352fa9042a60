// The vector intrinsics, by the device's names and with its order of arguments. Sources are not const, as in older headers. All are
// static, templates too: else the linker would give one file's, and with it that file's NRAM, to all.
#pragma once

template <typename T>
BANG_EMU_FUNC void __bang_write_value(T *d, int n, T v) {
  emu::out("__bang_write_value", d, n);
  emu::spend(n * sizeof(T));
  std::fill(d, d + n, v);
}

#define BANG_EMU_BINARY(NAME, EXPR)                                      \
  template <typename T>                                                  \
  BANG_EMU_FUNC void NAME(T *d, T *a, T *b, int n) {                     \
    emu::binary(#NAME, d, a, b, n, [](T x, T y) -> T { return EXPR; });  \
  }
BANG_EMU_BINARY(__bang_add, x + y)
BANG_EMU_BINARY(__bang_sub, x - y)
BANG_EMU_BINARY(__bang_mul, x *y)
BANG_EMU_BINARY(__bang_maxequal, x > y ? x : y)
BANG_EMU_BINARY(__bang_minequal, x < y ? x : y)
BANG_EMU_BINARY(__bang_eq, T(x == y))
BANG_EMU_BINARY(__bang_gt, T(x > y))
BANG_EMU_BINARY(__bang_ge, T(x >= y))
BANG_EMU_BINARY(__bang_lt, T(x < y))
BANG_EMU_BINARY(__bang_le, T(x <= y))

#define BANG_EMU_SCALAR(NAME, EXPR)                                  \
  template <typename T>                                              \
  BANG_EMU_FUNC void NAME(T *d, T *a, T y, int n) {                  \
    emu::unary(#NAME, d, a, n, [y](T x) -> T { return EXPR; });      \
  }
BANG_EMU_SCALAR(__bang_add_scalar, x + y)
BANG_EMU_SCALAR(__bang_sub_scalar, x - y)
BANG_EMU_SCALAR(__bang_mul_scalar, x *y)
BANG_EMU_SCALAR(__bang_eq_scalar, T(x == y))
BANG_EMU_SCALAR(__bang_gt_scalar, T(x > y))
BANG_EMU_SCALAR(__bang_ge_scalar, T(x >= y))
BANG_EMU_SCALAR(__bang_lt_scalar, T(x < y))
BANG_EMU_SCALAR(__bang_le_scalar, T(x <= y))

#define BANG_EMU_CYCLE(NAME, EXPR)                                         \
  template <typename T>                                                    \
  BANG_EMU_FUNC void NAME(T *d, T *a, T *b, int n, int m) {                \
    emu::cycle(#NAME, d, a, b, n, m, [](T x, T y) -> T { return EXPR; });  \
  }
BANG_EMU_CYCLE(__bang_cycle_add, x + y)
BANG_EMU_CYCLE(__bang_cycle_sub, x - y)
BANG_EMU_CYCLE(__bang_cycle_mul, x *y)

// d = a * b + c or a * b - c in the time of one pass, b and c each a scalar, or a vector repeated every m elements. The product is rounded
// before the sum, as up to 3xx on the card. Forms in Cambricon/mlu-ops v1.5.2, compiled for 372:
// lgamma_block.mlu (scalar, scalar), border_align_forward_union1.mlu (scalar, vector), msda_forward_fast_union1.mlu (vector, scalar and
// vector, with a cycle).
enum mluFusionOpCode { FUSION_FMA, FUSION_FMS };
template <typename T, typename B, typename C>
BANG_EMU_FUNC void __bang_fusion(mluFusionOpCode code, T *d, T *a, B b, C c, int n, int m) {
  const char *op = "__bang_fusion";
  if (m <= 0 || n % m) emu::fail("%s: %d elements are not a multiple of the cycle %d", op, n, m);
  const auto check = [&](auto term) {
    if constexpr (std::is_pointer_v<decltype(term)>) {
      emu::in(op, term, m);
      emu::alias(op, d, n * sizeof(T), term, m * sizeof(T), m == n);
    }
  };
  const auto element = [](auto term, int i) -> T {
    if constexpr (std::is_pointer_v<decltype(term)>) return term[i];
    else return term;
  };
  emu::in(op, a, n);
  check(b);
  check(c);
  emu::out(op, d, n);
  emu::alias(op, d, n * sizeof(T), a, n * sizeof(T), true);
  emu::spend(n * sizeof(T));
  const T sign = code == FUSION_FMA ? 1 : -1;
  for (int i = 0; i < n; i += m)
    for (int j = 0; j < m; ++j) d[i + j] = (T)(a[i + j] * element(b, j)) + sign * element(c, j);
}
template <typename T>
BANG_EMU_FUNC void __bang_fusion(mluFusionOpCode code, T *d, T *a, T b, T c, int n) {
  __bang_fusion(code, d, a, b, c, n, n);
}

#define BANG_EMU_UNARY(NAME, EXPR)                                              \
  BANG_EMU_FUNC void NAME(float *d, float *s, int n) {                          \
    emu::unary(#NAME, d, s, n, [](float x) -> float { return EXPR; });          \
  }
BANG_EMU_UNARY(__bang_pow2, exp2f(x))
BANG_EMU_UNARY(__bang_log2, log2f(x))
BANG_EMU_UNARY(__bang_recip, 1.f / x)
BANG_EMU_UNARY(__bang_sqrt, sqrtf(x))
BANG_EMU_UNARY(__bang_square, x *x)
BANG_EMU_UNARY(__bang_abs, fabsf(x))

BANG_EMU_FUNC void __bang_half2float(float *d, half *s, int n) {
  emu::unary("__bang_half2float", d, s, n, [](half x) -> float { return x; });
}
BANG_EMU_FUNC void __bang_float2half_rn(half *d, float *s, int n) {
  emu::unary("__bang_float2half_rn", d, s, n, [](float x) -> half { return (half)x; });
}

// Used in kernels that were built for compute_30 (a profile of masked_fill on torch_mlu, whose repository is unknown)
BANG_EMU_FUNC void __bang_uchar2half(half *d, unsigned char *s, int n) {
  emu::unary("__bang_uchar2half", d, s, n, [](unsigned char x) -> half { return x; });
}

// The elements of src where mask is not 0, side by side; returns how many. What follows them in dst is undefined: poison here. Of half and
// float in Cambricon/mlu-ops v1.5.2, compiled for 372: roipoint_pool3d_union1.mlu
template <typename T>
BANG_EMU_FUNC unsigned __bang_filter(T *d, T *s, T *mask, int n) {
  const char *op = "__bang_filter";
  emu::in(op, s, n);
  emu::in(op, mask, n);
  emu::out(op, d, n);
  emu::alias(op, d, n * sizeof(T), s, n * sizeof(T), true);
  emu::alias(op, d, n * sizeof(T), mask, n * sizeof(T), false);
  emu::spend(n * sizeof(T));
  int count = 0;
  for (int i = 0; i < n; ++i)
    if (mask[i] != 0) d[count++] = s[i];
  emu::poison(emu::range(d + count, (n - count) * sizeof(T)));
  return count;
}

// [rows, cols] -> [cols, rows]; before 3xx both dimensions had to be a multiple of 64 bytes
template <typename T>
BANG_EMU_FUNC void __bang_transpose(T *d, T *s, int rows, int cols) {
  const char *op = "__bang_transpose";
  if (emu::state().options.is_strict && (rows * sizeof(T) % 64 || cols * sizeof(T) % 64))
    emu::fail("%s: %dx%d: each dimension must be a multiple of 64 bytes", op, rows, cols);
  const size_t n = (size_t)rows * cols;
  emu::in(op, s, n);
  emu::out(op, d, n);
  emu::alias(op, d, n * sizeof(T), s, n * sizeof(T), false);
  emu::spend(n * sizeof(T));
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) d[j * rows + i] = s[i * cols + j];
}

// Each 128 bytes of src are summed into the first element of those of dst, whose others are undefined: poison here.
BANG_EMU_FUNC void __bang_reduce_sum(float *d, float *s, int n) {
  const char *op = "__bang_reduce_sum";
  emu::in(op, s, n, 128);
  emu::out(op, d, n, 128);
  emu::alias(op, d, n * 4, s, n * 4, true);
  emu::spend(n * 4);
  for (int i = 0; i < n; i += 32) {
    float sum = 0;
    for (int j = 0; j < 32; ++j) sum += s[i + j];
    emu::poison(emu::range(d + i, 128));
    d[i] = sum;
  }
}

// d[0] = the maximum, ((unsigned *)d)[1] = the index of the first of them; d holds 128 bytes. What it gives where there is NaN is not
// known: poison here.
BANG_EMU_FUNC void __bang_argmax(float *d, float *s, int n) {
  const char *op = "__bang_argmax";
  emu::in(op, s, n);
  emu::out(op, d, 32);
  emu::alias(op, d, 128, s, n * 4, false);
  emu::spend(n * 4);
  int best = 0;
  for (int i = 1; i < n; ++i)
    if (s[i] > s[best]) best = i;
  emu::poison(emu::range(d, 128));
  if (std::any_of(s, s + n, [](float x) { return x != x; })) return;
  d[0] = s[best];
  ((unsigned *)d)[1] = best;
}

// ---- whole numbers and bits ---------------------------------------------------------------------------------------------------------
// Cambricon/mlu-ops v1.5.2, in files without a guard for the architecture: kernels/voxelization/voxelization_kernel.mlu (count and
// findfirst1 by value; comparison and product of int32_t), kernels/lgamma/lgamma_block.mlu (bits as int8_t, int32_t times a scalar),
// kernels/ms_deform_attn/ms_deform_attn_forward/msda_forward_fast_union1.mlu (cycle_band), and
// kernels/roiaware_pool3d/roiaware_pool3d_union1.mlu (float2int32_tz, which has a branch for 372 beside it)

// How many elements are not 0.
BANG_EMU_FUNC unsigned __bang_count(float *s, int n) {
  emu::in("__bang_count", s, n);
  emu::spend(n * 4);
  unsigned count = 0;
  for (int i = 0; i < n; ++i) count += s[i] != 0;
  return count;
}

// The index of the first element that is not 0; what it is of none is not known, and a fault here.
BANG_EMU_FUNC unsigned __bang_findfirst1(float *s, int n) {
  emu::in("__bang_findfirst1", s, n);
  emu::spend(n * 4);
  for (int i = 0; i < n; ++i)
    if (s[i] != 0) return i;
  emu::fail("__bang_findfirst1: every element is 0");
}

// n is a number of bytes; operands are looked at as words, else bits would be taken for poison
#define BANG_EMU_BITS(NAME, EXPR)                                                                                              \
  BANG_EMU_FUNC void NAME(int8_t *d, int8_t *a, int8_t *b, int n) {                                                            \
    emu::binary(#NAME, (int32_t *)d, (int32_t *)a, (int32_t *)b, n / 4, [](int32_t x, int32_t y) -> int32_t { return EXPR; }); \
  }
BANG_EMU_BITS(__bang_band, x &y)
BANG_EMU_BITS(__bang_bor, x | y)

BANG_EMU_FUNC void __bang_bnot(int8_t *d, int8_t *s, int n) {
  emu::unary("__bang_bnot", (int32_t *)d, (int32_t *)s, n / 4, [](int32_t x) -> int32_t { return ~x; });
}
BANG_EMU_FUNC void __bang_cycle_band(int8_t *d, int8_t *a, int8_t *b, int n, int m) {
  emu::cycle("__bang_cycle_band", (int32_t *)d, (int32_t *)a, (int32_t *)b, n / 4, m / 4,
             [](int32_t x, int32_t y) -> int32_t { return x & y; });
}

// Truncated; position is that of the fixed point, always 0 here.
BANG_EMU_FUNC void __bang_float2int32_tz(int32_t *d, float *s, int n, int position) {
  if (position) emu::fail("__bang_float2int32_tz: position %d", position);
  emu::unary("__bang_float2int32_tz", d, s, n, [](float x) -> int32_t { return (int32_t)x; });
}

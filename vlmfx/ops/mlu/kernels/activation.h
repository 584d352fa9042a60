// The activations, which activation.mlu and gated_activation.mlu share: x·sigmoid(y), y an odd polynomial of x.
//
// sigmoid(y) is 1 / (1 + 2^(-y·log2 e)). For large -y the power is infinite and its reciprocal 0, as mlu-ops' own sigmoid has it
// (v1.5.2, kernels/utils/common.h); no result is a difference, so nothing cancels.
#pragma once
#include "launch.h"

// x[0:n] = the activation of x[0:n], n a multiple of 32; power and square are scratch of n, square only for the kinds of GELU
// Passes: SiLU and quick GELU 5, GELU by tanh 7, GELU 12
__mlu_func__ void activate(float *x, float *power, float *square, int kind, int n) {
  if (kind == VLMFX_SILU) {
    __bang_mul_scalar(power, x, -LOG2_E, n);
  } else if (kind == VLMFX_QUICK_GELU) {
    __bang_mul_scalar(power, x, -1.702f * LOG2_E, n);
  } else {
    __bang_mul(square, x, x, n);
    if (kind == VLMFX_GELU_TANH) {
      // (1 + tanh(u)) / 2 is sigmoid(2u), u = sqrt(2/pi)·(x + 0.044715 x^3)
      __bang_fusion(FUSION_FMA, power, square, -0.10294324f, -2.3022082f, n);
    } else {
      // -log2(Phi(x) / Phi(-x)) / x, as in ../../triton/activation.py: fitted so that the result is within 7e-8 of x·Phi(x)
      __bang_fusion(FUSION_FMA, power, square, -5.20990584e-09f, 3.850448707e-07f, n);
      __bang_fusion(FUSION_FMS, power, power, square, 1.145242732e-05f, n, n);
      __bang_fusion(FUSION_FMS, power, power, square, -1.593893976e-04f, n, n);
      __bang_fusion(FUSION_FMS, power, power, square, -9.55929936e-05f, n, n);
      __bang_fusion(FUSION_FMS, power, power, square, 0.1048385799f, n, n);
      __bang_fusion(FUSION_FMS, power, power, square, 2.302207232f, n, n);
    }
    __bang_mul(power, power, x, n);
  }
  __bang_pow2(power, power, n);
  __bang_add_scalar(power, power, 1.f, n);
  __bang_recip(power, power, n);
  __bang_mul(x, x, power, n);
}

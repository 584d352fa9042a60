// Stands for torch_mlu's header of this name.
#pragma once
#include <ATen/core/Tensor.h>

namespace torch_mlu {
inline at::Tensor cnnl_contiguous(const at::Tensor &t) { return t.contiguous(); }
}  // namespace torch_mlu

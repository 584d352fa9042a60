// Stands for torch_mlu's header of this name. Of inputs alone bindings.cpp asks this, so a kernel that writes to one is a fault.
#pragma once
#include <ATen/core/Tensor.h>

#include "bang_state.h"

namespace torch_mlu {
inline at::Tensor cnnl_contiguous(const at::Tensor &t) {
  at::Tensor input = t.contiguous();
  bang_emu_register(input.const_data_ptr(), input.nbytes(), false);
  return input;
}
}  // namespace torch_mlu

// Stands for torch_mlu's header of this name. Taking a tensor's address is what tells the emulator of its memory.
#pragma once
#include <ATen/core/Tensor.h>

#include "bang_state.h"

namespace torch_mlu {
inline c10::TensorImpl *getMluTensorImpl(const at::Tensor &t) { return t.unsafeGetTensorImpl(); }
inline void *mlu_data_ptr(c10::TensorImpl *t) {
  void *data = t->mutable_data();
  bang_emu_register(data, t->numel() * t->itemsize(), true);
  return data;
}
}  // namespace torch_mlu

// Stands for torch_mlu's header of this name. An op asks for the queue when it begins: what earlier ones registered is forgotten.
#pragma once
#include "bang_cnrt.h"
#include "bang_state.h"

namespace torch_mlu {
inline cnrtQueue_t getCurMLUStream(int = -1) {
  bang_emu_forget();
  return nullptr;
}
}  // namespace torch_mlu

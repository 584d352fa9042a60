// Stands for torch_mlu's header of this name. A guard begins an op: what earlier ones registered is forgotten.
#pragma once
#include <c10/core/Device.h>

#include "bang_state.h"

namespace torch_mlu::mlu {
struct MLUGuard {
  explicit MLUGuard(c10::Device) { bang_emu_forget(); }
};
}  // namespace torch_mlu::mlu

// Stands for torch_mlu's header of this name.
#pragma once
#include "bang_cnrt.h"

namespace torch_mlu {
inline cnrtQueue_t getCurMLUStream(int = -1) { return nullptr; }
}  // namespace torch_mlu

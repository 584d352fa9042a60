// Stands for torch_mlu's header of this name.
#pragma once
#include <cstdint>

#include "bang_cnrt.h"
#include "bang_state.h"

namespace torch_mlu {
inline uint32_t getDeviceAttr(cnrtDeviceAttr_t attr) { return attr == cnrtAttrClusterCount ? 1 : bang_emu::state().options.cores; }
}  // namespace torch_mlu

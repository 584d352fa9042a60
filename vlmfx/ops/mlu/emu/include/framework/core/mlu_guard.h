// Stands for torch_mlu's header of this name; as there, a guard is of an MLU alone, and is not copied.
#pragma once
#include <c10/core/Device.h>
#include <c10/util/Exception.h>

namespace torch_mlu::mlu {
struct MLUGuard {
  explicit MLUGuard(c10::Device device) { TORCH_INTERNAL_ASSERT(device.type() == c10::DeviceType::PrivateUse1); }
  MLUGuard(MLUGuard &&) = delete;
};
}  // namespace torch_mlu::mlu

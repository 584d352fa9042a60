// A pretend `mlu` device for tests: tensors of PrivateUse1 whose memory is the host's, so that the emulated kernels can take their
// addresses, and on which every operator of torch's own falls back to the CPU.
//
// While a graph is captured, what would stop a capture on a card does so here: reading a number on the host, copies between host and
// device, and memory that is not of the graph's pool, which on a card is the host's.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>

namespace {
constexpr auto kMlu = c10::DeviceType::PrivateUse1;
std::atomic<bool> is_capturing{false};

void not_while_capturing(const char *what) { TORCH_CHECK(!is_capturing, what, " while a graph is captured"); }

struct Guard final : c10::impl::DeviceGuardImplInterface {  // there is one device, and nothing to switch
  c10::DeviceType type() const override { return kMlu; }
  c10::Device exchangeDevice(c10::Device) const override { return {kMlu, 0}; }
  c10::Device getDevice() const override { return {kMlu, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, {kMlu, 0}); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream({kMlu, 0}); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void *p = n ? std::aligned_alloc(128, (n + 127) / 128 * 128) : nullptr;
    return {p, p, &std::free, c10::Device(kMlu, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void *d, const void *s, size_t n) const override { default_copy_data(d, s, n); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kMlu, &allocator);

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    not_while_capturing("pinned memory is allocated");
    return c10::GetCPUAllocator()->allocate(n);
  }
  void copy_data(void *d, const void *s, size_t n) const override { default_copy_data(d, s, n); }
};
Pinned pinned;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Allocator *getPinnedMemoryAllocator() const override { return &pinned; }
};

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}
at::Tensor on_cpu(const at::Tensor &t) {  // the same bytes, as the CPU sees them
  if (t.is_cpu()) return t;
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU));
}
at::Tensor copy_from(const at::Tensor &src, const at::Tensor &dst, bool) {
  if (src.device() != dst.device()) not_while_capturing("a copy between host and device");
  on_cpu(dst).copy_(on_cpu(src));
  return dst;
}
at::Tensor copy_from_and_resize(const at::Tensor &src, const at::Tensor &dst) {
  dst.resize_(src.sizes());
  on_cpu(dst).copy_(on_cpu(src));
  return dst;
}
at::Scalar local_scalar(const at::Tensor &t) {
  not_while_capturing("a number is read on the host");
  return on_cpu(t).item();
}
void on_fallback(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
  const bool before = is_capturing.exchange(false);  // the fallback copies, which an operator of a card does not
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    is_capturing = before;
    throw;
  }
  is_capturing = before;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_fallback>()); }
}  // namespace

extern "C" __attribute__((visibility("default"))) void mlu_register_hooks() {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}
extern "C" __attribute__((visibility("default"))) void mlu_capturing(int is) { is_capturing = is != 0; }

// An accelerator that is not there: its memory is the host's, its kernels are the CPU's, and as on a real one an
// operation on tensors of two devices is an error. Memory that nobody has written is NaN.

#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/_local_scalar_dense_cpu_dispatch.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstdlib>
#include <cstring>
#include <torch/library.h>

namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using std::optional;

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device HERE{TYPE, 0};
const c10::DispatchKeySet KEYS{c10::DispatchKey::PrivateUse1};

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    void *start = size ? std::malloc(size) : nullptr;
    if (start) std::memset(start, 0xff, size);  // NaN in every dtype
    return {start, start, &std::free, HERE};
  }
  at::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void *to, const void *from, size_t size) const override { std::memcpy(to, from, size); }
} memory;
REGISTER_ALLOCATOR(TYPE, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void **, const c10::Stream &, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
};
const bool REGISTERED = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

c10::IntArrayRef ints(SymIntArrayRef values) { return C10_AS_INTARRAYREF_SLOW(values); }

Tensor empty(c10::IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device>,
             optional<bool>, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, dtype.value_or(at::kFloat), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, optional<at::ScalarType> dtype,
                     optional<at::Layout>, optional<at::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, dtype.value_or(at::kFloat));
}

Tensor on_cpu(const Tensor &tensor) {  // in the same memory
  if (!tensor.defined() || tensor.device() != HERE) return tensor;
  return at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

Tensor copy_from(const Tensor &from, const Tensor &to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor &from, const Tensor &to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Tensor view(const Tensor &tensor, SymIntArrayRef size) { return at::native::view(tensor, ints(size)); }

Tensor as_strided(const Tensor &tensor, SymIntArrayRef size, SymIntArrayRef stride, optional<SymInt> offset) {
  return at::cpu::as_strided(tensor, ints(size), ints(stride), offset ? offset->expect_int() : tensor.storage_offset());
}

Tensor reshape_alias(const Tensor &tensor, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, ints(size), ints(stride));
}

Tensor &set(Tensor &tensor, at::Storage storage, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::cpu::set_(tensor, storage, offset.expect_int(), ints(size), ints(stride));
}

const Tensor &resize(const Tensor &tensor, SymIntArrayRef size, optional<at::MemoryFormat>) {
  if (tensor.sizes() == ints(size)) return tensor;  // with its strides
  const int64_t count = c10::multiply_integers(ints(size));
  const size_t bytes = (tensor.storage_offset() + count) * tensor.itemsize();
  const at::Storage &storage = tensor.storage();
  if (storage.nbytes() < bytes) {
    at::DataPtr larger = memory.allocate(bytes);
    if (storage.nbytes()) std::memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(ints(size));
  return tensor;
}

at::Scalar item(const Tensor &tensor) { return at::cpu::_local_scalar_dense(on_cpu(tensor)); }

void check_device(const Tensor &tensor, const std::string &name) {
  // As on CUDA, numbers of the CPU may take part.
  const bool other = tensor.defined() && tensor.dim() && tensor.device() != HERE;
  TORCH_CHECK(!other, "expected all tensors on ", HERE, ", got one on ", tensor.device(), " in ", name);
}

Tensor convolution(const Tensor &x, const Tensor &weight, const optional<Tensor> &bias, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
                   SymInt groups) {
  const bool biased = bias && bias->defined();
  for (const Tensor &tensor : {x, weight, biased ? *bias : x}) check_device(tensor, "convolution");
  return at::convolution_symint(on_cpu(x), on_cpu(weight), biased ? optional<Tensor>(on_cpu(*bias)) : optional<Tensor>(),
                                stride, padding, dilation, transposed, output_padding, groups).to(HERE);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor &grad, const Tensor &x, const Tensor &weight, SymIntArrayRef stride, SymIntArrayRef padding,
    SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups, std::array<bool, 3> mask) {
  const std::vector<SymInt> biases{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  auto [by_x, by_weight, by_bias] =
      at::convolution_backward_symint(on_cpu(grad), on_cpu(x), on_cpu(weight), at::OptionalSymIntArrayRef(biases),
                                      stride, padding, dilation, transposed, output_padding, groups, mask);
  const auto moved = [](const Tensor &tensor) { return tensor.defined() ? tensor.to(HERE) : tensor; };
  return {moved(by_x), moved(by_weight), moved(by_bias)};
}

void compute_on_cpu(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
  const std::string &name = op.schema().name();
  for (const auto &value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (name.rfind("aten::index", 0) == 0) continue;  // indices may lie on the CPU
    if (value.isTensor()) check_device(value.toTensor(), name);
    if (value.isTensorList()) {
      for (const Tensor &tensor : value.toTensorVector()) check_device(tensor, name);
    }
  }
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("view", &view);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("set_.source_Storage_storage_offset", &set);
  m.impl("resize_", &resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

}  // namespace

// What PyTorch's core asks of CUDA before tensors of such a device may pass through autograd: which
// devices there are, a guard that switches between them, and memory that is pinned.
//
// Built and loaded by device.py before `import torch` ends: PyTorch asks once which hooks there are,
// and it looks for them by the names that are used here. The host does all work as it is asked for,
// so every event has happened already.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <map>
#include <mutex>

using c10::DataPtr, c10::Device, c10::DeviceIndex, c10::DeviceType, c10::EventFlag, c10::Stream;

namespace {
constexpr DeviceIndex kDevices = 2;
thread_local DeviceIndex current = 0;

// Host memory that counts as pinned: where it begins, where it ends, and what frees it.
std::mutex pinned_lock;
std::map<const char*, std::pair<const char*, DataPtr>> pinned;

void unpin(void* begin) {
  const std::lock_guard<std::mutex> turn(pinned_lock);
  pinned.erase(static_cast<const char*>(begin));
}

struct PinnedAllocator final : c10::Allocator {
  DataPtr allocate(size_t size) override {
    DataPtr memory = c10::GetCPUAllocator()->allocate(size);
    void* begin = memory.get();
    const std::lock_guard<std::mutex> turn(pinned_lock);
    const char* first = static_cast<const char*>(begin);
    if (begin != nullptr) pinned[first] = {first + size, std::move(memory)};
    return {begin, begin, begin == nullptr ? nullptr : &unpin, DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
} pinned_allocator;
}  // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return std::exchange(current, index);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return std::exchange(current, index < 0 ? current : index);
  }
  Device getDeviceFromPtr(void*) const override { return {DeviceType::CUDA, current}; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* at) const override {
    const std::lock_guard<std::mutex> turn(pinned_lock);
    const char* asked = static_cast<const char*>(at);
    auto after = pinned.upper_bound(asked);
    return after != pinned.begin() && asked < std::prev(after)->second.first;
  }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    return detail::getDefaultCPUGenerator();
  }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device to) const override {
    return {DeviceType::CUDA, std::exchange(current, to.index())};
  }
  Device getDevice() const override { return {DeviceType::CUDA, current}; }
  void setDevice(Device to) const override { current = to.index(); }
  void uncheckedSetDevice(Device to) const noexcept override { current = to.index(); }
  Stream getStream(Device of) const noexcept override { return Stream(Stream::DEFAULT, of); }
  Stream getDefaultStream(Device of) const override { return Stream(Stream::DEFAULT, of); }
  Stream getNewStream(Device of, int = 0) const override { return Stream(Stream::DEFAULT, of); }
  Stream exchangeStream(Stream to) const noexcept override { return to; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
namespace c10 { C10_REGISTER_GUARD_IMPL(CUDA, ::Guard); }

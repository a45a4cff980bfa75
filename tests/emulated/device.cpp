// An accelerator on host threads: every operator runs later, on raw pointers, on its stream.
//
// A stream is a queue and a thread. Work waits in the queue until something wants its result: a
// host that synchronises, a stream that waits for an event, a host that asks an event a few times,
// or `patience`. So work is as late as the waits of a program allow, at every run alike, and a wait
// that is missing shows as wrong numbers. Freed memory is overwritten with NaN in the order of the
// stream that allocated it, as the next owner of a caching allocator's block would do.

#include <ATen/ATen.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_set>

namespace py = pybind11;
using at::Tensor;
using c10::DeviceIndex;
using c10::IValue;
using Stack = torch::jit::Stack;

namespace {

constexpr auto DEVICE = c10::DeviceType::PrivateUse1;
constexpr auto KEY = c10::DispatchKey::PrivateUse1;
constexpr int DEVICES = 2, STREAMS = 16;  // streams per device, handed out in turn
constexpr int POLLS = 3;  // answers "not yet" of an event, before it wants its work done

// --- streams ---------------------------------------------------------------------------------

struct Queue {
  DeviceIndex device;
  int id;
  std::deque<std::function<void()>> tasks;
  uint64_t issued = 0, done = 0, wanted = 0;
  bool started = false;
};

// NOTE: leaked, because threads wait for them until the process ends.
auto& mutex = *new std::mutex;
auto& changed = *new std::condition_variable;
auto& queues = *[] {
  auto* made = new std::vector<Queue>(DEVICES * STREAMS);
  for (int i = 0; i < DEVICES * STREAMS; ++i) {
    (*made)[i].device = static_cast<DeviceIndex>(i / STREAMS);
    (*made)[i].id = i % STREAMS;
  }
  return made;
}();
auto& failure = *new std::string;
auto& generator = *new std::mt19937(0);
bool eager = false, refuse_syncs = false, capturing = false;
double random_share = 0;  // of enqueued tasks after which some stream may run a part of its work
int patience_ms = 0;  // after which a stream works unasked; 0: never
int64_t syncs = 0, allocations = 0;
int next_stream[DEVICES] = {};
thread_local DeviceIndex current_device = 0;
thread_local int current_stream[DEVICES] = {};

using Lock = std::unique_lock<std::mutex>;

Queue& queue_of(DeviceIndex device, int id) {
  return queues[device * STREAMS + id];
}

Queue& queue_of(c10::Stream stream) {
  return queue_of(stream.device_index(), static_cast<int>(stream.id()));
}

Queue& current_queue(DeviceIndex device) {
  return queue_of(device, current_stream[device]);
}

c10::Stream stream_of(const Queue& queue) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(DEVICE, queue.device), queue.id);
}

void serve(Queue* queue) {
  current_device = queue->device;
  current_stream[queue->device] = queue->id;
  Lock lock(mutex);
  while (true) {
    auto ready = [&] { return queue->done < queue->issued && queue->done < queue->wanted; };
    if (patience_ms == 0) {
      changed.wait(lock, [&] { return ready() || patience_ms; });
    } else if (!changed.wait_for(lock, std::chrono::milliseconds(patience_ms), ready)) {
      queue->wanted = queue->issued;
    }
    if (!ready())
      continue;
    auto task = std::move(queue->tasks.front());
    queue->tasks.pop_front();
    lock.unlock();
    std::string problem;
    try {
      at::AutoDispatchBelowADInplaceOrView below;
      at::NoGradGuard no_grad;
      task();
    } catch (const std::exception& error) {
      problem = error.what();
    }
    task = nullptr;
    lock.lock();
    if (!problem.empty() && failure.empty())
      failure = problem;
    ++queue->done;
    changed.notify_all();
  }
}

uint64_t enqueue(Queue& queue, std::function<void()> task) {
  Lock lock(mutex);
  TORCH_CHECK(!capturing, "operation not permitted when the stream is capturing");
  if (!queue.started) {
    queue.started = true;
    std::thread(serve, &queue).detach();
  }
  queue.tasks.push_back(std::move(task));
  ++queue.issued;
  if (eager)
    queue.wanted = queue.issued;
  if (std::uniform_real_distribution<>(0, 1)(generator) < random_share) {
    auto& other = queues[generator() % queues.size()];
    if (other.done < other.issued)
      other.wanted = std::max<uint64_t>(
          other.wanted, other.done + 1 + generator() % (other.issued - other.done));
  }
  changed.notify_all();
  return queue.issued;
}

// Blocks the calling thread until the queue has done `index` tasks.
void await(Queue& queue, uint64_t index) {
  PyThreadState* python = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  {
    Lock lock(mutex);
    queue.wanted = std::max(queue.wanted, index);
    changed.notify_all();
    changed.wait(lock, [&] { return queue.done >= index; });
  }
  if (python)
    PyEval_RestoreThread(python);
}

void host_sync(Queue& queue, uint64_t index) {
  TORCH_CHECK(!refuse_syncs, "called a synchronizing operation");
  ++syncs;
  await(queue, index);
  Lock lock(mutex);
  if (!failure.empty()) {
    auto text = std::move(failure);
    failure.clear();
    TORCH_CHECK(false, "an operator failed on its stream: ", text);
  }
}

struct Event {
  Queue* queue = nullptr;
  uint64_t index = 0;
  int polls = 0;
  std::shared_ptr<double> at;  // milliseconds, when it passed
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DEVICE; }
  c10::Device getDevice() const override { return {DEVICE, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < DEVICES, "there is no ", device);
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0)
      current_device = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const override {
    return stream_of(current_queue(device.has_index() ? device.index() : current_device));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream_of(queue_of(device.has_index() ? device.index() : current_device, 0));
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    auto index = device.has_index() ? device.index() : current_device;
    Lock lock(mutex);
    next_stream[index] = next_stream[index] % (STREAMS - 1) + 1;
    return stream_of(queue_of(index, next_stream[index]));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    current_stream[stream.device_index()] = static_cast<int>(stream.id());
    return before;
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void record(void** place, const c10::Stream& stream, const DeviceIndex, const c10::EventFlag)
      const override {
    if (*place == nullptr)
      *place = new Event;
    auto* event = static_cast<Event*>(*place);
    event->at = std::make_shared<double>(0);
    event->queue = &queue_of(stream);
    event->polls = 0;
    event->index = enqueue(*event->queue, [at = event->at] {
      *at = std::chrono::duration<double, std::milli>(
                std::chrono::steady_clock::now().time_since_epoch())
                .count();
    });
  }
  void block(void* place, const c10::Stream& stream) const override {
    auto* event = static_cast<Event*>(place);
    if (event && event->queue)
      enqueue(queue_of(stream), [queue = event->queue, index = event->index] {
        await(*queue, index);
      });
  }
  bool queryEvent(void* place) const override {
    auto* event = static_cast<Event*>(place);
    if (!event || !event->queue)
      return true;
    Lock lock(mutex);
    if (event->queue->done >= event->index)
      return true;
    if (++event->polls >= POLLS) {
      event->queue->wanted = std::max(event->queue->wanted, event->index);
      changed.notify_all();
    }
    return false;
  }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  bool queryStream(const c10::Stream& stream) const override {
    Lock lock(mutex);
    auto& queue = queue_of(stream);
    return queue.done >= queue.issued;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    auto& queue = queue_of(stream);
    host_sync(queue, queue.issued);
  }
  bool isStreamCapturing(const c10::Stream&) const override { return capturing; }
  void synchronizeEvent(void* place) const override {
    auto* event = static_cast<Event*>(place);
    if (event && event->queue)
      host_sync(*event->queue, event->index);
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    for (int id = 0; id < STREAMS; ++id) {
      auto& queue = queue_of(device < 0 ? current_device : device, id);
      host_sync(queue, queue.issued);
    }
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override;
  double elapsedTime(void* begin, void* end, const DeviceIndex) const override {
    return *static_cast<Event*>(end)->at - *static_cast<Event*>(begin)->at;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- memory ----------------------------------------------------------------------------------

// Memory of the device, or pinned memory of the host (`home` is null).
struct Block {
  void* data;
  size_t size;
  Queue* home;  // the stream that allocated it, and on whose order it is used again
  std::map<Queue*, uint64_t> uses;  // by other streams: how many of their tasks must be done
  bool spoiled = false;  // since it was freed
};

auto& blocks = *new std::map<char*, Block*>;  // all, by address
auto& unused = *new std::multimap<std::pair<Queue*, size_t>, Block*>;
auto& waiting = *new std::vector<Block*>;  // freed, while other streams use them

bool in_use(const Block& block) {
  return std::any_of(block.uses.begin(), block.uses.end(), [](const auto& use) {
    return use.first->done < use.second;
  });
}

// NOTE: what is enqueued takes the lock, so it is called without it.
void spoil(Block* block) {
  auto overwrite = [block] { std::memset(block->data, 0xFF, block->size); };
  block->spoiled = true;
  if (block->home)
    enqueue(*block->home, overwrite);
  else
    overwrite();
}

void make_unused(Block* block) {
  // Where another stream is current, nothing but a new owner comes on the stream of the block.
  block->spoiled = false;
  if (!block->home || block->home == &current_queue(block->home->device))
    spoil(block);
  Lock lock(mutex);
  block->uses.clear();
  unused.emplace(std::pair(block->home, block->size), block);
}

void release_passed() {
  std::vector<Block*> passed;
  {
    Lock lock(mutex);
    auto middle = std::stable_partition(
        waiting.begin(), waiting.end(), [](auto* block) { return in_use(*block); });
    passed.assign(middle, waiting.end());
    waiting.erase(middle, waiting.end());
  }
  for (auto* block : passed)
    make_unused(block);
}

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    Lock lock(mutex);
    for (auto& [queue, index] : block->uses)
      if (block->home)  // an event is recorded where it is freed
        index = queue->issued;
    waiting.push_back(block);
  }
  release_passed();
}

Block* find_block(const void* data) {
  Lock lock(mutex);
  auto after = blocks.upper_bound(static_cast<char*>(const_cast<void*>(data)));
  if (after == blocks.begin())
    return nullptr;
  auto& [begin, block] = *std::prev(after);
  return data < begin + block->size ? block : nullptr;
}

Block* take_unused(Queue* home, size_t size) {
  Lock lock(mutex);
  ++allocations;
  auto [first, found] = unused.equal_range({home, size});
  if (first == found)
    return nullptr;
  auto* block = (--found)->second;  // the block that was freed last
  unused.erase(found);
  return block;
}

Block* take_block(Queue* home, size_t size) {
  release_passed();
  if (auto* block = take_unused(home, size)) {
    if (!block->spoiled)
      spoil(block);
    return block;
  }
  Lock lock(mutex);
  auto* data = std::aligned_alloc(512, size);
  std::memset(data, 0xFF, size);
  return blocks[static_cast<char*>(data)] = new Block{data, size, home, {}};
}

struct Allocator final : c10::DeviceAllocator {
  bool pinned;
  explicit Allocator(bool pinned) : pinned(pinned) {}
  c10::DataPtr allocate(size_t n) override {
    c10::Device device = pinned ? c10::Device(c10::DeviceType::CPU)
                                : c10::Device(DEVICE, current_device);
    if (n == 0)
      return {nullptr, device};
    auto size = (n + 511) / 512 * 512;
    auto* block = take_block(pinned ? nullptr : &current_queue(current_device), size);
    return {block->data, block, &release, device};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    auto* block = static_cast<Block*>(data.get_context());
    if (block && &queue_of(stream) != block->home) {
      Lock lock(mutex);
      block->uses[&queue_of(stream)] = 0;
    }
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override { return {}; }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex) override {}
};

auto& device_allocator = *new Allocator(false);
auto& pinned_allocator = *new Allocator(true);
REGISTER_ALLOCATOR(DEVICE, &device_allocator);

void Guard::recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const {
  device_allocator.recordStream(data, stream);
}

void resize_storage(const c10::Storage& storage, size_t n) {
  c10::OptionalDeviceGuard guard(storage.device());
  auto data = device_allocator.allocate(n);
  auto kept = std::min(n, storage.nbytes());
  if (kept)
    enqueue(current_queue(storage.device().index()),
            [to = data.get(), from = storage.data(), kept] { std::memcpy(to, from, kept); });
  storage.set_data_ptr(std::move(data));
  storage.set_nbytes(n);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice({DEVICE, device}); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return Guard().exchangeDevice({DEVICE, device}).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? current_device : exchangeDevice(device);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override {
    auto* block = find_block(data);
    return block && !block->home;
  }
  c10::Device getDeviceFromPtr(void* data) const override {
    auto* block = find_block(data);
    TORCH_CHECK(block && block->home, "no memory of this device");
    return {DEVICE, block->home->device};
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    resize_storage(storage, n);
  }
};

// --- operators -------------------------------------------------------------------------------

// The same memory as a tensor of the host. Raw: it keeps nothing alive.
Tensor host_view(const Tensor& tensor) {
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  auto* data = tensor.numel() ? tensor.unsafeGetTensorImpl()->mutable_data() : nullptr;
  return at::from_blob(data, tensor.sizes(), tensor.strides(), options);
}

bool on_device(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == DEVICE;
}

using Map = std::function<Tensor(const Tensor&)>;

IValue mapped(const IValue& value, const Map& map) {
  if (value.isTensor())
    return map(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector())
      list.push_back(map(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector())
      list.push_back(tensor && tensor->defined() ? std::optional(map(*tensor)) : std::nullopt);
    return list;
  }
  return value;
}

Stack mapped(const Stack& values, const Map& map) {
  Stack result;
  for (const auto& value : values)
    result.push_back(mapped(value, map));
  return result;
}

Stack called(const c10::OperatorHandle& op, Stack arguments) {
  at::AutoDispatchBelowADInplaceOrView below;
  op.callBoxed(arguments);
  return arguments;
}

// Copies of the results into the memory of the outputs, both of the host.
void write(const Stack& outputs, const Stack& results) {
  std::vector<Tensor> from;
  Map collect = [&](const Tensor& tensor) {
    from.push_back(tensor);
    return tensor;
  };
  mapped(results, collect);
  size_t i = 0;
  mapped(outputs, [&](const Tensor& tensor) {
    const Tensor& result = from.at(i++);
    if (tensor.defined() && tensor.numel())
      tensor.copy_(result);
    return tensor;
  });
}

const auto& waits_for_shape = *new std::unordered_set<std::string>{
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave"};

bool shape_depends_on_values(const c10::OperatorHandle& op, const Stack& arguments) {
  if (waits_for_shape.count(op.schema().name()))
    return true;
  if (op.schema().name() != "aten::index" && op.schema().name() != "aten::_index_put_impl_")
    return false;
  auto indices = arguments.at(1).toOptionalTensorVector();
  return std::any_of(indices.begin(), indices.end(), [](const auto& index) {
    return index && index->defined() &&
        (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte);
  });
}

// The tensors that the operator was given, on one device, or numbers of the host.
c10::Device device_of(const c10::OperatorHandle& op, const Stack& arguments) {
  std::optional<c10::Device> device;
  bool host = false;
  mapped(arguments, [&](const Tensor& tensor) {
    if (on_device(tensor)) {
      TORCH_CHECK(!device || *device == tensor.device(), "Expected all tensors to be on the same "
                  "device, but ", op.schema().name(), " got ", *device, " and ", tensor.device());
      device = tensor.device();
    } else if (tensor.defined() && tensor.dim()) {
      host = true;
    }
    return tensor;
  });
  TORCH_CHECK(device, op.schema().name(), " is not emulated: none of its tensors is here");
  TORCH_CHECK(!host || op.schema().name().find("index") != std::string::npos,
              "Expected all tensors to be on the same device, but ", op.schema().name(),
              " got ", *device, " and cpu");
  return *device;
}

void resize_outs(const c10::FunctionSchema& schema, Stack& arguments, const Stack& shapes) {
  size_t k = 0;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& argument = schema.arguments()[i];
    bool out = argument.kwarg_only() && argument.alias_info() && argument.alias_info()->isWrite();
    if (!out || !arguments[i].isTensor())
      continue;
    const auto& tensor = arguments[i].toTensor();
    const auto& shape = shapes.at(k++).toTensor();
    if (tensor.sizes() != shape.sizes())
      tensor.resize_(shape.sizes());
  }
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  auto arguments = torch::jit::pop(*stack, schema.arguments().size());
  auto device = device_of(op, arguments);
  c10::OptionalDeviceGuard guard(device);
  auto& queue = current_queue(device.index());
  Map zeros = [](const Tensor& t) {
    if (!on_device(t))
      return t.defined() ? t.clone() : t;
    return at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCPU)).zero_();
  };
  Map views = [](const Tensor& t) {
    if (on_device(t))
      return host_view(t);
    if (!t.defined())
      return t;
    auto number = t.clone();  // as a launch takes it
    number.unsafeGetTensorImpl()->set_wrapped_number(t.unsafeGetTensorImpl()->is_wrapped_number());
    return number;
  };
  bool writes = schema.returns().empty(), outs = false, tensors = true;
  for (const auto& value : schema.returns()) {
    writes |= value.alias_info() != nullptr;
    tensors &= value.type()->kind() == c10::TypeKind::TensorType ||
        value.type()->kind() == c10::TypeKind::ListType;
  }
  for (size_t i = 0; i < arguments.size(); ++i)
    outs |= schema.arguments()[i].kwarg_only() && schema.arguments()[i].alias_info() &&
        arguments[i].isTensor() && arguments[i].toTensor().numel() == 0;
  if (writes) {
    if (outs)
      resize_outs(schema, arguments, called(op, mapped(arguments, zeros)));
    if (shape_depends_on_values(op, arguments))
      host_sync(queue, queue.issued);
    enqueue(queue, [op, inputs = mapped(arguments, views)] { called(op, inputs); });
    for (const auto& value : schema.returns())
      for (size_t i = 0; i < arguments.size(); ++i)
        if (auto* alias = schema.arguments()[i].alias_info();
            alias && alias->isWrite() && alias->afterSets() == value.alias_info()->afterSets())
          stack->push_back(arguments[i]);
    return;
  }
  bool now = !tensors || shape_depends_on_values(op, arguments);
  if (now)
    host_sync(queue, queue.issued);
  auto results = called(op, mapped(arguments, now ? views : zeros));
  auto outputs = mapped(results, [&](const Tensor& t) {
    return t.defined() ? at::empty_strided(t.sizes(), t.strides(), t.options().device(device)) : t;
  });
  if (now)
    enqueue(queue, [results, places = mapped(outputs, views)] { write(places, results); });
  else
    enqueue(queue, [op, inputs = mapped(arguments, views), places = mapped(outputs, views)] {
      write(places, called(op, inputs));
    });
  for (auto& output : outputs)
    stack->push_back(std::move(output));
}

void use(const Tensor& host, Queue& queue, uint64_t index) {
  if (auto* block = find_block(host.data_ptr())) {
    Lock lock(mutex);
    block->uses[&queue] = index;
  }
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (target.numel() == 0)
    return target;
  bool up = !on_device(source), down = !on_device(target);
  auto& queue = current_queue((up ? target : source).device().index());
  if (up) {
    bool late = non_blocking && source.is_pinned();
    auto from = late ? host_view(source) : source.expand_as(target).clone();
    auto index = enqueue(queue, [from, to = host_view(target)] { to.copy_(from); });
    if (late)
      use(source, queue, index);
    else if (!non_blocking)
      host_sync(queue, index);
    return target;
  }
  auto& other = current_queue((down ? source : target).device().index());
  if (&other != &queue)  // orders: what the target's stream was given, then the copy
    enqueue(queue, [&other, index = other.issued] { await(other, index); });
  auto index = enqueue(
      queue, [from = host_view(source), to = host_view(target)] { to.copy_(from); });
  if (&other != &queue)  // orders: the copy, then what the target's stream is given
    enqueue(other, [&queue, index] { await(queue, index); });
  if (down && non_blocking && target.is_pinned())
    use(target, queue, index);
  else if (down)
    host_sync(queue, index);
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar item(const Tensor& tensor) {
  auto& queue = current_queue(tensor.device().index());
  host_sync(queue, queue.issued);
  return host_view(tensor).item();
}

void refuse_pinned(std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<c10::Device> device, std::optional<bool> pin) {
  refuse_pinned(pin);
  c10::OptionalDeviceGuard guard(device);
  c10::DispatchKeySet keys(KEY);
  return at::detail::empty_strided_generic(
      size, stride, &device_allocator, keys, c10::dtype_or_default(dtype));
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<c10::Device> device, std::optional<bool> pin,
             std::optional<at::MemoryFormat> format) {
  refuse_pinned(pin);
  c10::OptionalDeviceGuard guard(device);
  c10::DispatchKeySet keys(KEY);
  return at::detail::empty_generic(
      size, &device_allocator, keys, c10::dtype_or_default(dtype), format);
}

const Tensor& resize_(const Tensor& tensor, at::IntArrayRef size,
                      std::optional<at::MemoryFormat> format) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  auto n = (impl->storage_offset() + impl->numel()) * tensor.element_size();
  if (n > tensor.storage().nbytes())
    resize_storage(tensor.storage(), n);
  if (format && *format != at::MemoryFormat::Preserve)
    impl->empty_tensor_restride(*format);
  return tensor;
}

Tensor& set_storage(Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef size,
                    at::IntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.data())
    impl->set_sizes_and_strides(size, stride);
  else
    impl->set_sizes_contiguous(size);
  return tensor;
}

Tensor& set_whole(Tensor& tensor, at::Storage storage) {
  auto n = static_cast<int64_t>(storage.nbytes() / tensor.element_size());
  return set_storage(tensor, std::move(storage), 0, {n}, {});
}

Tensor& set_tensor(Tensor& tensor, const Tensor& source) {
  return set_storage(
      tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

void record_stream(Tensor& tensor, c10::Stream stream) {
  device_allocator.recordStream(tensor.storage().data_ptr(), stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("record_stream", record_stream);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
}

using Tensors = std::vector<Tensor>;
using Lists = std::vector<Tensors>;
using Done = c10::intrusive_ptr<c10d::Work>;

#include "process_group.h"

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  m.attr("DEVICES") = DEVICES;
  m.def("current_device", [] { return int(current_device); });
  m.def("set_device", [](int device) { Guard().setDevice({DEVICE, DeviceIndex(device)}); });
  m.def("host_view", [](const Tensor& tensor) {
    return on_device(tensor) ? host_view(tensor) : tensor;
  });
  py::class_<EmulatedGroup, c10d::Backend, c10::intrusive_ptr<EmulatedGroup>>(m, "Group")
      .def(py::init<c10::intrusive_ptr<c10d::Backend>, int, int>());
  m.def("schedule", [](bool run_at_once, double share, int seed, int patience) {
    Lock lock(mutex);
    eager = run_at_once;
    random_share = share;
    generator.seed(seed);
    patience_ms = patience;
    for (auto& queue : queues)
      queue.wanted = eager ? queue.issued : queue.wanted;
    changed.notify_all();
  });
  m.def("refuse_syncs", [](bool refuse) { refuse_syncs = refuse; });
  m.def("set_capturing", [](bool now) { capturing = now; });
  m.def("syncs", [] { return syncs; });
  m.def("allocations", [] { return allocations; });
  m.def("sleep", [](double ms) {
    enqueue(current_queue(current_device), [ms] {
      std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(ms));
    });
  });
}

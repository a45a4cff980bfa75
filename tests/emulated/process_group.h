// Collectives as NCCL has them: enqueued on a stream of the group, in order; the host goes on, and
// `wait` makes the current stream wait. Between ranks gloo moves the bytes. Each rank must use the
// device of its own number, as two ranks on one GPU are an error there.

#pragma once

struct EmulatedWork final : c10d::Work {
  Queue* queue;
  uint64_t index;
  DeviceIndex device;
  c10::intrusive_ptr<c10::ivalue::Future> future;

  bool wait(std::chrono::milliseconds) override {
    enqueue(current_queue(device), [queue = queue, index = index] { await(*queue, index); });
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }
  bool isCompleted() override {
    Lock lock(mutex);
    return queue->done >= index;
  }
  bool isSuccess() const override { return true; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future; }
};

class EmulatedGroup final : public c10d::Backend {
 public:
  EmulatedGroup(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size)
      : c10d::Backend(rank, size), gloo(std::move(gloo)) {}
  const std::string getBackendName() const override { return "emulated"; }
  void setSequenceNumberForGroup() override {}

  Done broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    return collective(tensors, {tensors}, [options](auto& gloo, auto& views) {
      return gloo.broadcast(views[0], options);
    });
  }
  Done allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto sum = options;
    bool mean = options.reduceOp == c10d::ReduceOp::AVG;
    if (mean)
      sum.reduceOp = c10d::ReduceOp::SUM;
    return collective(tensors, {tensors}, [sum, mean, size = size_](auto& gloo, auto& views) {
      gloo.allreduce(views[0], sum)->wait();
      if (mean)
        views[0][0].div_(size);
      return Done();
    });
  }
  Done allgather(Lists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    return collective(outputs[0], {outputs[0], inputs}, [options](auto& gloo, auto& views) {
      Lists lists{views[0]};
      return gloo.allgather(lists, views[1], options);
    });
  }
  Done _allgather_base(
      Tensor& output, Tensor& input, const c10d::AllgatherOptions& options) override {
    Tensors result{output};
    return collective(result, {result, {input}}, [options](auto& gloo, auto& views) {
      return gloo._allgather_base(views[0][0], views[1][0], options);
    });
  }
  Done _reduce_scatter_base(
      Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& options) override {
    Tensors result{output};
    bool mean = options.reduceOp == c10d::ReduceOp::AVG;
    return collective(
        result, {result, {input}}, [mean, rank = rank_, size = size_](auto& gloo, auto& views) {
          Tensors sum{views[1][0].clone()};
          gloo.allreduce(sum, {})->wait();
          auto part = sum[0].flatten().chunk(size)[rank].view(views[0][0].sizes());
          views[0][0].copy_(mean ? part / size : part);
          return Done();
        });
  }
  Done send(Tensors& tensors, int to, int tag) override {
    return collective(tensors, {tensors}, [to, tag](auto& gloo, auto& views) {
      return gloo.send(views[0], to, tag);
    });
  }
  Done recv(Tensors& tensors, int from, int tag) override {
    return collective(tensors, {tensors}, [from, tag](auto& gloo, auto& views) {
      return gloo.recv(views[0], from, tag);
    });
  }
  Done barrier(const c10d::BarrierOptions&) override {
    Tensors token{at::empty({1}, at::TensorOptions(c10::Device(DEVICE, rank_ % DEVICES))).zero_()};
    auto work = allreduce(token, {});
    work->wait();
    return work;
  }

 private:
  using Call = std::function<Done(c10d::Backend&, Lists&)>;

  Done collective(const Tensors& results, const Lists& lists, Call call) {
    auto device = results.at(0).device();
    TORCH_CHECK(device.type() == DEVICE, "the group has no backend for ", device);
    TORCH_CHECK(device.index() == rank_ % DEVICES, "Duplicate GPU detected: rank ", rank_,
                " and another rank both on ", device);
    if (!queue)
      queue = &queue_of(Guard().getNewStream(device, 0));
    auto& caller = current_queue(device.index());
    Lists views;
    for (const auto& list : lists) {
      views.emplace_back();
      for (const auto& tensor : list) {
        TORCH_CHECK(tensor.is_contiguous(), "Tensors must be contiguous");
        device_allocator.recordStream(tensor.storage().data_ptr(), stream_of(*queue));
        views.back().push_back(host_view(tensor));
      }
    }
    enqueue(*queue, [&caller, index = caller.issued] { await(caller, index); });
    auto work = c10::make_intrusive<EmulatedWork>();
    work->index = enqueue(*queue, [gloo = gloo, call, views]() mutable {
      if (auto done = call(*gloo, views))
        done->wait();
    });
    work->queue = queue;
    work->device = device.index();
    work->future = c10::make_intrusive<c10::ivalue::Future>(
        c10::ListType::create(c10::TensorType::get()), std::vector<c10::Device>{device});
    auto before = Guard().exchangeStream(stream_of(*queue));
    work->future->markCompleted(c10::IValue(results));
    Guard().exchangeStream(before);
    return work;
  }

  c10::intrusive_ptr<c10d::Backend> gloo;
  Queue* queue = nullptr;
};

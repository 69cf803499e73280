// The few libtorch entry points that tch lacks. Nothing here decides anything: each function forwards one call.
#include "torch_ext.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/version.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace {

template <class F>
char* guarded(F&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}

std::vector<at::Tensor> list(at::Tensor** tensors, size_t n) {
  std::vector<at::Tensor> out;
  out.reserve(n);
  for (size_t i = 0; i < n; ++i) out.push_back(*tensors[i]);
  return out;
}

// An autograd node whose backward is a boxed Rust closure, called at most once.
struct RustNode : public torch::autograd::Node {
  RustNode(void* closure, size_t n_inputs, const char* name) : closure_(closure), n_inputs_(n_inputs), name_(name) {}
  ~RustNode() override { release_variables(); }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    void* closure = std::exchange(closure_, nullptr);
    TORCH_CHECK(closure != nullptr, name_, ": backward through this operation a second time; its saved tensors are freed");
    std::vector<at::Tensor*> in(grads.size());
    for (size_t i = 0; i < grads.size(); ++i)
      in[i] = new at::Tensor(grads[i].defined() ? std::move(grads[i]) : input_metadata(i).zeros_like());
    std::vector<at::Tensor*> out(n_inputs_, nullptr);
    char* error = engraft_backward_call(closure, in.data(), in.size(), out.data(), out.size());
    torch::autograd::variable_list result(n_inputs_);
    for (size_t i = 0; i < n_inputs_; ++i) {
      if (out[i] == nullptr) continue;
      result[i] = std::move(*out[i]);
      delete out[i];
    }
    if (error != nullptr) {
      std::string message(error);
      free(error);
      TORCH_CHECK(false, name_, ": ", message);
    }
    return result;
  }

  void release_variables() override {
    if (void* closure = std::exchange(closure_, nullptr)) engraft_backward_drop(closure);
  }

  std::string name() const override { return name_; }

 private:
  void* closure_;
  size_t n_inputs_;
  std::string name_;
};

at::Generator seeded(const at::Device& device, uint64_t seed) {
  if (device.is_cpu()) return at::detail::createCPUGenerator(seed);
  at::Generator generator = at::globalContext().defaultGenerator(device);
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_current_seed(seed);
  return generator;
}

// A stream of the device that nothing else is put on: one for all copies.
c10::Stream copying_stream(const c10::Device& device) {
  static std::mutex lock;
  static std::map<c10::DeviceIndex, c10::Stream> streams;
  std::lock_guard<std::mutex> guard(lock);
  const auto found = streams.find(device.index());
  if (found != streams.end()) return found->second;
  return streams.emplace(device.index(), c10::impl::VirtualGuardImpl(device.type()).getNewStream(device)).first->second;
}

std::optional<int64_t> window(int64_t left) { return left < 0 ? std::nullopt : std::optional<int64_t>(left); }

}  // namespace

extern "C" {

char* engraft_custom(at::Tensor** inputs, size_t n_inputs, at::Tensor** outputs, size_t n_outputs, void* closure,
                     const char* name) {
  // The node owns the closure from here on, whatever happens.
  std::shared_ptr<RustNode> node(new RustNode(closure, n_inputs, name), torch::autograd::deleteNode);
  return guarded([&] {
    torch::autograd::variable_list variables = list(inputs, n_inputs);
    node->set_next_edges(torch::autograd::collect_next_edges(variables));
    for (size_t i = 0; i < n_outputs; ++i) torch::autograd::create_gradient_edge(*outputs[i], node);
  });
}

char* engraft_gradients(at::Tensor** outputs, at::Tensor** grad_outputs, size_t n_outputs, at::Tensor** inputs,
                        size_t n_inputs, at::Tensor** out) {
  return guarded([&] {
    auto grads = torch::autograd::grad(list(outputs, n_outputs), list(inputs, n_inputs), list(grad_outputs, n_outputs),
                                       /*retain_graph=*/false, /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < n_inputs; ++i) out[i] = grads[i].defined() ? new at::Tensor(grads[i]) : nullptr;
  });
}

char* engraft_fused_adamw(at::Tensor** params, at::Tensor** grads, at::Tensor** exp_avgs, at::Tensor** exp_avg_sqs,
                          at::Tensor** steps, size_t n, double lr, double beta1, double beta2, double weight_decay,
                          double eps, at::Tensor* grad_scale, at::Tensor* found_inf) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    auto optional = [](at::Tensor* t) { return t ? std::optional<at::Tensor>(*t) : std::nullopt; };
    at::_fused_adamw_(list(params, n), list(grads, n), list(exp_avgs, n), list(exp_avg_sqs, n), {}, list(steps, n), lr,
                      beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false, optional(grad_scale),
                      optional(found_inf));
  });
}

char* engraft_add_scaled(at::Tensor* x, at::Tensor* y, double factor, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(at::add(*x, *y, factor)); });
}

void engraft_clear_gradients(at::Tensor** tensors, size_t n) {
  for (size_t i = 0; i < n; ++i) tensors[i]->mutable_grad().reset();
}

char* engraft_global_norm(at::Tensor** tensors, size_t n, at::Tensor** out) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    auto norms = at::_foreach_norm(list(tensors, n), 2);
    *out = new at::Tensor(at::linalg_vector_norm(at::stack(norms), 2));
  });
}

char* engraft_keep_mask(at::Tensor* like, double keep, uint64_t seed, at::Tensor** out) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    auto mask = at::empty(like->sizes(), like->options().dtype(at::kByte).requires_grad(false));
    *out = new at::Tensor(mask.bernoulli_(keep, seeded(like->device(), seed)));
  });
}

char* engraft_uniform(at::Tensor* like, double low, double high, uint64_t seed, at::Tensor** out) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    auto values = at::empty(like->sizes(), like->options().dtype(at::kFloat).requires_grad(false));
    *out = new at::Tensor(values.uniform_(low, high, seeded(like->device(), seed)));
  });
}

char* engraft_flash_varlen(at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor* offsets, int64_t longest,
                           double scale, int64_t window_left, at::Tensor** out) {
  return guarded([&] {
    auto [output, lse, rng, unused, mask] =
        at::_flash_attention_forward(*q, *k, *v, *offsets, *offsets, longest, longest, 0.0, /*is_causal=*/true,
                                     /*return_debug_mask=*/false, scale, window(window_left), window(0));
    const at::Tensor* results[] = {&output, &lse, &rng, &unused};
    for (size_t i = 0; i < 4; ++i) out[i] = new at::Tensor(*results[i]);
  });
}

char* engraft_flash_varlen_backward(at::Tensor* grad, at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor* output,
                                    at::Tensor* logsumexp, at::Tensor* offsets, int64_t longest, double scale,
                                    int64_t window_left, at::Tensor* rng_state, at::Tensor* unused, at::Tensor** out) {
  return guarded([&] {
    auto [dq, dk, dv] = at::_flash_attention_backward(*grad, *q, *k, *v, *output, *logsumexp, *offsets, *offsets,
                                                      longest, longest, 0.0, /*is_causal=*/true, *rng_state, *unused,
                                                      scale, window(window_left), window(0));
    const at::Tensor* results[] = {&dq, &dk, &dv};
    for (size_t i = 0; i < 3; ++i) out[i] = new at::Tensor(*results[i]);
  });
}

char* engraft_cudnn_attention(at::Tensor* q, at::Tensor* k, at::Tensor* v, double scale, at::Tensor** out) {
  return guarded([&] {
    const auto results = at::_scaled_dot_product_cudnn_attention(*q, *k, *v, /*attn_bias=*/{}, /*compute_log_sumexp=*/true,
                                                                 0.0, /*is_causal=*/true, /*return_debug_mask=*/false, scale);
    const at::Tensor* kept[] = {&std::get<0>(results), &std::get<1>(results), &std::get<6>(results), &std::get<7>(results)};
    for (size_t i = 0; i < 4; ++i) out[i] = new at::Tensor(*kept[i]);
  });
}

char* engraft_cudnn_attention_backward(at::Tensor* grad, at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor* output,
                                       at::Tensor* logsumexp, at::Tensor* seed, at::Tensor* offset, double scale,
                                       at::Tensor** out) {
  return guarded([&] {
    auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
        *grad, *q, *k, *v, *output, *logsumexp, *seed, *offset, /*attn_bias=*/{}, /*cum_seq_q=*/{}, /*cum_seq_k=*/{},
        q->size(2), k->size(2), 0.0, /*is_causal=*/true, scale);
    const at::Tensor* results[] = {&dq, &dk, &dv};
    for (size_t i = 0; i < 3; ++i) out[i] = new at::Tensor(*results[i]);
  });
}

char* engraft_cuda_memory(int index, int64_t* allocated, int64_t* peak, int64_t* free, int64_t* total) {
  return guarded([&] {
    auto* allocator = at::getDeviceAllocator(at::kCUDA);
    const auto stats = allocator->getDeviceStats(static_cast<c10::DeviceIndex>(index));
    // The first of each statistic's three entries sums over the small and the large pool.
    *allocated = stats.allocated_bytes[0].current;
    *peak = stats.allocated_bytes[0].peak;
    const auto [available, all] = allocator->getMemoryInfo(static_cast<c10::DeviceIndex>(index));
    *free = static_cast<int64_t>(available);
    *total = static_cast<int64_t>(all);
  });
}

void engraft_set_deterministic(int on) {
  auto& context = at::globalContext();
  if (on) {
    // The two settings with which cuBLAS sums in one order; libtorch refuses products under any other.
    const char* workspace = std::getenv("CUBLAS_WORKSPACE_CONFIG");
    const std::string set = workspace ? workspace : "";
    if (set != ":4096:8" && set != ":16:8") setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/1);
  }
  // With a warning only, FlashAttention's backward would stay as it is.
  context.setDeterministicAlgorithms(on != 0, /*warn_only=*/false);
  context.setDeterministicCuDNN(on != 0);
  // It is on by itself and fills every new tensor, which is no part of an order.
  context.setDeterministicFillUninitializedMemory(false);
}

int engraft_deterministic() { return at::globalContext().deterministicAlgorithms(); }

char* engraft_pinned(at::Tensor* tensor, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(tensor->pin_memory()); });
}

char* engraft_placed(at::Tensor* tensor, int index, at::Tensor** out) {
  return guarded([&] {
    const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(index));
    *out = new at::Tensor(tensor->to(device, tensor->scalar_type(), /*non_blocking=*/true));
  });
}

char* engraft_transfer(at::Tensor* from, int to_host, int index, at::Tensor** out, void** event) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    const c10::Device device(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
    const c10::impl::VirtualGuardImpl streams(c10::kCUDA);
    const c10::Stream side = copying_stream(device);
    // Made for this thread's stream, whose work may still read what lay there: the copy begins after it.
    const auto options = from->options().requires_grad(false);
    at::Tensor to = at::empty(from->sizes(), to_host ? options.device(c10::kCPU).pinned_memory(true) : options.device(device));
    c10::Event ready(c10::kCUDA);
    ready.record(streams.getStream(device));
    ready.block(side);
    auto end = std::make_unique<c10::Event>(c10::kCUDA);
    {
      c10::StreamGuard guard(side);
      to.copy_(*from, /*non_blocking=*/true);
      end->record(side);
    }
    *out = new at::Tensor(std::move(to));
    *event = end.release();
  });
}

char* engraft_transfer_done(void* event, int index, int this_thread) {
  return guarded([&] {
    const std::unique_ptr<c10::Event> end(static_cast<c10::Event*>(event));
    if (this_thread) return end->synchronize();
    const c10::impl::VirtualGuardImpl streams(c10::kCUDA);
    end->block(streams.getStream(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index))));
  });
}

char* engraft_cuda_stream(int index, void** stream) {
  return guarded([&] {
    TORCH_CHECK(at::getAccelerator() == at::kCUDA, "this libtorch has no CUDA, or the machine no GPU");
    *stream = at::accelerator::getCurrentStream(static_cast<c10::DeviceIndex>(index)).native_handle();
  });
}

void engraft_parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

char* engraft_bf16_gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, int accumulate,
                        const void* a, const void* b, float* c) {
  return guarded([&] {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate != 0, static_cast<const c10::BFloat16*>(a),
                                static_cast<const c10::BFloat16*>(b), c, /*is_vnni=*/true);
  });
}

void engraft_bf16_gemm_done() { at::native::cpublas::brgemm_release(/*is_vnni=*/true); }

const char* engraft_cpu_capability() {
  static const std::string capability = at::get_cpu_capability();
  return capability.c_str();
}

const char* engraft_torch_version() { return TORCH_VERSION; }
}

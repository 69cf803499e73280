// The C face of torch_ext.cpp.
//
// Every function that can fail returns nullptr on success, else a malloc'd message to be released with free().
// Tensors are passed as tch passes them: pointers to at::Tensor. `in` pointers are borrowed; `out` pointers are
// new at::Tensor objects that the caller owns.
#pragma once
#include <cstddef>
#include <cstdint>

namespace at {
class Tensor;
}

extern "C" {

// --- called from C++, written in Rust (mod.rs) ---------------------------------------------------
// Consumes `closure`. `grads` are owned by the callee; `out[i]` is filled with an owned tensor or nullptr.
char* engraft_backward_call(void* closure, at::Tensor** grads, size_t n_grads, at::Tensor** out, size_t n_out);
void engraft_backward_drop(void* closure);

// --- called from Rust ----------------------------------------------------------------------------
// Wires `outputs` (changed in place) to `inputs` by a node whose backward is `closure`. Consumes `closure`.
char* engraft_custom(at::Tensor** inputs, size_t n_inputs, at::Tensor** outputs, size_t n_outputs, void* closure,
                     const char* name);

// d(outputs)/d(inputs) contracted with grad_outputs; out[i] is nullptr where inputs[i] was not used.
char* engraft_gradients(at::Tensor** outputs, at::Tensor** grad_outputs, size_t n_outputs, at::Tensor** inputs,
                        size_t n_inputs, at::Tensor** out);

char* engraft_fused_adamw(at::Tensor** params, at::Tensor** grads, at::Tensor** exp_avgs, at::Tensor** exp_avg_sqs,
                          at::Tensor** steps, size_t n, double lr, double beta1, double beta2, double weight_decay,
                          double eps, at::Tensor* grad_scale, at::Tensor* found_inf);

// x + factor * y, one rounding where the processor has it: tch's own `add` takes no factor.
char* engraft_add_scaled(at::Tensor* x, at::Tensor* y, double factor, at::Tensor** out);

// Drops the gradient of every tensor.
void engraft_clear_gradients(at::Tensor** tensors, size_t n);
// L2 norm over all elements of all tensors, fp32 scalar on their device.
char* engraft_global_norm(at::Tensor** tensors, size_t n, at::Tensor** out);

// uint8 0/1 mask shaped like `like`, each element 1 with probability `keep`, a pure function of `seed`.
char* engraft_keep_mask(at::Tensor* like, double keep, uint64_t seed, at::Tensor** out);
// fp32 uniform in [low, high), shaped like `like`, a pure function of `seed`.
char* engraft_uniform(at::Tensor* like, double low, double high, uint64_t seed, at::Tensor** out);

// FlashAttention-2 over documents laid end to end (CUDA): q (T, N, H), k and v (T, K, H), offsets int32 on the device.
// window_left < 0 is no window. out: output, logsumexp, rng_state, unused.
char* engraft_cudnn_attention(at::Tensor* q, at::Tensor* k, at::Tensor* v, double scale, at::Tensor** out);

char* engraft_cudnn_attention_backward(at::Tensor* grad, at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor* output,
                                       at::Tensor* logsumexp, at::Tensor* seed, at::Tensor* offset, double scale,
                                       at::Tensor** out);

char* engraft_flash_varlen(at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor* offsets, int64_t longest,
                           double scale, int64_t window_left, at::Tensor** out);
// out: dq, dk, dv.
char* engraft_flash_varlen_backward(at::Tensor* grad, at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor* output,
                                    at::Tensor* logsumexp, at::Tensor* offsets, int64_t longest, double scale,
                                    int64_t window_left, at::Tensor* rng_state, at::Tensor* unused, at::Tensor** out);

// Bytes: currently allocated, peak allocated, free and total on CUDA device `index`.
char* engraft_cuda_memory(int index, int64_t* allocated, int64_t* peak, int64_t* free, int64_t* total);

// Has libtorch and what it calls on a GPU compute the same bits from the same numbers, or as it is fastest. The first time it is turned
// on, cuBLAS is told so by its variable, which it reads as it begins.
void engraft_set_deterministic(int on);
int engraft_deterministic();

// A copy of the CPU tensor in memory that the GPU reads by itself.
char* engraft_pinned(at::Tensor* tensor, at::Tensor** out);
// `tensor` on the CUDA device `index`: the same where it is there, else a copy that this thread does not wait for where the tensor is
// pinned.
char* engraft_placed(at::Tensor* tensor, int index, at::Tensor** out);

// Begins to copy `from`, to pinned memory or from there to the CUDA device `index`, on a stream that does nothing else, once what this
// thread's stream was given is done. `out` is where to; `event`, to be given to engraft_transfer_done, marks the end.
char* engraft_transfer(at::Tensor* from, int to_host, int index, at::Tensor** out, void** event);
// What this thread's stream is given from here on waits for the end, or this thread itself. Consumes `event`.
char* engraft_transfer_done(void* event, int index, int this_thread);

// The CUDA stream that this thread puts work of device `index` on; nullptr is the default one.
char* engraft_cuda_stream(int index, void** stream);

// From now on tensors on the CPU lie in a region of their own (cpu_memory.cpp).
void engraft_allocate_on_cpu();
// From now on what oneDNN compiles is kept of few shapes. Before the first product.
void engraft_keep_shapes(int count);
// Bytes that such tensors hold now, the most they held at once, and how much of the region was ever used.
void engraft_cpu_memory(int64_t* allocated, int64_t* peak, int64_t* used);

// Runs body(context, begin, end) over 0..n on libtorch's own CPU threads.
void engraft_parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

// C (m, n) fp32 = A (m, k) B (k, n), added to C when `accumulate`; A and B bf16, leading dimensions in elements. B is stored
// as pairs of rows side by side: (k/2, n, 2), k even. An error where libtorch has no such kernel for this processor.
char* engraft_bf16_gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, int accumulate,
                        const void* a, const void* b, float* c);
// Gives back the processor state that a run of engraft_bf16_gemm calls on this thread may hold (AMX tiles).
void engraft_bf16_gemm_done();

// Instruction set libtorch chose for its CPU kernels: "AVX512". Lives as long as the program.
const char* engraft_cpu_capability();
// Version as torch::version says it: "2.11.0".
const char* engraft_torch_version();
}

// A GPU of one core, for the tests: the kernels' own source runs on the CPU, a fiber to each thread, one block after another.
//
// Threads that wait for each other on a GPU do so here. A wait that never ends, lanes that speak to lanes that have left, and arguments
// of the wrong number or size end the process with a word about it.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace {

struct Index {
  unsigned x;
};
Index threadIdx, blockIdx;

enum class State { Ready, AtWarp, AtBlock, Done };

// Entered once as a context of its own; from then on threads jump, which needs no call of the system.
struct Fiber {
  std::vector<char> stack = std::vector<char>(128 << 10);
  bool entered = false;
  jmp_buf at;
  State state;
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
const std::function<void()>* body;
uint32_t exchanged[1024];

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

void wait_at(State state) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.state = state;
  if (_setjmp(fiber.at) == 0) _longjmp(scheduler, 1);
}

// A thread of one block after another.
void live() {
  for (;;) {
    (*body)();
    wait_at(State::Done);
  }
}

// Goes on with a thread until it waits or is done.
void go_on(unsigned thread) {
  threadIdx.x = thread;
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.at, 1);
  fiber.entered = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = fiber.stack.size();
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  setcontext(&context);
}

size_t count(size_t from, size_t to, State state) {
  size_t found = 0;
  for (size_t i = from; i < to; ++i) found += fibers[i].state == state;
  return found;
}

void run_block(unsigned threads) {
  for (Fiber& fiber : fibers) fiber.state = State::Ready;
  while (count(0, threads, State::Done) < threads) {
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].state == State::Ready) go_on(i);
    }
    bool met = false;
    auto release = [&](size_t from, size_t to) {
      for (size_t i = from; i < to; ++i)
        if (fibers[i].state != State::Done) fibers[i].state = State::Ready;
      met = true;
    };
    for (unsigned warp = 0; warp < threads; warp += 32) {
      const size_t waiting = count(warp, warp + 32, State::AtWarp);
      if (waiting > 0 && count(warp, warp + 32, State::Done) > 0) fail("a lane waits for lanes that have left");
      if (waiting == 32) release(warp, warp + 32);
    }
    const size_t done = count(0, threads, State::Done);
    if (done < threads && count(0, threads, State::AtBlock) + done == threads) release(0, threads);
    if (!met && done < threads) fail("threads wait for what never comes");
  }
}

template <class T>
T spoken(unsigned mask, T value, unsigned lane) {
  static_assert(sizeof(T) == 4, "lanes exchange four bytes");
  if (mask != 0xffffffffu) fail("lanes speak to some of their warp only");
  std::memcpy(&exchanged[threadIdx.x], &value, 4);
  wait_at(State::AtWarp);
  T heard;
  std::memcpy(&heard, &exchanged[threadIdx.x / 32 * 32 + lane % 32], 4);
  wait_at(State::AtWarp);
  return heard;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** places, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(places[I])...);
}

template <class... A>
void emulate(void (*kernel)(A...), unsigned blocks, unsigned threads, void** places, const size_t* sizes, size_t given) {
  const size_t wanted[] = {sizeof(A)...};
  if (given != sizeof...(A)) fail("another number of arguments than the kernel takes");
  for (size_t i = 0; i < given; ++i)
    if (sizes[i] != wanted[i]) fail("an argument of another size than the kernel takes");
  if (threads == 0 || threads % 32 != 0 || threads > 1024) fail("a block of no whole number of warps");
  if (fibers.empty()) fibers.resize(threads);
  if (fibers.size() != threads) fail("blocks of another size than before");
  const std::function<void()> run = [&] { call(kernel, places, std::index_sequence_for<A...>()); };
  body = &run;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(threads);
}

}  // namespace

inline void __syncthreads() { wait_at(State::AtBlock); }
inline void __syncwarp() { wait_at(State::AtWarp); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return spoken(mask, value, (unsigned)lane);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  return spoken(mask, value, (threadIdx.x % 32) ^ (unsigned)offset);
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// A half's value: its fraction in units of its exponent.
inline float emulated_half_to_float(unsigned short bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude;
  if (exponent == 31)
    magnitude = fraction ? NAN : INFINITY;
  else
    magnitude = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp((float)fraction, -24);
  return bits >> 15 ? -magnitude : magnitude;
}

// The nearest half, of two equally near the even one: the number in units of the half's last place, rounded to a whole one.
inline unsigned short emulated_float_to_half(float x) {
  const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return sign | 0x7e00;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude == 0.0f) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);
  const int last_place = std::max(exponent - 11, -24);
  const int whole = (int)std::nearbyint(std::ldexp(magnitude, -last_place));
  if (last_place == -24) return sign | whole;
  return sign | (((last_place + 24) << 10) + whole);
}

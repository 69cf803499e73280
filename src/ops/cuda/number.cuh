// What every kernel file begins with: stored numbers, sixteen bytes at a time, sums over neighbouring threads.
//
// NVRTC compiles this text for a GPU; the tests compile the same text with the C++ compiler for an emulated one (emulator.h).
// Arithmetic is in fp32 with one rounding, to nearest even, where a result is stored; denormal numbers are kept.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

// Threads of a warp, and of every block that is launched.
const int WARP = 32;
const int THREADS = 256;
const u32 EVERY_LANE = 0xffffffffu;

__device__ inline float wide(float x) { return x; }

__device__ inline float wide(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

__device__ inline float wide(f16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return emulated_half_to_float(x.bits);
#endif
}

// Two numbers rounded to T, the first in the lower half.
template <class T>
__device__ u32 two(float first, float second);

__device__ inline u32 nearest_bf16(float x) {
  const u32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

template <>
__device__ inline u32 two<bf16>(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
#else
  return nearest_bf16(first) | nearest_bf16(second) << 16;
#endif
}

template <>
__device__ inline u32 two<f16>(float first, float second) {
#ifdef __CUDA_ARCH__
  u16 low, high;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(low) : "f"(first));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(high) : "f"(second));
  return (u32)low | (u32)high << 16;
#else
  return (u32)emulated_float_to_half(first) | (u32)emulated_float_to_half(second) << 16;
#endif
}

template <class T>
__device__ T rounded(float x) {
  return T{(u16)two<T>(x, 0.0f)};
}

template <>
__device__ inline float rounded<float>(float x) {
  return x;
}

// Sixteen bytes of numbers, at a multiple of sixteen bytes.
__device__ inline void load(const float* at, float (&x)[4]) {
  const uint4 words = *reinterpret_cast<const uint4*>(at);
  x[0] = __uint_as_float(words.x);
  x[1] = __uint_as_float(words.y);
  x[2] = __uint_as_float(words.z);
  x[3] = __uint_as_float(words.w);
}

template <class T>
__device__ void load(const T* at, float (&x)[8]) {
  const uint4 words = *reinterpret_cast<const uint4*>(at);
  const u32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = wide(T{(u16)pairs[i]});
    x[2 * i + 1] = wide(T{(u16)(pairs[i] >> 16)});
  }
}

// One store: the compiler takes some of those that are written as such apart.
__device__ inline void store_words(void* at, const uint4& words) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
#else
  *static_cast<uint4*>(at) = words;
#endif
}

__device__ inline void store(float* at, const float (&x)[4]) {
  uint4 words;
  words.x = __float_as_uint(x[0]);
  words.y = __float_as_uint(x[1]);
  words.z = __float_as_uint(x[2]);
  words.w = __float_as_uint(x[3]);
  store_words(at, words);
}

template <class T>
__device__ void store(T* at, const float (&x)[8]) {
  uint4 words;
  words.x = two<T>(x[0], x[1]);
  words.y = two<T>(x[2], x[3]);
  words.z = two<T>(x[4], x[5]);
  words.w = two<T>(x[6], x[7]);
  store_words(at, words);
}

// The first `count` of N numbers, the rest 0; by sixteen bytes where `whole`: all of them, at a multiple of sixteen bytes.
template <class T, int N>
__device__ void fetch(const T* at, bool whole, int count, float (&x)[N]) {
  const int LENGTH = 16 / sizeof(T);
  if constexpr (N % LENGTH == 0) {
    if (whole) {
#pragma unroll
      for (int i = 0; i < N; i += LENGTH) {
        float part[LENGTH];
        load(at + i, part);
#pragma unroll
        for (int j = 0; j < LENGTH; ++j) x[i + j] = part[j];
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = i < count ? wide(at[i]) : 0.0f;
}

// Stores the first `count` of N numbers; as `fetch`.
template <class T, int N>
__device__ void put(T* at, bool whole, int count, const float (&x)[N]) {
  if constexpr (N == 16 / sizeof(T)) {
    if (whole) {
      store(at, x);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < count) at[i] = rounded<T>(x[i]);
}

// What `both` makes of the numbers of `team` neighbouring threads, a power of two up to a warp or a whole block, in the same order every
// time. Every thread of the block calls it.
template <class F>
__device__ float of_team(float x, int team, F both) {
  __shared__ float parts[THREADS / WARP];
  for (int offset = (team < WARP ? team : WARP) / 2; offset > 0; offset /= 2)
    x = both(x, __shfl_xor_sync(EVERY_LANE, x, offset));
  if (team <= WARP) return x;
  if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
  __syncthreads();
  x = parts[0];
  for (int i = 1; i < THREADS / WARP; ++i) x = both(x, parts[i]);
  __syncthreads();
  return x;
}

__device__ inline float team_sum(float x, int team) {
  return of_team(x, team, [](float a, float b) { return a + b; });
}

__device__ inline float team_largest(float x, int team) {
  return of_team(x, team, [](float a, float b) { return b > a ? b : a; });
}

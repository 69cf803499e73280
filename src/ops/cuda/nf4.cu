// Four-bit blocks (NF4, FP4): made whole, and made.
//
// Compiled without fused multiply-add: the numbers are those of the CPU, bit for bit.

// What the sixteen codes stand for.
struct Sixteen {
  float value[16];
};

// A warp makes this many numbers whole: 512 bytes of codes, sixteen to a lane, and at most 32 blocks, so that a lane decodes a scale.
const int TILE = 1024;
const int NESTED_BLOCK = 256;

// The numbers that `codes` ((n + 1) / 2) stand for: out (n). A block is 2^shift numbers, at least 32. `absmax` holds the blocks' scales or,
// where there are `nested` ones (blocks), the scales of 256 of those each: `map[nested] * absmax + offset`, rounded twice.
//
// Codes come in by sixteen bytes a lane, are handed round in shared memory, and numbers go out by sixteen bytes a lane, neighbours
// beside each other.
template <class T>
__device__ void dequantise(const u8* __restrict__ codes, const Sixteen& values, const float* __restrict__ absmax,
                           const u8* __restrict__ nested, const float* __restrict__ map, float offset,
                           T* __restrict__ out, i64 n, int shift) {
  const int LENGTH = 16 / sizeof(T);
  __shared__ float table[16];
  __shared__ uint4 staged[THREADS / WARP][WARP];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (threadIdx.x == i) table[i] = values.value[i];
  __syncthreads();
  const i64 first = ((i64)blockIdx.x * (THREADS / WARP) + warp) * TILE;
  if (first >= n) return;

  const i64 block = (first >> shift) + lane;
  float scale = 0.0f;
  if (((i64)lane << shift) < TILE && (block << shift) < n)
    scale = nested ? map[nested[block]] * absmax[block / NESTED_BLOCK] + offset : absmax[block];

  if (first + TILE > n) {
    for (int at = lane; at < TILE; at += WARP) {
      const float own = __shfl_sync(EVERY_LANE, scale, at >> shift);
      if (first + at >= n) continue;
      const u32 byte = codes[(first + at) / 2];
      out[first + at] = rounded<T>(table[at % 2 ? byte & 15 : byte >> 4] * own);
    }
    return;
  }
  staged[warp][lane] = reinterpret_cast<const uint4*>(codes + first / 2)[lane];
  __syncwarp();
  const u8* bytes = reinterpret_cast<const u8*>(staged[warp]);
#pragma unroll
  for (int round = 0; round < TILE / (WARP * LENGTH); ++round) {
    const int at = (round * WARP + lane) * LENGTH;
    const float own = __shfl_sync(EVERY_LANE, scale, at >> shift);
    const u32 word = LENGTH == 8 ? *reinterpret_cast<const u32*>(bytes + at / 2)
                                 : *reinterpret_cast<const u16*>(bytes + at / 2);
    float x[LENGTH];
#pragma unroll
    for (int i = 0; i < LENGTH / 2; ++i) {
      x[2 * i] = table[(word >> (8 * i + 4)) & 15] * own;
      x[2 * i + 1] = table[(word >> (8 * i)) & 15] * own;
    }
    store(out + first + at, x);
  }
}

// How x becomes a code: the sum of the steps whose bound lies below x, added to the first code.
struct Ladder {
  int first;
  float bounds[15];
  int steps[15];
  // What a block is divided by at least.
  float smallest;
};

__device__ inline u32 code_of(const Ladder& ladder, float x) {
  int code = ladder.first;
#pragma unroll
  for (int i = 0; i < 15; ++i) code += x > ladder.bounds[i] ? ladder.steps[i] : 0;
  return (u32)code;
}

// Codes ((n + 1) / 2) and each block's largest magnitude (blocks) of n values, in blocks of `block`. A block is read twice by up to a
// warp, eight numbers a lane; short blocks share one.
//
// A last block that is cut is divided by its largest, where whole ones are multiplied by the reciprocal; as on the CPU.
template <class T>
__device__ void quantise(const T* __restrict__ values, const Ladder& ladder, i64 n, int block, u8* __restrict__ codes,
                         float* __restrict__ absmax) {
  const int EACH = 8;
  const int group = block < WARP * EACH ? block / EACH : WARP;
  const int lane = threadIdx.x % WARP, within = lane % group;
  const i64 warp = (i64)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
  const i64 number = warp * (WARP / group) + lane / group, first = number * block;
  const bool cut = first + block > n;
  const int count = first >= n ? 0 : cut ? (int)(n - first) : block;

  float largest = 0.0f;
  for (int at = within * EACH; at < count; at += group * EACH) {
    float x[EACH];
    fetch(values + first + at, count - at >= EACH, count - at, x);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const float magnitude = fabsf(x[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  for (int offset = group / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(EVERY_LANE, largest, offset);
    largest = other > largest ? other : largest;
  }
  if (count == 0) return;
  const float divisor = largest > ladder.smallest ? largest : ladder.smallest;
  if (within == 0) absmax[number] = cut ? divisor : largest;
  const float scale = 1.0f / divisor;
  for (int at = within * EACH; at < count; at += group * EACH) {
    float x[EACH];
    fetch(values + first + at, count - at >= EACH, count - at, x);
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      // The first of two is the high half of its byte.
      const u32 code = code_of(ladder, cut ? x[i] / divisor : x[i] * scale);
      word |= code << (8 * (i / 2) + 4 * (1 - i % 2));
    }
    u8* to = codes + (first + at) / 2;
    if (count - at >= EACH) {
      *reinterpret_cast<u32*>(to) = word;
    } else {
      for (int i = 0; i < (count - at + 1) / 2; ++i) to[i] = (u8)(word >> (8 * i));
    }
  }
}

#define KERNELS(name, T)                                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                  \
      four_bit_dequantise_##name(const u8* codes, Sixteen values, const float* absmax, const u8* nested,                 \
                                 const float* map, float offset, T* out, i64 n, int shift) {                             \
    dequantise<T>(codes, values, absmax, nested, map, offset, out, n, shift);                                            \
  }                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                  \
      four_bit_quantise_##name(const T* values, Ladder ladder, i64 n, int block, u8* codes, float* absmax) {             \
    quantise<T>(values, ladder, n, block, codes, absmax);                                                                \
  }

KERNELS(f32, float)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

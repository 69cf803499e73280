// Codes of two to eight bits in groups, made whole: `(code - zero) * scale` (GPTQ, AWQ, integers of compressed-tensors), and
// `e2m1 * 2^(exponent - 127)` (MXFP4).
//
// A row's codes follow one another from the lowest bit of its first byte on; eight of them fill as many bytes as a code has bits, so that a
// thread reads whole bytes and makes eight numbers. Compiled without fused multiply-add: the numbers are those of the CPU, bit for bit.

const int EIGHT = 8;

// A matrix of codes: `stride` bytes to a row.
struct Codes {
  int rows;
  int columns;
  int stride;
  int bits;
};

// Which eight numbers a thread makes.
struct Place {
  bool live;
  i64 row;
  int column;
  int count;

  __device__ explicit Place(const Codes& codes) {
    const int each = (codes.columns + EIGHT - 1) / EIGHT;
    const i64 number = (i64)blockIdx.x * THREADS + threadIdx.x;
    row = number / each;
    column = (int)(number - row * each) * EIGHT;
    live = row < codes.rows;
    count = codes.columns - column < EIGHT ? codes.columns - column : EIGHT;
  }
};

// The codes of a place, `bits` bits each.
__device__ inline unsigned long long eight(const u8* __restrict__ bytes, const Codes& codes, const Place& place) {
  const u8* from = bytes + place.row * codes.stride + place.column / EIGHT * codes.bits;
  if (codes.bits == 4 && place.count == EIGHT && codes.stride % 4 == 0) return *reinterpret_cast<const u32*>(from);
  unsigned long long all = 0;
  const int count = (place.count * codes.bits + 7) / 8;
  for (int i = 0; i < count; ++i) all |= (unsigned long long)from[i] << (8 * i);
  return all;
}

template <class T>
__device__ void put_eight(T* __restrict__ out, const Codes& codes, const Place& place, const float (&x)[EIGHT]) {
  const int LENGTH = 16 / sizeof(T);
  const bool whole = codes.columns % LENGTH == 0;
  T* to = out + place.row * codes.columns + place.column;
#pragma unroll
  for (int i = 0; i < EIGHT; i += LENGTH) {
    float part[LENGTH];
#pragma unroll
    for (int j = 0; j < LENGTH; ++j) part[j] = x[i + j];
    const int count = place.count - i;
    if (count > 0) put(to + i, whole && count >= LENGTH, count, part);
  }
}

struct Groups {
  int wide;
  int across;
  // The code that stands for zero where there are no `zeros`.
  float middle;
  // What a product is rounded to first: 0 nothing, 1 fp16, 2 bf16.
  int rounding;
};

// `order` (columns) says the group of a column; without it, groups are `wide` columns each.
template <class T>
__device__ void grouped(const u8* __restrict__ bytes, const float* __restrict__ scales, const u8* __restrict__ zeros,
                        const int* __restrict__ order, T* __restrict__ out, const Codes& codes, const Groups& groups) {
  const Place place(codes);
  if (!place.live) return;
  const unsigned long long all = eight(bytes, codes, place);
  const u32 mask = (1u << codes.bits) - 1u;
  const i64 of_row = place.row * groups.across;
  int group = -1;
  float scale = 0.0f, zero = 0.0f, x[EIGHT];
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) {
    const int column = place.column + (i < place.count ? i : 0);
    const int own = order ? order[column] : column / groups.wide;
    if (own != group) {
      group = own;
      scale = scales[of_row + group];
      zero = zeros ? (float)zeros[of_row + group] : groups.middle;
    }
    const float y = ((float)((u32)(all >> (i * codes.bits)) & mask) - zero) * scale;
    x[i] = groups.rounding == 0 ? y : groups.rounding == 1 ? wide(rounded<f16>(y)) : wide(rounded<bf16>(y));
  }
  put_eight(out, codes, place, x);
}

// What a code of e2m1 stands for: a sign, two bits of exponent, one of mantissa.
__device__ inline float e2m1(u32 code) {
  const u32 magnitude = code & 7u;
  const float x = magnitude < 2u ? (float)magnitude * 0.5f : __uint_as_float((magnitude << 22) + (126u << 23));
  return __uint_as_float(__float_as_uint(x) | (code & 8u) << 28);
}

// exponents (rows, columns / 32) u8.
template <class T>
__device__ void mxfp4(const u8* __restrict__ bytes, const u8* __restrict__ exponents, T* __restrict__ out,
                      const Codes& codes) {
  const Place place(codes);
  if (!place.live) return;
  const u32 all = (u32)eight(bytes, codes, place);
  const u32 exponent = exponents[place.row * (codes.columns / 32) + place.column / 32];
  // 2^-127 is denormal; the largest exponent stands for no number.
  const float scale = __uint_as_float(exponent == 0 ? 1u << 22 : exponent == 255 ? 0x7fc00000u : exponent << 23);
  float x[EIGHT];
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) x[i] = e2m1(all >> (4 * i) & 15u) * scale;
  put_eight(out, codes, place, x);
}

#define KERNELS(name, T)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                   \
      grouped_dequantise_##name(const u8* bytes, const float* scales, const u8* zeros, const int* order, T* out,          \
                                Codes codes, Groups groups) {                                                             \
    grouped<T>(bytes, scales, zeros, order, out, codes, groups);                                                          \
  }                                                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                   \
      mxfp4_dequantise_##name(const u8* bytes, const u8* exponents, T* out, Codes codes) {                                \
    mxfp4<T>(bytes, exponents, out, codes);                                                                               \
  }

KERNELS(f32, float)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

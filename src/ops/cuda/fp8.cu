// Eight-bit floating-point numbers with scales: rows made of them, and matrices made whole.
//
// Compiled without fused multiply-add: the numbers are those of the CPU, bit for bit.

const float LARGEST = 448.0f;

// The nearest number of e4m3fn, ties to even, of one of magnitude at most 448.
__device__ inline u32 e4m3_of(float x) {
  const u32 bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  // Below 2^-6 numbers lie 2^-9 apart: their codes are what is left of a sum at which fp32 numbers lie one apart.
  const u32 small = __float_as_uint(__uint_as_float(magnitude) * 512.0f + 8388608.0f) & 0xffu;
  const u32 normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  return ((magnitude < 0x3c800000u ? small : normal) | (bits >> 24 & 0x80u)) & 0xffu;
}

// What a finite code stands for; `exponent` bits of it are exponent: 4 (e4m3fn) or 5 (e5m2).
__device__ inline float number_of(u32 code, int exponent) {
  const int mantissa = 7 - exponent, bias = (1 << (exponent - 1)) - 1;
  const u32 magnitude = code & 0x7fu;
  const float normal = __uint_as_float((magnitude << (23 - mantissa)) + ((u32)(127 - bias) << 23));
  // Without exponent the mantissa alone counts steps of the smallest number.
  const float small = (float)magnitude * __uint_as_float((u32)(128 - bias - mantissa) << 23);
  const float x = magnitude < (1u << mantissa) ? small : normal;
  return __uint_as_float(__float_as_uint(x) | (code & 0x80u) << 24);
}

// Codes (rows, width) of e4m3fn and scales (rows), `largest / 448`, of x (rows, width). A row is shared by `team` neighbouring threads
// and read twice.
template <class T>
__device__ void quantise(const T* __restrict__ x, i64 rows, int width, int team, u8* __restrict__ codes,
                         float* __restrict__ scales) {
  const int LENGTH = 16 / sizeof(T);
  const i64 row = (i64)blockIdx.x * (THREADS / team) + threadIdx.x / team;
  const bool whole = width % LENGTH == 0;
  const int first = (int)(threadIdx.x % team) * LENGTH, step = team * LENGTH, end = row < rows ? width : 0;
  const T* from = x + row * width;
  u8* to = codes + row * width;
  float largest = 0.0f;
  for (int at = first; at < end; at += step) {
    float v[LENGTH];
    fetch(from + at, whole, end - at, v);
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) {
      // Magnitudes are in the order of their bits: of what is no number, too.
      const float magnitude = fabsf(v[i]);
      largest = __float_as_uint(magnitude) > __float_as_uint(largest) ? magnitude : largest;
    }
  }
  largest = of_team(largest, team, [](float a, float b) { return __float_as_uint(b) > __float_as_uint(a) ? b : a; });
  const float scale = largest == 0.0f ? 1.0f : largest / LARGEST;
  if (row < rows && first == 0) scales[row] = scale;
  for (int at = first; at < end; at += step) {
    float v[LENGTH];
    fetch(from + at, whole, end - at, v);
    u32 words[LENGTH / 4];
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) {
      const float y = v[i] / scale;
      const u32 code = e4m3_of(y > LARGEST ? LARGEST : y < -LARGEST ? -LARGEST : y);
      words[i / 4] = (i % 4 ? words[i / 4] : 0u) | code << (8 * (i % 4));
    }
    if (whole) {
#pragma unroll
      for (int i = 0; i < LENGTH / 4; ++i) reinterpret_cast<u32*>(to + at)[i] = words[i];
    } else {
#pragma unroll
      for (int i = 0; i < LENGTH; ++i)
        if (at + i < end) to[at + i] = (u8)(words[i / 4] >> (8 * (i % 4)));
    }
  }
}

// How a matrix of codes is scaled: `high` rows and `wide` columns to a scale, `across` scales side by side.
struct Blocks {
  int columns;
  int high;
  int wide;
  int across;
  int exponent;
  // What a product is rounded to first: 0 nothing, 1 fp16, 2 bf16.
  int rounding;
};

// out (rows, columns), n numbers, sixteen bytes a thread.
template <class T>
__device__ void dequantise(const u8* __restrict__ codes, const float* __restrict__ scales, T* __restrict__ out, i64 n,
                           const Blocks& blocks) {
  const int LENGTH = 16 / sizeof(T);
  const i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * LENGTH;
  if (first >= n) return;
  const bool whole = n - first >= LENGTH;
  const int count = whole ? LENGTH : (int)(n - first);
  u32 words[LENGTH / 4];
#pragma unroll
  for (int i = 0; i < LENGTH / 4; ++i) words[i] = whole ? reinterpret_cast<const u32*>(codes + first)[i] : 0u;
  if (!whole) {
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) words[i / 4] |= i < count ? (u32)codes[first + i] << (8 * (i % 4)) : 0u;
  }
  i64 row = first / blocks.columns;
  int column = (int)(first - row * blocks.columns), across = column / blocks.wide;
  const float* of_row = scales + row / blocks.high * blocks.across;
  // Where the next scale begins.
  int border = (across + 1) * blocks.wide;
  float scale = of_row[across], x[LENGTH];
#pragma unroll
  for (int i = 0; i < LENGTH; ++i) {
    if (i < count && column == blocks.columns) {
      column = across = 0;
      border = blocks.wide;
      of_row = scales + ++row / blocks.high * blocks.across;
      scale = of_row[0];
    } else if (i < count && column == border) {
      border += blocks.wide;
      scale = of_row[++across];
    }
    ++column;
    const float y = number_of(words[i / 4] >> (8 * (i % 4)) & 0xffu, blocks.exponent) * scale;
    x[i] = blocks.rounding == 0 ? y : blocks.rounding == 1 ? wide(rounded<f16>(y)) : wide(rounded<bf16>(y));
  }
  put(out + first, whole, count, x);
}

#define KERNELS(name, T)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                   \
      fp8_quantise_##name(const T* x, i64 rows, int width, int team, u8* codes, float* scales) {                          \
    quantise<T>(x, rows, width, team, codes, scales);                                                                     \
  }                                                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                   \
      fp8_dequantise_##name(const u8* codes, const float* scales, T* out, i64 n, Blocks blocks) {                         \
    dequantise<T>(codes, scales, out, n, blocks);                                                                         \
  }

KERNELS(f32, float)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

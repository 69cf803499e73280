// Rows of eight-bit integers with one scale each, made whole: `code * absmax * (1 / 127)`, rounded after each product.
//
// Compiled without fused multiply-add: the numbers are those of the plain composition, bit for bit.

// codes (n) in rows of `width`, absmax (rows); out (n), sixteen bytes a thread.
template <class T>
__device__ void dequantise(const signed char* __restrict__ codes, const float* __restrict__ absmax, T* __restrict__ out,
                           i64 n, i64 width) {
  const int LENGTH = 16 / sizeof(T);
  const i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * LENGTH;
  if (first >= n) return;
  const bool whole = n - first >= LENGTH;
  const int count = whole ? LENGTH : (int)(n - first);
  signed char code[LENGTH];
  if (whole) {
    u32 words[LENGTH / 4];
#pragma unroll
    for (int i = 0; i < LENGTH / 4; ++i) words[i] = reinterpret_cast<const u32*>(codes + first)[i];
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) code[i] = (signed char)(words[i / 4] >> (8 * (i % 4)));
  } else {
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) code[i] = i < count ? codes[first + i] : 0;
  }
  i64 row = first / width, column = first - row * width;
  float scale = absmax[row];
  float x[LENGTH];
#pragma unroll
  for (int i = 0; i < LENGTH; ++i) {
    if (column == width && i < count) {
      column = 0;
      scale = absmax[++row];
    }
    ++column;
    x[i] = (float)code[i] * scale * (1.0f / 127.0f);
  }
  put(out + first, whole, count, x);
}

#define KERNELS(name, T)                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                    \
      int8_dequantise_##name(const signed char* codes, const float* absmax, T* out, i64 n, i64 width) {    \
    dequantise<T>(codes, absmax, out, n, width);                                                           \
  }

KERNELS(f32, float)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

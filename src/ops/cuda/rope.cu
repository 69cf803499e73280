// Rotary position embedding of queries and keys in one launch: pairs (x1, x2) become (x1 cos - x2 sin, x2 cos + x1 sin).

// x (tokens, heads, head), and y likewise: of each head, the elements from `first` on turn.
template <class T>
struct Heads {
  const T* x;
  T* y;
  int heads;
  int head;
  int first;
};

// Units of a head, one to a thread: N neighbouring elements that turn with N others half the rotated part away (halves) or among
// themselves (pairs); or as many as fill sixteen bytes, else one, that stay.
template <int N, class T>
constexpr bool fills = N * sizeof(T) == 16;

template <bool PAIRS, int N>
__device__ int turning(int half) {
  return (PAIRS ? 2 * half : half) / N;
}

template <bool PAIRS, int N, class T>
__device__ int units(const Heads<T>& heads, int half) {
  return turning<PAIRS, N>(half) + (heads.head - 2 * half) / (fills<N, T> ? N : 1);
}

// Turns unit `index` by the angles of its token: cos and sin (tokens, half).
template <bool PAIRS, int N, class T>
__device__ void rotate(const Heads<T>& heads, u32 index, const float* __restrict__ cos, const float* __restrict__ sin,
                       int half, float direction) {
  const bool whole = fills<N, T>;
  const u32 all = units<PAIRS, N>(heads, half), place = index / all;
  const int unit = index % all - turning<PAIRS, N>(half);
  const T* x = heads.x + (i64)place * heads.head;
  T* y = heads.y + (i64)place * heads.head;
  if (unit >= 0) {
    const int EACH = fills<N, T> ? N : 1;
    const int still = unit * EACH, at = still < heads.first ? still : still + 2 * half;
    float v[EACH];
    fetch(x + at, whole, EACH, v);
    put(y + at, whole, EACH, v);
    return;
  }
  const int turned = (index % all) * N, at = heads.first + turned;
  const i64 angles = (i64)(place / heads.heads) * half;
  if constexpr (PAIRS) {
    float v[N], c[N / 2], s[N / 2];
    fetch(x + at, whole, N, v);
    fetch(cos + angles + turned / 2, whole, N / 2, c);
    fetch(sin + angles + turned / 2, whole, N / 2, s);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float first = v[2 * i], second = v[2 * i + 1];
      s[i] *= direction;
      v[2 * i] = first * c[i] - second * s[i];
      v[2 * i + 1] = second * c[i] + first * s[i];
    }
    put(y + at, whole, N, v);
  } else {
    float a[N], b[N], c[N], s[N];
    fetch(x + at, whole, N, a);
    fetch(x + at + half, whole, N, b);
    fetch(cos + angles + turned, whole, N, c);
    fetch(sin + angles + turned, whole, N, s);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float first = a[i], second = b[i];
      s[i] *= direction;
      a[i] = first * c[i] - second * s[i];
      b[i] = second * c[i] + first * s[i];
    }
    put(y + at, whole, N, a);
    put(y + at + half, whole, N, b);
  }
}

// Both tensors: the first one's units, then the second's; `count` and `second_count` of them.
template <bool PAIRS, int N, class T>
__device__ void rotate_both(const Heads<T>& first, u32 count, const Heads<T>& second, u32 second_count,
                            const float* __restrict__ cos, const float* __restrict__ sin, int half, float direction) {
  const u32 index = blockIdx.x * THREADS + threadIdx.x;
  if (index < count)
    rotate<PAIRS, N>(first, index, cos, sin, half, direction);
  else if (index - count < second_count)
    rotate<PAIRS, N>(second, index - count, cos, sin, half, direction);
}

#define KERNEL(name, T, PAIRS, N)                                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                     \
      name(const T* x, T* y, int heads, int head, int first, u32 count, const T* second_x, T* second_y, int second_heads,   \
           int second_head, int second_first, u32 second_count, const float* cos, const float* sin, int half,               \
           float direction) {                                                                                               \
    rotate_both<PAIRS, N, T>({x, y, heads, head, first}, count, {second_x, second_y, second_heads, second_head, second_first}, \
                             second_count, cos, sin, half, direction);                                                      \
  }

// Sixteen bytes at a time, and for sizes that are no multiple of that.
#define KERNELS(name, T)                                  \
  KERNEL(rope_halves_##name, T, false, 16 / sizeof(T))    \
  KERNEL(rope_pairs_##name, T, true, 16 / sizeof(T))      \
  KERNEL(rope_halves_odd_##name, T, false, 1)             \
  KERNEL(rope_pairs_odd_##name, T, true, 2)

KERNELS(f32, float)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

// Queries and keys, each head normed (RMSNorm or LayerNorm) and then rotated, in one launch; and their backward in one. Statistics in fp32,
// made again in backward; one rounding at the end.
//
// A head is shared by `team` neighbouring threads, each of which takes units of it: two vectors of N elements, which turn by each other, or
// stay as they are.

// x (rows, head), a row for each head of each token; of each, the elements from `first` on turn. Row i is normed by the weights (turns,
// head) numbered i mod turns.
struct Heads {
  u32 rows;
  int heads;
  int head;
  int first;
  int turns;
  // Threads to a row.
  int team;
  // Whether the mean is taken away: LayerNorm.
  int centred;
  float eps;
};

// Where a unit's vectors are in a head; those that turn come first. Of neighbours that turn together, the two vectors lie side by side.
template <bool PAIRS, int N>
struct Unit {
  int a, b;
  // Of its first pair, in a token's angles; negative where it stays.
  int angle;
  // Whether there is a second vector.
  bool both;

  __device__ Unit(const Heads& heads, int half, int number) {
    const int turning = half / N;
    if (number < turning) {
      angle = number * N;
      a = heads.first + (PAIRS ? 2 * angle : angle);
      b = a + (PAIRS ? N : half);
      both = true;
    } else {
      const int still = (number - turning) * 2 * N;
      angle = -1;
      both = still + N < heads.head - 2 * half;
      a = still < heads.first ? still : still + 2 * half;
      b = still + N < heads.first ? still + N : still + N + 2 * half;
    }
  }
};

template <int N>
__device__ int units(const Heads& heads, int half) {
  return half / N + (heads.head - 2 * half + 2 * N - 1) / (2 * N);
}

// The numbers of a unit: a[i] turns with b[i]. What is not there is 0.
template <class T, bool PAIRS, int N>
__device__ void take(const T* x, const Unit<PAIRS, N>& unit, float (&a)[N], float (&b)[N]) {
  const bool whole = N > 1;
  fetch(x + unit.a, whole, N, a);
  if (unit.both) {
    fetch(x + unit.b, whole, N, b);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) b[i] = 0.0f;
  }
  if constexpr (PAIRS && N > 1) {
    if (unit.angle < 0) return;
    float even[N], odd[N];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      even[i] = a[2 * i];
      odd[i] = a[2 * i + 1];
      even[N / 2 + i] = b[2 * i];
      odd[N / 2 + i] = b[2 * i + 1];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      a[i] = even[i];
      b[i] = odd[i];
    }
  }
}

// The other way of `take`.
template <class T, bool PAIRS, int N>
__device__ void give(T* y, const Unit<PAIRS, N>& unit, float (&a)[N], float (&b)[N]) {
  const bool whole = N > 1;
  if constexpr (PAIRS && N > 1) {
    if (unit.angle >= 0) {
      float first[N], second[N];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        first[2 * i] = a[i];
        first[2 * i + 1] = b[i];
        second[2 * i] = a[N / 2 + i];
        second[2 * i + 1] = b[N / 2 + i];
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        a[i] = first[i];
        b[i] = second[i];
      }
    }
  }
  put(y + unit.a, whole, N, a);
  if (unit.both) put(y + unit.b, whole, N, b);
}

// A token's angles (half), and which way to turn by them.
struct Angles {
  const float* cos;
  const float* sin;
  float direction;
};

template <bool PAIRS, int N>
__device__ void turn(const Unit<PAIRS, N>& unit, const Angles& angles, float (&a)[N], float (&b)[N]) {
  if (unit.angle < 0) return;
  float c[N], s[N];
  fetch(angles.cos + unit.angle, N > 1, N, c);
  fetch(angles.sin + unit.angle, N > 1, N, s);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float first = a[i], second = b[i];
    s[i] *= angles.direction;
    a[i] = first * c[i] - second * s[i];
    b[i] = second * c[i] + first * s[i];
  }
}

// A row's mean (0 for RMSNorm) and 1/deviation. Every thread of the block calls it.
template <class T, bool PAIRS, int N>
__device__ void statistics(const Heads& heads, const T* x, int half, int count, float& mean, float& scale) {
  const int lane = threadIdx.x % heads.team;
  mean = 0.0f;
  if (heads.centred) {
    float sum = 0.0f;
    for (int number = lane; number < count; number += heads.team) {
      float a[N], b[N];
      take(x, Unit<PAIRS, N>(heads, half, number), a, b);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += a[i] + b[i];
    }
    mean = team_sum(sum, heads.team) / heads.head;
  }
  float squares = 0.0f;
  for (int number = lane; number < count; number += heads.team) {
    const Unit<PAIRS, N> unit(heads, half, number);
    float a[N], b[N];
    take(x, unit, a, b);
#pragma unroll
    for (int i = 0; i < N; ++i)
      squares += (a[i] - mean) * (a[i] - mean) + (unit.both ? (b[i] - mean) * (b[i] - mean) : 0.0f);
  }
  scale = 1.0f / sqrtf(team_sum(squares, heads.team) / heads.head + heads.eps);
}

// y of a row of x.
template <class T, bool PAIRS, int N>
__device__ void forward(const Heads& heads, u32 row, const T* x, const float* weight, const float* cos, const float* sin,
                        int half, T* y) {
  const int count = row < heads.rows ? units<N>(heads, half) : 0;
  const i64 start = (i64)row * heads.head, angle = (i64)(row / heads.heads) * half;
  const Angles angles = {cos + angle, sin + angle, 1.0f};
  const float* own_weight = weight + row % heads.turns * heads.head;
  float mean, scale;
  statistics<T, PAIRS, N>(heads, x + start, half, count, mean, scale);
  for (int number = threadIdx.x % heads.team; number < count; number += heads.team) {
    const Unit<PAIRS, N> unit(heads, half, number);
    float a[N], b[N], of_a[N], of_b[N];
    take(x + start, unit, a, b);
    take(own_weight, unit, of_a, of_b);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      a[i] = (a[i] - mean) * scale * of_a[i];
      b[i] = (b[i] - mean) * scale * of_b[i];
    }
    turn(unit, angles, a, b);
    give(y + start, unit, a, b);
  }
}

// dx of a row of x and dy. With g = w times dy turned back, and n the normed x: dx = (g - n * mean(g * n)) / deviation, and for LayerNorm
// less the mean of g.
template <class T, bool PAIRS, int N>
__device__ void backward(const Heads& heads, u32 row, const T* dy, const T* x, const float* weight, const float* cos,
                         const float* sin, int half, T* dx) {
  const int count = row < heads.rows ? units<N>(heads, half) : 0;
  const i64 start = (i64)row * heads.head, angle = (i64)(row / heads.heads) * half;
  const Angles angles = {cos + angle, sin + angle, -1.0f};
  const float* own_weight = weight + row % heads.turns * heads.head;
  float mean, scale;
  statistics<T, PAIRS, N>(heads, x + start, half, count, mean, scale);
  const auto weighted = [&](const Unit<PAIRS, N>& unit, float(&a)[N], float(&b)[N]) {
    float of_a[N], of_b[N];
    take(dy + start, unit, a, b);
    turn(unit, angles, a, b);
    take(own_weight, unit, of_a, of_b);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      a[i] *= of_a[i];
      b[i] *= of_b[i];
    }
  };
  float dot = 0.0f, sum = 0.0f;
  for (int number = threadIdx.x % heads.team; number < count; number += heads.team) {
    const Unit<PAIRS, N> unit(heads, half, number);
    float a[N], b[N], of_a[N], of_b[N];
    weighted(unit, of_a, of_b);
    take(x + start, unit, a, b);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dot += of_a[i] * (a[i] - mean) + of_b[i] * (b[i] - mean);
      sum += of_a[i] + of_b[i];
    }
  }
  const float along = team_sum(dot, heads.team) * scale * scale / heads.head;
  const float shift = heads.centred ? team_sum(sum, heads.team) / heads.head : 0.0f;
  for (int number = threadIdx.x % heads.team; number < count; number += heads.team) {
    const Unit<PAIRS, N> unit(heads, half, number);
    float a[N], b[N], of_a[N], of_b[N];
    weighted(unit, of_a, of_b);
    take(x + start, unit, a, b);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      a[i] = (of_a[i] - shift - (a[i] - mean) * along) * scale;
      b[i] = (of_b[i] - shift - (b[i] - mean) * along) * scale;
    }
    give(dx + start, unit, a, b);
  }
}

// Blocks that a multiprocessor is to hold at least: left to itself, the compiler makes room for one more and spills for it.
const int BLOCKS = 3;

// The first tensor has the first `blocks` blocks, the second the rest.
#define KERNEL(name, T, PAIRS, N)                                                                                            \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                                      \
      normed_rope_##name(Heads heads, const T* x, const float* weight, T* y, u32 blocks, Heads second, const T* second_x,    \
                         const float* second_weight, T* second_y, const float* cos, const float* sin, int half) {            \
    const bool later = blockIdx.x >= blocks;                                                                                 \
    const Heads own = later ? second : heads;                                                                                \
    const u32 row = (blockIdx.x - (later ? blocks : 0)) * (THREADS / own.team) + threadIdx.x / own.team;                     \
    forward<T, PAIRS, N>(own, row, later ? second_x : x, later ? second_weight : weight, cos, sin, half,                     \
                         later ? second_y : y);                                                                              \
  }                                                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) normed_rope_backward_##name(                                         \
      Heads heads, const T* dy, const T* x, const float* weight, T* dx, u32 blocks, Heads second, const T* second_dy,        \
      const T* second_x, const float* second_weight, T* second_dx, const float* cos, const float* sin, int half) {           \
    const bool later = blockIdx.x >= blocks;                                                                                 \
    const Heads own = later ? second : heads;                                                                                \
    const u32 row = (blockIdx.x - (later ? blocks : 0)) * (THREADS / own.team) + threadIdx.x / own.team;                     \
    backward<T, PAIRS, N>(own, row, later ? second_dy : dy, later ? second_x : x, later ? second_weight : weight, cos, sin,  \
                          half, later ? second_dx : dx);                                                                     \
  }

// Sixteen bytes at a time, and for sizes that are no multiple of that.
#define KERNELS(name, T)                             \
  KERNEL(halves_##name, T, false, 16 / sizeof(T))    \
  KERNEL(pairs_##name, T, true, 16 / sizeof(T))      \
  KERNEL(halves_odd_##name, T, false, 1)             \
  KERNEL(pairs_odd_##name, T, true, 1)

KERNELS(f32, float)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

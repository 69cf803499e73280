// RMSNorm and LayerNorm of rows or of the sum of two, and their backward. Statistics in fp32, one rounding at the end.
//
// A row is shared by `team` neighbouring threads: as many as it has sixteen bytes, up to a warp, or a whole block where it is long. What
// is read twice is near the second time.

// The rows x (rows, width) with their weights (turns, width): row i takes the one numbered i mod turns.
struct Rows {
  i64 rows;
  int width;
  int turns;
  int team;
  // Whether the mean is taken away: LayerNorm.
  int centred;
};

// Where a thread's row is, and which of its numbers are the thread's.
template <class T>
struct Part {
  static const int LENGTH = 16 / sizeof(T);
  i64 row;
  bool live;
  bool whole;
  int first, step, width;

  __device__ Part(const Rows& rows)
      : row((i64)blockIdx.x * (THREADS / rows.team) + threadIdx.x / rows.team),
        live(row < rows.rows),
        whole(rows.width % LENGTH == 0),
        first((int)(threadIdx.x % rows.team) * LENGTH),
        step(rows.team * LENGTH),
        width(live ? rows.width : 0) {}

  // Calls body(at, count) for each of the thread's vectors.
  template <class F>
  __device__ void each(F body) const {
    for (int at = first; at < width; at += step) body(at, width - at < LENGTH ? width - at : LENGTH);
  }
};

template <class T>
__device__ void write(const Part<T>& part, const T* x, const float* __restrict__ weight,
                      const float* __restrict__ bias, float mean, float scale, T* __restrict__ y) {
  const int LENGTH = Part<T>::LENGTH;
  part.each([&](int at, int count) {
    float v[LENGTH], w[LENGTH], b[LENGTH];
    fetch(x + at, part.whole, count, v);
    fetch(weight + at, part.whole, count, w);
    if (bias) fetch(bias + at, part.whole, count, b);
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) {
      v[i] = (v[i] - mean) * scale * w[i];
      if (bias) v[i] += b[i];
    }
    put(y + at, part.whole, count, v);
  });
}

// y (rows, width), and of each row its mean (0 for RMSNorm) and 1/deviation: stats (rows, 2). Where something is given (rows, width), what
// is normed is sum (rows, width) = x + given * factor.
template <class T>
__device__ void forward(const T* x, const T* __restrict__ given, float factor, const float* __restrict__ weight,
                        const float* __restrict__ bias, float eps, Rows rows, T* sum, T* __restrict__ y,
                        float* __restrict__ stats) {
  const int LENGTH = Part<T>::LENGTH;
  const Part<T> part(rows);
  const i64 start = part.row * rows.width;
  // What is normed, from the second time on that it is read: each thread reads what it has written itself.
  const T* from = (given ? sum : x) + start;
  const auto first_time = [&](int at, int count, float(&v)[LENGTH]) {
    fetch(x + start + at, part.whole, count, v);
    if (!given) return;
    float more[LENGTH];
    fetch(given + start + at, part.whole, count, more);
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) v[i] = wide(rounded<T>(v[i] + more[i] * factor));
    put(sum + start + at, part.whole, count, v);
  };
  float mean = 0.0f;
  if (rows.centred) {
    float all = 0.0f;
    part.each([&](int at, int count) {
      float v[LENGTH];
      first_time(at, count, v);
#pragma unroll
      for (int i = 0; i < LENGTH; ++i) all += v[i];
    });
    mean = team_sum(all, rows.team) / rows.width;
  }
  float squares = 0.0f;
  part.each([&](int at, int count) {
    float v[LENGTH];
    if (rows.centred)
      fetch(from + at, part.whole, count, v);
    else
      first_time(at, count, v);
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) squares += i < count ? (v[i] - mean) * (v[i] - mean) : 0.0f;
  });
  const float scale = 1.0f / sqrtf(team_sum(squares, rows.team) / rows.width + eps);
  if (!part.live) return;
  if (part.first == 0) {
    stats[2 * part.row] = mean;
    stats[2 * part.row + 1] = scale;
  }
  write(part, from, weight + part.row % rows.turns * rows.width, bias, mean, scale, y + start);
}

// y again, of the kept statistics.
template <class T>
__device__ void again(const T* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                      const float* __restrict__ stats, Rows rows, T* __restrict__ y) {
  const Part<T> part(rows);
  if (!part.live) return;
  const i64 at = part.row * rows.width;
  write(part, x + at, weight + part.row % rows.turns * rows.width, bias, stats[2 * part.row], stats[2 * part.row + 1], y + at);
}

// With g = dy * w and n the normed x: dx = (g - n * mean(g * n)) / deviation, and for LayerNorm less the mean of g. `more` (rows, width) is
// added to that where it is there.
template <class T>
__device__ void backward(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ weight,
                         const float* __restrict__ stats, const T* __restrict__ more, Rows rows, T* __restrict__ dx) {
  const int LENGTH = Part<T>::LENGTH;
  const Part<T> part(rows);
  const i64 start = part.row * rows.width;
  const T *from = x + start, *grad = dy + start;
  const float* w_of_row = weight + part.row % rows.turns * rows.width;
  const float mean = part.live ? stats[2 * part.row] : 0.0f, scale = part.live ? stats[2 * part.row + 1] : 0.0f;
  float dot = 0.0f, sum = 0.0f;
  part.each([&](int at, int count) {
    float v[LENGTH], g[LENGTH], w[LENGTH];
    fetch(from + at, part.whole, count, v);
    fetch(grad + at, part.whole, count, g);
    fetch(w_of_row + at, part.whole, count, w);
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) {
      dot += g[i] * w[i] * (v[i] - mean);
      sum += g[i] * w[i];
    }
  });
  const float along = team_sum(dot, rows.team) * scale * scale / rows.width;
  const float shift = rows.centred ? team_sum(sum, rows.team) / rows.width : 0.0f;
  part.each([&](int at, int count) {
    float v[LENGTH], g[LENGTH], w[LENGTH];
    fetch(from + at, part.whole, count, v);
    fetch(grad + at, part.whole, count, g);
    fetch(w_of_row + at, part.whole, count, w);
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) g[i] = (g[i] * w[i] - shift - (v[i] - mean) * along) * scale;
    if (more) {
      fetch(more + start + at, part.whole, count, v);
#pragma unroll
      for (int i = 0; i < LENGTH; ++i) g[i] += v[i];
    }
    put(dx + start + at, part.whole, count, g);
  });
}

#define KERNELS(name, T)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                      \
      norm_##name(const T* x, const T* given, float factor, const float* weight, const float* bias, float eps, Rows rows,    \
                  T* sum, T* y, float* stats) {                                                                              \
    forward<T>(x, given, factor, weight, bias, eps, rows, sum, y, stats);                                                    \
  }                                                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS) norm_again_##name(                                                   \
      const T* x, const float* weight, const float* bias, const float* stats, Rows rows, T* y) {                             \
    again<T>(x, weight, bias, stats, rows, y);                                                                               \
  }                                                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS) norm_backward_##name(                                                \
      const T* dy, const T* x, const float* weight, const float* stats, const T* more, Rows rows, T* dx) {                   \
    backward<T>(dy, x, weight, stats, more, rows, dx);                                                                       \
  }

KERNELS(f32, float)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

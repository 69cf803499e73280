// Softmax, cross-entropy and its gradient, a row of logits to a block. Statistics in fp32.

// What becomes of the head's products before they are logits: times `factor`, then `cap tanh(logit / cap)` where there is a cap.
struct Map {
  float factor;
  float cap;
};

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }

__device__ inline float not_a_number() { return __uint_as_float(0x7fffffffu); }

__device__ inline float logit(const Map& map, float product) {
  const float scaled = product * map.factor;
  return map.cap > 0.0f ? tanhf(scaled / map.cap) * map.cap : scaled;
}

// The loss (rows) of each row of products (rows, width) at its target, and the gradient (rows, width) of `scale` times it.
//
// A row is read twice: once for its largest logit and the sum of exponentials beside it, kept as one goes (arXiv:1805.02867), once for the
// gradient. What is not finite is seen in both.
//
// Products are of the gradient's type, or in fp32 as they were summed.
template <class P, class T>
__device__ void cross_entropy(const P* __restrict__ products, const i64* __restrict__ targets, Map map, float scale,
                              int width, float* __restrict__ losses, T* __restrict__ gradient) {
  const int LENGTH = 16 / sizeof(T);
  const P* x = products + (i64)blockIdx.x * width;
  T* d = gradient + (i64)blockIdx.x * width;
  const bool whole = width % LENGTH == 0;
  const int first = threadIdx.x * LENGTH, step = THREADS * LENGTH;

  float largest = -infinity(), sum = 0.0f;
#pragma unroll 2
  for (int at = first; at < width; at += step) {
    const int count = width - at < LENGTH ? width - at : LENGTH;
    float v[LENGTH], most = largest;
    fetch(x + at, whole, count, v);
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) {
      v[i] = i < count ? logit(map, v[i]) : -infinity();
      most = v[i] > most ? v[i] : most;
    }
    // Nothing but -inf so far, or NaN, which the largest does not show.
    const float beside = most == -infinity() ? 0.0f : most;
    sum *= expf(largest - beside);
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) sum += expf(v[i] - beside);
    largest = most;
  }
  const float most = team_largest(largest, THREADS), beside = most == -infinity() ? 0.0f : most;
  const float logsumexp = beside + logf(team_sum(sum * expf(largest - beside), THREADS));
  const i64 target = targets[blockIdx.x];
  const float loss = target >= 0 && target < width ? logsumexp - logit(map, wide(x[target])) : not_a_number();
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;

  const float slope = fabsf(loss) < infinity() ? scale * map.factor : not_a_number(), per_cap = map.cap > 0.0f ? 1.0f / map.cap : 0.0f;
#pragma unroll 2
  for (int at = first; at < width; at += step) {
    const int count = width - at < LENGTH ? width - at : LENGTH;
    float v[LENGTH];
    fetch(x + at, whole, count, v);
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) {
      const float own = logit(map, v[i]), capped = per_cap > 0.0f ? own * per_cap : 0.0f;
      const float probability = expf(own - logsumexp) - (at + i == target ? 1.0f : 0.0f);
      v[i] = probability * (slope - slope * capped * capped);
    }
    put(d + at, whole, count, v);
  }
}

#define KERNELS(name, T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      cross_entropy_##name(const T* products, const i64* targets, Map map, float scale, int width, float* losses,     \
                           T* gradient) {                                                                             \
    cross_entropy<T, T>(products, targets, map, scale, width, losses, gradient);                                      \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      cross_entropy_of_fp32_##name(const float* products, const i64* targets, Map map, float scale, int width,        \
                                   float* losses, T* gradient) {                                                      \
    cross_entropy<float, T>(products, targets, map, scale, width, losses, gradient);                                  \
  }

KERNELS(f32, float)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

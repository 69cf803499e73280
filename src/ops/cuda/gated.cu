// What a feed-forward does between its products: y = act(gate) * up (SwiGLU, GeGLU and others), and its backward. In fp32, one rounding
// at the end; one exponential serves value and derivative.

// An activation, numbered as in gated.rs; the last three are those of the clamped one.
struct Curve {
  int number;
  float limit;
  float slope;
  float offset;
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The activation's value and derivative at x.
__device__ inline void at(const Curve& curve, float x, float& value, float& derivative) {
  switch (curve.number) {
    case 0: {  // SiLU
      const float s = sigmoid(x);
      value = x * s;
      derivative = s + x * s * (1.0f - s);
      break;
    }
    case 1: {  // GELU
      const float below = 0.5f * (1.0f + erff(x * 0.70710678f));
      value = x * below;
      derivative = below + x * expf(-0.5f * x * x) * 0.39894228f;
      break;
    }
    case 2: {  // GELU by tanh: (1 + tanh z) / 2 is the sigmoid of 2 z
      const float twice = 1.59576912f, s = sigmoid(twice * (x + 0.044715f * x * x * x));
      value = x * s;
      derivative = s + x * s * (1.0f - s) * twice * (1.0f + 3.0f * 0.044715f * x * x);
      break;
    }
    case 3: {  // sigmoid
      value = sigmoid(x);
      derivative = value * (1.0f - value);
      break;
    }
    default: {  // clamped
      const float kept = x > curve.limit ? curve.limit : x, s = sigmoid(kept * curve.slope);
      value = kept * s;
      derivative = x > curve.limit ? 0.0f : s + kept * curve.slope * s * (1.0f - s);
    }
  }
}

// What the value is multiplied with, and its derivative.
__device__ inline void up_at(const Curve& curve, float up, float& value, float& derivative) {
  value = up;
  derivative = 1.0f;
  if (curve.number < 4) return;
  value = up > curve.limit ? curve.limit : up;
  value = (value < -curve.limit ? -curve.limit : value) + curve.offset;
  derivative = fabsf(up) <= curve.limit ? 1.0f : 0.0f;
}

// y (n) of gate and up (n), or of gate alone.
template <class T>
__device__ void forward(const Curve& curve, const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ y,
                        i64 n) {
  const int LENGTH = 16 / sizeof(T);
  const i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * LENGTH;
  if (first >= n) return;
  const bool whole = n - first >= LENGTH;
  const int count = whole ? LENGTH : (int)(n - first);
  float g[LENGTH], u[LENGTH];
  fetch(gate + first, whole, count, g);
  if (up) fetch(up + first, whole, count, u);
#pragma unroll
  for (int i = 0; i < LENGTH; ++i) {
    float value, derivative, shown = 1.0f, slope;
    at(curve, g[i], value, derivative);
    if (up) up_at(curve, u[i], shown, slope);
    g[i] = value * shown;
  }
  put(y + first, whole, count, g);
}

// The gradients of gate and up from dy, and y again: each may take the place of one of these, as a thread reads its numbers before it
// writes any.
template <class T>
__device__ void backward(const Curve& curve, const T* dy, const T* gate, const T* up, T* dgate, T* dup, T* y, i64 n) {
  const int LENGTH = 16 / sizeof(T);
  const i64 first = ((i64)blockIdx.x * THREADS + threadIdx.x) * LENGTH;
  if (first >= n) return;
  const bool whole = n - first >= LENGTH;
  const int count = whole ? LENGTH : (int)(n - first);
  float d[LENGTH], g[LENGTH], u[LENGTH];
  fetch(dy + first, whole, count, d);
  fetch(gate + first, whole, count, g);
  if (up) fetch(up + first, whole, count, u);
#pragma unroll
  for (int i = 0; i < LENGTH; ++i) {
    float value, derivative, shown = 1.0f, slope = 0.0f;
    at(curve, g[i], value, derivative);
    if (up) up_at(curve, u[i], shown, slope);
    g[i] = value * shown;
    u[i] = d[i] * value * slope;
    d[i] = d[i] * shown * derivative;
  }
  put(dgate + first, whole, count, d);
  if (up) put(dup + first, whole, count, u);
  put(y + first, whole, count, g);
}

#define KERNELS(name, T)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS) gated_##name(Curve curve, const T* gate, const T* up, T* y, i64 n) { \
    forward<T>(curve, gate, up, y, n);                                                                                      \
  }                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS) gated_backward_##name(                                              \
      Curve curve, const T* dy, const T* gate, const T* up, T* dgate, T* dup, T* y, i64 n) {                                \
    backward<T>(curve, dy, gate, up, dgate, dup, y, n);                                                                     \
  }

KERNELS(f32, float)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

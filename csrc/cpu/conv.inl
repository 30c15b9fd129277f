// Inner loops of the causal convolution, a part of vector_kernels.inl.

// y = act(bias + sum over k of weight[k] taps[k]); slope = act' there, where wanted.
void conv_token(float* y, float* slope, const float* const* taps, const float* weight, const float* bias,
                int64_t kernel, bool silu, int64_t channels) {
  for (int64_t x = 0; x < channels; ++x) y[x] = bias[x];
  for (int64_t k = 0; k < kernel; ++k) {
    const float *from = taps[k], *w = weight + k * channels;
    for (int64_t x = 0; x < channels; ++x) y[x] += w[x] * from[x];
  }
  if (slope != nullptr) {
    for (int64_t x = 0; x < channels; ++x) {
      const float s = 1.0f / (1.0f + exponential(-y[x]));
      slope[x] = !silu ? 1.0f : s == 0.0f ? 0.0f : s * (1.0f + y[x] * (1.0f - s));
    }
  }
  if (silu) {
    for (int64_t x = 0; x < channels; ++x) y[x] = y[x] / (1.0f + exponential(-y[x]));
  }
}

void add_product(float* to, const float* a, const float* b, int64_t count) {
  for (int64_t x = 0; x < count; ++x) to[x] += a[x] * b[x];
}

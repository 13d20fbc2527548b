// One token: the state is read once, changed in registers or first cache, and written once to its new place.
#pragma once
#include "chunk.h"

namespace linattn::LINATTN_ISA {

template <class T>
void step_heads(const Step& a, int64_t first, int64_t last) {
  const int64_t K = a.K, V = a.V, HQ = a.H * a.G;
  for (int64_t n = first; n < last; ++n) {
    const int64_t b = n / a.H, h = n % a.H;
    const T *k = static_cast<const T*>(a.k) + n * K, *v = static_cast<const T*>(a.v) + n * V;
    const float *S = a.kv + n * K * V, beta = a.beta ? a.beta[n] : 1.0f;
    float* out = a.kv_out + n * K * V;
    const auto fade = [&](int64_t c) {
      if (a.decay == NONE) return 1.0f;
      return exp(splat(a.g[a.g_per_head ? h : a.decay == CHANNEL ? n * K + c : n]))[0];
    };
    const float once = a.decay == CHANNEL ? 0.0f : fade(0);
    for (int64_t i = 0; i < V; i += LANES) {  // a strip of columns: the columns of a state never meet
      const bool whole = i + LANES <= V;
      const int lanes = whole ? LANES : int(V - i);
      const auto get = [&](const float* p) {
        if (whole) return load(p);
        vec x = {};
        __builtin_memcpy(&x, p, size_t(lanes) * 4);
        return x;
      };
      const auto put = [&](float* p, vec x) { whole ? store(p, x) : void(__builtin_memcpy(p, &x, size_t(lanes) * 4)); };
      vec u;
      for (int l = 0; l < LANES; ++l) u[l] = l < lanes ? widen(v[i + l]) : 0.0f;
      if (a.beta) {
        vec held = {};
        for (int64_t c = 0; c < K; ++c) held += get(S + c * V + i) * (widen(k[c]) * (a.decay == CHANNEL ? fade(c) : once));
        u = (u - held) * beta;
      }
      for (int64_t c = 0; c < K; ++c) put(out + c * V + i, get(S + c * V + i) * (a.decay == CHANNEL ? fade(c) : once) + u * widen(k[c]));
      for (int64_t g = 0; g < a.G; ++g) {
        const T* q = static_cast<const T*>(a.q) + (b * HQ + h * a.G + g) * K;
        vec o = {};
        for (int64_t c = 0; c < K; ++c) o += get(out + c * V + i) * widen(q[c]);
        T* y = static_cast<T*>(a.o) + (b * HQ + h * a.G + g) * V + i;
        for (int l = 0; l < lanes; ++l) narrow(y + l, o[l] * a.scale);
      }
    }
    if (a.normalize == PLAIN) continue;
    for (int64_t c = 0; c < K; ++c) a.z_out[n * K + c] = a.z[n * K + c] * (a.decay == CHANNEL ? fade(c) : once) + widen(k[c]);
    for (int64_t g = 0; g < a.G; ++g) {
      const int64_t m = b * HQ + h * a.G + g;
      float d = 0;
      for (int64_t c = 0; c < K; ++c) d += a.z_out[n * K + c] * widen(static_cast<const T*>(a.q)[m * K + c]);
      const float inverse = 1.0f / denominator(d * a.scale, a.normalize, a.eps);
      T* y = static_cast<T*>(a.o) + m * V;
      for (int64_t i = 0; i < V; ++i) narrow(y + i, widen(y[i]) * inverse);
    }
  }
}

}  // namespace linattn::LINATTN_ISA

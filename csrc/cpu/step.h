// One token: the state is read once and written once to its new place, a strip of columns at a time; columns of a state never meet.
#pragma once
#include "chunk.h"

namespace linattn::LINATTN_ISA {

// NV vectors of columns from column i on, the last holding `tail` numbers (LANES if it is full).
template <int NV>
INLINE void step_strip(const Step& a, const float* S, float* out, const float* fade, const float* k, const float* v, float beta, const float* q,
                       float* o, int i, int tail) {
  const int K = int(a.K), V = int(a.V);
  const auto get = [&](const float* p, int l) {
    if (l < NV - 1 || tail == LANES) return load(p + l * LANES);
    vec x = {};
    __builtin_memcpy(&x, p + l * LANES, size_t(tail) * 4);
    return x;
  };
  const auto put = [&](float* p, int l, vec x) {
    if (l < NV - 1 || tail == LANES)
      store(p + l * LANES, x);
    else
      __builtin_memcpy(p + l * LANES, &x, size_t(tail) * 4);
  };
  vec u[NV], read[NV] = {};
#pragma GCC unroll 8
  for (int l = 0; l < NV; ++l) u[l] = load(v + i + l * LANES);
  if (a.beta) {  // what the faded state holds for this key
    vec held[NV] = {};
    for (int c = 0; c < K; ++c)
#pragma GCC unroll 8
      for (int l = 0; l < NV; ++l) held[l] += get(S + c * V + i, l) * (fade[c] * k[c]);
#pragma GCC unroll 8
    for (int l = 0; l < NV; ++l) u[l] = (u[l] - held[l]) * beta;
  }
  for (int c = 0; c < K; ++c)
#pragma GCC unroll 8
    for (int l = 0; l < NV; ++l) {
      const vec x = get(S + c * V + i, l) * fade[c] + u[l] * k[c];
      put(out + c * V + i, l, x);
      read[l] += x * q[c];
    }
#pragma GCC unroll 8
  for (int l = 0; l < NV; ++l) store(o + i + l * LANES, read[l]);
  for (int64_t g = 1; g < a.G; ++g) {  // further query heads of the group read what was written
    vec more[NV] = {};
    for (int c = 0; c < K; ++c)
#pragma GCC unroll 8
      for (int l = 0; l < NV; ++l) more[l] += get(out + c * V + i, l) * q[g * pad(K) + c];
#pragma GCC unroll 8
    for (int l = 0; l < NV; ++l) store(o + g * pad(V) + i + l * LANES, more[l]);
  }
}

// Heads first … last of B·H. Scratch: [K] fade, k; [V] v; [G K] q; [G V] o, each padded.
static void step(const Step& a, int64_t first, int64_t last, float* scratch) {
  const int K = int(a.K), V = int(a.V), G = int(a.G), Kp = pad(K), Vp = pad(V), size = a.bf16 ? 2 : 4;
  Scratch s{scratch};
  float *fade = s.take(Kp), *k = s.take(Kp), *v = s.take(Vp), *q = s.take(size_t(G) * Kp), *o = s.take(size_t(G) * Vp);
  const auto rows = [&](const void* p, int64_t at, int n, int width, float factor, float* to) {
    for (int r = 0; r < n; ++r) load_row(static_cast<const char*>(p) + (at + r) * width * size, a.bf16, width, factor, to + r * pad(width));
  };
  for (int64_t n = first; n < last; ++n) {
    const int64_t head = n % a.H, m = (n / a.H * a.H + head) * G;  // q and o: [B H·G ·]
    rows(a.k, n, 1, K, 1.0f, k), rows(a.v, n, 1, V, 1.0f, v), rows(a.q, m, G, K, a.scale, q);
    if (a.decay == CHANNEL) __builtin_memcpy(fade, a.g + n * K, size_t(K) * 4);
    const float same = a.decay == NONE ? 0.0f : a.decay == CHANNEL ? 0.0f : a.g[a.g_per_head ? head : n];
    const vec faded = exp(splat(same));
    for (int c = 0; c < Kp; c += LANES) store(fade + c, a.decay == CHANNEL ? exp(load(fade + c)) : faded);
    const float *S = a.kv + n * K * V, beta = a.beta ? a.beta[n] : 1.0f;
    float* out = a.kv_out + n * K * V;
    int i = 0;
    constexpr int WIDE = LANES == 8 ? 8 : 4;  // 64 columns
    for (; i + WIDE * LANES <= V; i += WIDE * LANES) step_strip<WIDE>(a, S, out, fade, k, v, beta, q, o, i, LANES);
    for (; i < V; i += LANES) step_strip<1>(a, S, out, fade, k, v, beta, q, o, i, least(LANES, V - i));
    if (a.normalize != PLAIN) {
      float* z = a.z_out + n * K;
      for (int c = 0; c < K; ++c) z[c] = a.z[n * K + c] * fade[c] + k[c];
      for (int g = 0; g < G; ++g) {
        float d = 0;
        for (int c = 0; c < K; ++c) d += z[c] * q[g * Kp + c];
        const float inverse = 1.0f / denominator(d, a.normalize, a.eps);
        for (int j = 0; j < Vp; j += LANES) store(o + g * Vp + j, load(o + g * Vp + j) * inverse);
      }
    }
    for (int g = 0; g < G; ++g) store_row(o + g * Vp, static_cast<char*>(a.o) + (m + g) * V * size, a.bf16, V, 1.0f, false);
  }
}

static size_t step_scratch(const Step& a) { return 3 * pad(a.K) + 2 * pad(a.V) + a.G * (pad(a.K) + pad(a.V)) + 64; }

}  // namespace linattn::LINATTN_ISA

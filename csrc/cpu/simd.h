// The only file that knows the vector width: GCC vector extensions, one source for AVX-512, AVX2 and plain builds.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define STAGE static __attribute__((noinline))  // a stage works on a whole chunk: one copy of it costs nothing at run time

namespace linattn::LINATTN_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));

INLINE vec load(const float* p) {
  vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float* p, vec x) { __builtin_memcpy(p, &x, sizeof x); }

// To memory past the caches; p is aligned to a vector. `drain` before another thread may read it.
INLINE void stream(float* p, vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}
INLINE void drain() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

INLINE vec splat(float x) { return x - vec{}; }

INLINE ivec iota() {
  ivec x;
  for (int i = 0; i < LANES; ++i) x[i] = i;
  return x;
}

INLINE float sum(vec x) {
#pragma GCC unroll 4
  for (int d = LANES / 2; d; d /= 2) x += __builtin_shuffle(x, iota() ^ d);
  return x[0];
}

// w · a in lanes below n, w in the others.
INLINE vec multiply_below(vec w, float a, int n) {
#if defined(__AVX512F__)
  return (vec)_mm512_mask_mul_ps((__m512)w, (__mmask16)(n < 0 ? 0u : (1u << n) - 1), (__m512)w, _mm512_set1_ps(a));
#else
  return iota() < n ? w * a : w;
#endif
}

// e^x for x <= 0 to 1 ulp or so; 0 below -87.3 (also for -inf), NaN for NaN.
INLINE vec exp(vec x) {
  const vec low = splat(-87.33654f), magic = splat(12582912.0f);  // 1.5 · 2^23: adding it leaves the rounded integer in the low bits
  vec t = x * 1.44269504f + magic;
  vec n = t - magic;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vec two_n = (vec)(((uvec)t << 23) + (127u << 23));
  return x < low ? vec{} : p * two_n;  // what came out below `low` means nothing
}

struct bf16 {
  uint16_t bits;
};

INLINE float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
INLINE float widen(float x) { return x; }
INLINE vec load(const bf16* p) {
  hvec h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
}

INLINE uvec round_bits(vec x) {  // to nearest even; NaN stays NaN
  uvec b = (uvec)x;
  uvec r = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return x == x ? r : (uvec)(uvec{} + 0x7fc0u);
}
INLINE void store(bf16* p, vec x) {
  hvec h = __builtin_convertvector(round_bits(x), hvec);
  __builtin_memcpy(p, &h, sizeof h);
}
INLINE void narrow(float* p, float x) { *p = x; }
INLINE void narrow(bf16* p, float x) {
  uint32_t b;
  __builtin_memcpy(&b, &x, 4);
  p->bits = x == x ? uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
}

// Transpose a LANES × LANES block in registers: log2(LANES) rounds of pairwise exchanges.
INLINE void transpose_block(vec (&x)[LANES]) {
#pragma GCC unroll 4
  for (int d = LANES / 2; d; d /= 2) {
    ivec low, high;
    for (int i = 0; i < LANES; ++i) {
      low[i] = i & d ? LANES + i - d : i;
      high[i] = i & d ? LANES + i : i + d;
    }
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r)
      if (!(r & d)) {
        vec a = x[r], b = x[r + d];
        x[r] = __builtin_shuffle(a, b, low);
        x[r + d] = __builtin_shuffle(a, b, high);
      }
  }
}

// Lane n: the sum over all lanes of x[n]. x is used up.
INLINE vec sums(vec (&x)[LANES]) {
  transpose_block(x);
  vec all = x[0];
#pragma GCC unroll 16
  for (int r = 1; r < LANES; ++r) all += x[r];
  return all;
}

// out[n][m] = in[m][n] for M, N multiples of 16.
STAGE void transpose(const float* in, int ldi, int M, int N, float* out, int ldo) {
  for (int m = 0; m < M; m += LANES)
    for (int n = 0; n < N; n += LANES) {
      vec x[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r) x[r] = load(in + (m + r) * ldi + n);
      transpose_block(x);
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r) store(out + (n + r) * ldo + m, x[r]);
    }
}

struct Nothing {
  INLINE_MEMBER void ask() {}
};

// -- small dense products: everything the chunk skeleton multiplies ------------------------------------------------------------------

// acc[m][n] += Σ_k A[m·am + k·ak] · B[k·ldb + n]: a register block, A broadcast, B in vectors. `depth` is a multiple of 4. Every so many
// products `ahead`, if there is one, asks for memory.
constexpr int BETWEEN = LANES == 16 ? 4 : 16;

template <int MR, int NV, class Ahead = Nothing>
INLINE void multiply(vec (&acc)[MR][NV], int depth, const float* A, long am, long ak, const float* B, long ldb, Ahead* ahead = nullptr) {
  for (int four = 0; four < depth; four += 4) {
    if (ahead && four % BETWEEN == 0) ahead->ask();
#pragma GCC unroll 4
    for (int k = four; k < four + 4; ++k) {
      vec b[NV];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) b[n] = load(B + k * ldb + n * LANES);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const float a = A[m * am + k * ak];
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) acc[m][n] += a * b[n];
      }
    }
  }
}

// Visit an M × N result (multiples of 16) in register blocks: f.operator()<MR, NV>(m, n).
template <class F>
INLINE void blocks(int M, int N, F&& f) {
  constexpr int WIDE = LANES == 16 ? 4 : 2;
  int n = 0;
  for (; n + WIDE * LANES <= N; n += WIDE * LANES)
    for (int m = 0; m < M; m += 4) f.template operator()<4, WIDE>(m, n);
  if constexpr (LANES == 16) {
    if (N - n == 3 * LANES)
      for (int m = 0; m < M; m += 4) f.template operator()<4, 3>(m, n);
    if (N - n == 2 * LANES)
      for (int m = 0; m < M; m += 8) f.template operator()<8, 2>(m, n);
    if (N - n == LANES)
      for (int m = 0; m < M; m += 16) f.template operator()<16, 1>(m, n);
  }
}

}  // namespace linattn::LINATTN_ISA

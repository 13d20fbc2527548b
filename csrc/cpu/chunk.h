// The stages of one chunk, as in linattn/reference/chunked.py: write, emit, carry; its gate is in gate.h.
#pragma once
#include "gate.h"

namespace linattn::LINATTN_ISA {

// out[r] = factor_r · in[r], with the factor per token or per channel.
STAGE void scale_rows(const float* in, const float* factor, float* out, int ld) {
  for (int r = 0; r < C; ++r)
    for (int i = 0; i < ld; i += LANES) store(out + r * ld + i, load(in + r * ld + i) * factor[r]);
}
STAGE void scale_tile(const float* in, const float* factor, float* out, int ld) {
  for (int i = 0; i < C * ld; i += LANES) store(out + i, load(in + i) * load(factor + i));
}

// [rows C]: column j times factor_j.
STAGE void scale_columns(float* x, int rows, const float* factor) {
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < C; j += LANES) store(x + r * C + j, load(x + r * C + j) * load(factor + j));
}

// -- scores ----------------------------------------------------------------------------------------------------------------------------

enum Shape { ALL, TRANSPOSED, LOWER, LOWER_TRANSPOSED };  // what a [C C] matrix holds: all, or nothing above its diagonal

// P[i][j] = x_i · y_j, y given transposed [depth C]; plus bias_i and then times D, where those are given. LOWER: what is above the diagonal
// need not be there.
STAGE void products(const float* x, int depth, const float* yT, const float* D, const float* bias, Shape shape, float* P) {
  const auto block = [=]<int MR, int NV>(int m, int n) {
    vec acc[MR][NV] = {};
    multiply(acc, depth, x + m * depth, depth, 1, yT + n, C);
    for (int r = 0; r < MR; ++r)
      for (int l = 0; l < NV; ++l) {
        const int at = (m + r) * C + n + l * LANES;
        vec p = bias ? acc[r][l] + bias[m + r] : acc[r][l];
        store(P + at, D ? p * load(D + at) : p);
      }
  };
  if (LANES == 8 && shape == LOWER) {
    block.template operator()<8, 1>(0, 0);
    block.template operator()<4, 2>(8, 0);
    block.template operator()<4, 2>(12, 0);
    for (int r = 0; r < 8; ++r) store(P + r * C + C - LANES, vec{});
  } else {
    blocks(C, C, block);
  }
}

// -- write: the delta rule's unit lower triangular system (I + M) u = r, M strictly lower ------------------------------------------------

// A block of rows at a time: what the rows solved before leave of it, then its own triangle. The transposed system goes from the last row up.
template <bool TRANSPOSED>
INLINE void solve_rows(const float* M, float* u, int ld) {
  constexpr int R = 4, NV = LANES == 16 ? 1 : 2;
  const long am = TRANSPOSED ? 1 : C, ak = TRANSPOSED ? C : 1;
  for (int n = 0; n < ld; n += NV * LANES)
    for (int block = 0; block < C; block += R) {
      const int m = TRANSPOSED ? C - R - block : block, from = TRANSPOSED ? m + R : 0;
      vec done[R][NV] = {}, x[R][NV];
      multiply(done, block, M + m * am + from * ak, am, ak, u + from * ld + n, ld);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int l = 0; l < NV; ++l) x[r][l] = load(u + (m + r) * ld + n + l * LANES) - done[r][l];
#pragma GCC unroll 4
      for (int k = 0; k < R; ++k) {
        const int j = TRANSPOSED ? R - 1 - k : k;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int l = 0; l < NV; ++l)
            if (TRANSPOSED ? r < j : r > j) x[r][l] -= M[(m + r) * am + (m + j) * ak] * x[j][l];
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int l = 0; l < NV; ++l) store(u + (m + r) * ld + n + l * LANES, x[r][l]);
    }
}

STAGE void solve(const float* M, bool transposed, float* u, int ld) { transposed ? solve_rows<true>(M, u, ld) : solve_rows<false>(M, u, ld); }

// -- carry -----------------------------------------------------------------------------------------------------------------------------

// S = across · S + Σ_j x_j y_jᵀ (+ Σ_j more_x_j more_y_jᵀ) for S [M N], read from `from` where that is given; `across` is one number, or one
// per row or column of S. x is [C M], or [M C] if it comes transposed. One pass over S.
struct Across {
  float all;
  const float *row = nullptr, *column = nullptr;
};

STAGE void carry(float* S, int M, int N, Across across, const float* x, bool transposed, const float* y, Ahead* ahead = nullptr,
                 const float* from = nullptr, const float* more_x = nullptr, const float* more_y = nullptr) {
  const long am = transposed ? C : 1, ak = transposed ? 1 : M;
  if (!from) from = S;
  blocks(M, N, [=]<int MR, int NV>(int m, int n) {
    const int block = m * N + n;
    vec acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const float a = across.row ? across.row[m + r] : across.all;
#pragma GCC unroll 4
      for (int l = 0; l < NV; ++l) acc[r][l] = load(from + block + r * N + l * LANES) * (across.column ? load(across.column + n + l * LANES) : splat(a));
    }
    multiply(acc, C, x + m * am, am, ak, y + n, N, ahead);
    if (more_x) multiply(acc, C, more_x + m, 1, M, more_y + n, N);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < NV; ++l) store(S + block + r * N + l * LANES, acc[r][l]);
  });
}

// z = across · z + Σ_j weight_j x_j, the weights null for ones.
STAGE void carry_z(float* z, int Kp, float across, const float* across_k, const float* x, const float* weight) {
  for (int c = 0; c < Kp; c += LANES) {
    vec acc = load(z + c) * (across_k ? load(across_k + c) : splat(across));
    for (int j = 0; j < C; ++j) acc += load(x + j * Kp + c) * (weight ? weight[j] : 1.0f);
    store(z + c, acc);
  }
}

INLINE float dot(const float* x, const float* y, int n) {
  vec acc = {};
  for (int i = 0; i < n; i += LANES) acc += load(x + i) * load(y + i);
  return sum(acc);
}

// out_r = x_r · y_r, rows of `ld`: summed across lanes for a block of rows at once.
STAGE void dots(const float* x, const float* y, int ld, float* out) {
  for (int block = 0; block < C; block += LANES) {
    vec acc[LANES];
    for (int r = 0; r < LANES; ++r) {
      acc[r] = vec{};
      for (int i = 0; i < ld; i += LANES) acc[r] += load(x + (block + r) * ld + i) * load(y + (block + r) * ld + i);
    }
    store(out + block, sums(acc));
  }
}

// acc += rows m … m + MR of P u, or of Pᵀ u.
template <int MR, int NV>
INLINE void inside(vec (&acc)[MR][NV], const float* P, Shape shape, int m, const float* u, int ld) {
  if (shape == LOWER_TRANSPOSED)  // column m starts at row m
    multiply(acc, C - m, P + m * C + m, 1, C, u + m * ld, ld);
  else if (shape == TRANSPOSED)
    multiply(acc, C, P + m, 1, C, u, ld);
  else
    multiply(acc, shape == LOWER ? m + MR : C, P + m * C, C, 1, u, ld);
}

// out_i = fade_i · x_i S + Σ_j P[i][j] u_j for S [M N], or the transpose of P, or no P; fade null for ones.
STAGE void emit(const float* x, int M, const float* S, int N, const float* fade, const float* P, Shape shape, const float* u, float* out,
                int64_t ldo, Ahead* ahead = nullptr) {
  blocks(C, N, [=]<int MR, int NV>(int m, int n) {
    vec acc[MR][NV] = {};
    multiply(acc, M, x + m * M, M, 1, S + n, N, ahead);
    if (fade)
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int l = 0; l < NV; ++l) acc[r][l] *= fade[m + r];
    if (P) inside(acc, P, shape, m, u + n, N);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < NV; ++l) store(out + (m + r) * ldo + n + l * LANES, acc[r][l]);
  });
}

// out_i = fade_i · S x_i for S [M N], x transposed, [N C]: as `emit`, against the grain of S. wide is scratch, [M C].
STAGE void emit_across(const float* xT, int N, const float* S, int M, const float* fade, float* wide, float* out, Ahead* ahead = nullptr) {
  blocks(M, C, [=]<int MR, int NV>(int m, int n) {
    vec acc[MR][NV] = {};
    multiply(acc, N, S + m * N, N, 1, xT + n, C, ahead);
    for (int r = 0; r < MR; ++r)
      for (int l = 0; l < NV; ++l) store(wide + (m + r) * C + n + l * LANES, fade ? acc[r][l] * load(fade + n + l * LANES) : acc[r][l]);
  });
  transpose(wide, C, M, C, out, M);
}

INLINE float denominator(float d, Normalize kind, float eps) { return kind == SUM ? d + eps : d < eps ? eps : d; }

}  // namespace linattn::LINATTN_ISA

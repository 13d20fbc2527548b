// The stages of one chunk, as in linattn/reference/chunked.py: gate, write, emit, carry. Tiles are float32, padded to 16, in scratch.
#pragma once
#include "args.h"
#include "simd.h"

namespace linattn::LINATTN_ISA {

INLINE int pad(int64_t width) { return int((width + 15) & ~int64_t(15)); }
INLINE int least(int64_t a, int64_t b) { return int(a < b ? a : b); }

// Scratch is one block per thread, handed out piece by piece.
struct Scratch {
  float* next;
  float* take(size_t floats) {
    float* p = next;
    next += (floats + 15) & ~size_t(15);
    return p;
  }
};

// What the walk over one head of one sequence (or a segment of it) looks like. Positions count along the walk, tokens along time.
struct Walk {
  int64_t b, h, first, length;  // batch entry, head, first token, tokens
  int64_t boundary;             // first row of this sequence's boundary record
  int direction;                // index of the scan direction: 0 from the left, 1 from the right
  bool reverse;                 // time runs against the walk
  bool leaving;                 // a token pays its gate on leaving
  float own;                    // weight of a token's own term
  int64_t token(int64_t position) const { return reverse ? first + length - 1 - position : first + position; }
  int64_t step() const { return reverse ? -1 : 1; }
};

// The rows of one chunk, along the walk.
struct Span {
  char* p;
  bool bf16;
  int64_t step;  // elements from row to row
};

INLINE Span span(const Rows& x, const Walk& w, int64_t position, int64_t h) {
  return {x.p + (w.b * x.b + w.token(position) * x.t + h * x.h) * (x.bf16 ? 2 : 4), x.bf16, w.step() * x.t};
}

template <class T>
INLINE void load_typed(const T* x, int width, float factor, float* y) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) store(y + i, load(x + i) * factor);
  for (; i < width; ++i) y[i] = widen(x[i]) * factor;
  for (; i < pad(width); ++i) y[i] = 0;
}

// y = factor · x, zero-padded to a multiple of 16.
INLINE void load_row(const char* x, bool is_bf16, int width, float factor, float* y) {
  is_bf16 ? load_typed(reinterpret_cast<const bf16*>(x), width, factor, y) : load_typed(reinterpret_cast<const float*>(x), width, factor, y);
}

template <class T>
INLINE void store_typed(const float* x, int width, float factor, T* y, bool add) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) store(y + i, add ? load(x + i) * factor + load(y + i) : load(x + i) * factor);
  for (; i < width; ++i) narrow(y + i, x[i] * factor + (add ? widen(y[i]) : 0.0f));
}

// y = factor · x, or is added to.
INLINE void store_row(const float* x, char* y, bool is_bf16, int width, float factor, bool add) {
  is_bf16 ? store_typed(x, width, factor, reinterpret_cast<bf16*>(y), add) : store_typed(x, width, factor, reinterpret_cast<float*>(y), add);
}

// tile[r] = factor · row r, zero-padded to C rows of `ld` floats.
STAGE void load_rows(Span x, int rows, int width, float factor, float* tile, int ld) {
  for (int r = 0; r < rows; ++r) load_row(x.p + r * x.step * (x.bf16 ? 2 : 4), x.bf16, width, factor, tile + r * ld);
  for (int i = rows * ld; i < C * ld; i += LANES) store(tile + i, vec{});
}

STAGE void store_rows(const float* tile, int ld, int rows, int width, float factor, Span y, bool add) {
  for (int r = 0; r < rows; ++r) store_row(tile + r * ld, y.p + r * y.step * (y.bf16 ? 2 : 4), y.bf16, width, factor, add);
}

// Rows to be read soon. A core has a dozen or so misses in flight: they are asked for a few at a time, between register blocks.
struct Ahead {
  Span x;
  int bytes;
  // the rows that fall to [m, m + MR) of M blocks of work
  INLINE_MEMBER void ask(int m, int MR, int M) const {
    for (int r = m * C / M; r < (m + MR) * C / M; ++r)
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(x.p + r * x.step * (x.bf16 ? 2 : 4) + i, 0, 2);
  }
};

INLINE Ahead ahead_of(const Rows& x, const Walk& w, int64_t position, int64_t h, int64_t width) {
  return {span(x, w, position, h), int(width) * (x.bf16 ? 2 : 4)};
}

// -- gate: the only part that knows the decay kinds ------------------------------------------------------------------------------------

struct Gate {
  // none, head, scalar: one number per token
  alignas(64) float seen[C], kept[C];  // e^ℓ_i: how the state before the chunk has faded; e^(L − ℓ_j): what is left at its end
  alignas(64) float D[C * C];          // e^(ℓ_i − ℓ_j) below the diagonal, `own` on it, and above it 0 or, for FULL, the other direction
  float across;                        // e^L
  // channel: one number per token and channel, in tiles [C Kp]
  float *a, *seen_k, *kept_k, *across_k;
};

enum Intra { TRIANGLE, NOTHING, FULL };

// All fadings of a chunk from a_i = e^(log decay): a row of D is the row before it times one a. Only products of numbers <= 1, so that
// neither a decay of -inf nor a long sum of them costs an accuracy that the token by token form would keep.
STAGE void scalar_gate(Gate& gate, const float* g, bool leaving, float own, Intra intra, bool right_leaving) {
  alignas(64) float a[C];
  for (int i = 0; i < C; i += LANES) store(a + i, exp(load(g + i)));
  for (int j = 0; j < C; j += LANES) {
    vec below = {}, above = {};
    for (int i = 0; i < C; ++i) {
      if (i) below = multiply_below(below, a[leaving ? i - 1 : i], i - j);
      below = iota() + j == i ? splat(1.0f) : below;
      store(gate.D + i * C + j, below);
    }
    const vec last = load(gate.D + (C - 1) * C + j);
    store(gate.kept + j, leaving ? last * a[C - 1] : last);
    if (intra != FULL) continue;
    for (int i = C - 1; i >= 0; --i) {  // seen from the right, where leaving and entering change places in time
      above = above * a[right_leaving && i < C - 1 ? i + 1 : i];
      above = iota() + j == i ? splat(1.0f) : above;
      const vec row = load(gate.D + i * C + j);
      store(gate.D + i * C + j, iota() + j > i ? above : row);
    }
  }
  for (int i = 0; i < C; ++i) gate.seen[i] = leaving ? gate.D[i * C] : gate.D[i * C] * a[0];
  gate.across = gate.kept[0] * (leaving ? 1.0f : a[0]);
  for (int i = 0; i < C; ++i) gate.D[i * C + i] = own;
}

STAGE void channel_gate(Gate& gate, Span g, int rows, int K, int Kp, bool leaving) {
  load_rows(g, rows, K, 1.0f, gate.a, Kp);
  for (int c = 0; c < Kp; c += LANES) {
    vec all = splat(1.0f);
    for (int i = 0; i < C; ++i) {
      const vec a = exp(load(gate.a + i * Kp + c));
      store(gate.a + i * Kp + c, a);
      store(gate.seen_k + i * Kp + c, leaving ? all : all * a);
      all *= a;
    }
    store(gate.across_k + c, all);
    vec rest = splat(1.0f);
    for (int i = C - 1; i >= 0; --i) {
      const vec a = load(gate.a + i * Kp + c);
      store(gate.kept_k + i * Kp + c, leaving ? rest * a : rest);
      rest *= a;
    }
  }
}

// A contiguous float32 [B T H width] tensor of one number, or `width`, per token and head.
INLINE Span gate_span(const float* x, const Call& a, const Walk& w, int64_t position, int64_t width) {
  return span({reinterpret_cast<char*>(const_cast<float*>(x)), false, a.T * a.H * width, a.H * width, width}, w, position, w.h);
}

INLINE void set_gate(Gate& gate, const Call& a, const Walk& w, int64_t position, int rows, Intra intra, bool right_leaving, int Kp) {
  if (a.decay == CHANNEL) return channel_gate(gate, gate_span(a.g, a, w, position, a.K), rows, int(a.K), Kp, w.leaving);
  float g[C] = {};
  for (int r = 0; r < rows; ++r)
    if (a.decay != NONE) g[r] = a.decay == HEAD ? a.g[w.h] : a.g[(w.b * a.T + w.token(position + r)) * a.H + w.h];
  scalar_gate(gate, g, w.leaving, w.own, intra, right_leaving);
}

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

// P[i][j] = x_i · y_j, y given transposed [depth C]; times D where D is given, plus bias_i where that is.
STAGE void products(const float* x, int depth, const float* yT, const float* D, const float* bias, float* P) {
  blocks(C, C, [=]<int MR, int NV>(int m, int n) {
    vec acc[MR][NV] = {};
    multiply(acc, depth, x + m * depth, depth, 1, yT + n, C);
    for (int r = 0; r < MR; ++r)
      for (int l = 0; l < NV; ++l) {
        const int at = (m + r) * C + n + l * LANES;
        vec p = bias ? acc[r][l] + bias[m + r] : acc[r][l];
        store(P + at, D ? p * load(D + at) : p);
      }
  });
}

// Keep what lies below the diagonal, times `own` on it: for channel decays, whose fading is inside the products.
STAGE void keep_triangle(float* P, float own) {
  for (int i = 0; i < C; ++i)
    for (int j = 0; j < C; j += LANES) {
      const ivec lane = iota() + j;
      const vec p = load(P + i * C + j);
      store(P + i * C + j, lane < i ? p : lane == i ? p * own : vec{});
    }
}

// P[i][j] = Σ_c x_i[c] y_j[c] · (channel c's fading from j to i), for i >= j; multiplied up token by token, so that no exponent is formed.
STAGE void channel_products(const float* x, const float* yT, const Gate& gate, bool leaving, int Kp, float own, float* P) {
  for (int j = 0; j < C; j += LANES) {
    vec acc[C] = {};
    for (int c = 0; c < Kp; ++c) {
      vec w = load(yT + c * C + j);
#pragma GCC unroll 16
      for (int i = 0; i < C; ++i) {
        const int below = i - j < 0 ? 0 : i - j < LANES ? i - j : LANES;
        if (below) w = multiply_below(w, gate.a[(leaving ? i - 1 : i) * Kp + c], below);
        acc[i] += x[i * Kp + c] * w;
      }
    }
    for (int i = 0; i < C; ++i) store(P + i * C + j, acc[i]);
  }
  keep_triangle(P, own);
}

// out_i += Σ_{j <= i} P[i][j] y_j, faded channel by channel on the way from j to i.
STAGE void channel_gather(const float* P, const float* y, const Gate& gate, bool leaving, int Kp, float* out) {
  for (int c = 0; c < Kp; c += LANES) {
    vec w[C];
    for (int i = 0; i < C; ++i) {
      const vec a = i ? load(gate.a + (leaving ? i - 1 : i) * Kp + c) : vec{};
      vec acc = load(out + i * Kp + c);
      for (int j = 0; j < i; ++j) {
        w[j] *= a;
        acc += P[i * C + j] * w[j];
      }
      w[i] = load(y + i * Kp + c);
      store(out + i * Kp + c, acc + P[i * C + i] * w[i]);
    }
  }
}

// out_j += Σ_{i >= j} P[i][j] x_i, faded channel by channel on the way from j to i: the transpose of channel_gather.
STAGE void channel_scatter(const float* P, const float* x, const Gate& gate, bool leaving, int Kp, float* out) {
  for (int c = 0; c < Kp; c += LANES) {
    vec w[C];
    for (int j = C - 1; j >= 0; --j) {
      const vec a = j < C - 1 ? load(gate.a + (leaving ? j : j + 1) * Kp + c) : vec{};
      vec acc = load(out + j * Kp + c);
      for (int i = j + 1; i < C; ++i) {
        w[i] *= a;
        acc += P[i * C + j] * w[i];
      }
      w[j] = load(x + j * Kp + c);
      store(out + j * Kp + c, acc + P[j * C + j] * w[j]);
    }
  }
}

// -- write: the delta rule's unit lower triangular system (I + M) u = r, M strictly lower ------------------------------------------------

STAGE void solve(const float* M, bool transposed, float* u, int ld) {
  for (int n = 0; n < ld; n += LANES) {
    vec x[C];
    for (int i = 0; i < C; ++i) x[i] = load(u + i * ld + n);
    if (transposed) {
      for (int j = C - 1; j > 0; --j)
        for (int i = 0; i < j; ++i) x[i] -= M[j * C + i] * x[j];
    } else {
      for (int j = 0; j < C - 1; ++j)
        for (int i = j + 1; i < C; ++i) x[i] -= M[i * C + j] * x[j];
    }
    for (int i = 0; i < C; ++i) store(u + i * ld + n, x[i]);
  }
}

// -- carry -----------------------------------------------------------------------------------------------------------------------------

// S = across · S + Σ_j x_j y_jᵀ; across is one number, or one per row of S. x is [C Kp], or [Kp C] if it comes transposed. One pass over S.
STAGE void carry(float* S, int Kp, int Vp, float across, const float* across_k, const float* x, bool transposed, const float* y,
                 const Ahead* ahead = nullptr, int count = 0) {
  const long am = transposed ? C : 1, ak = transposed ? 1 : Kp;
  blocks(Kp, Vp, [=]<int MR, int NV>(int m, int n) {
    float* block = S + m * Vp + n;
    vec acc[MR][NV];
    for (int i = 0; i < count && n == 0; ++i) ahead[i].ask(m, MR, Kp);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const float a = across_k ? across_k[m + r] : across;
#pragma GCC unroll 4
      for (int l = 0; l < NV; ++l) acc[r][l] = load(block + r * Vp + l * LANES) * a;
    }
    multiply(acc, C, x + m * am, am, ak, y + n, Vp);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < NV; ++l) store(block + r * Vp + l * LANES, acc[r][l]);
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

// out_i = fade_i · x_i S + Σ_j P[i][j] u_j with P full, lower triangular (or absent); fade null for ones.
STAGE void emit(const float* x, int Kp, const float* S, int Vp, const float* fade, const float* P, bool triangular, const float* u, float* out,
                int64_t ldo, const Ahead* ahead = nullptr) {
  blocks(C, Vp, [=]<int MR, int NV>(int m, int n) {
    vec acc[MR][NV] = {};
    if (ahead && n == 0) ahead->ask(m, MR, C);
    multiply(acc, Kp, x + m * Kp, Kp, 1, S + n, Vp);
    if (fade)
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int l = 0; l < NV; ++l) acc[r][l] *= fade[m + r];
    if (P) multiply(acc, triangular ? m + MR : C, P + m * C, C, 1, u + n, Vp);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < NV; ++l) store(out + (m + r) * ldo + n + l * LANES, acc[r][l]);
  });
}

INLINE float denominator(float d, Normalize kind, float eps) { return kind == SUM ? d + eps : d < eps ? eps : d; }

// Contiguous [rows width] in memory to and from padded [rows_p ld] tiles.
STAGE void load_state(const float* from, int rows, int width, float* to, int rows_p, int ld) {
  for (int r = 0; r < rows_p; ++r)
    for (int i = 0; i < ld; ++i) to[r * ld + i] = r < rows && i < width ? from[r * width + i] : 0.0f;
}
STAGE void store_state(const float* from, int ld, int rows, int width, float* to) {
  for (int r = 0; r < rows; ++r) __builtin_memcpy(to + r * width, from + r * ld, size_t(width) * 4);
}

}  // namespace linattn::LINATTN_ISA

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
  bool stream = false;
};

INLINE Span span(const Rows& x, const Walk& w, int64_t position, int64_t h) {
  return {x.p + (w.b * x.b + w.token(position) * x.t + h * x.h) * (x.bf16 ? 2 : 4), x.bf16, w.step() * x.t, x.stream};
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
  if (y.stream && !add) {
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < width; i += LANES) stream(reinterpret_cast<float*>(y.p) + r * y.step + i, load(tile + r * ld + i) * factor);
    return;
  }
  for (int r = 0; r < rows; ++r) store_row(tile + r * ld, y.p + r * y.step * (y.bf16 ? 2 : 4), y.bf16, width, factor, add);
}

// Rows of the next chunk, of one tensor or two, asked for a line at a time, between products: a core has a dozen or so misses in flight,
// and more at once would hold up the loads of the state.
struct Ahead {
  const char* line[2];
  int64_t jump[2];  // bytes from the end of a row to the next
  int lines[2], done[2] = {}, rows[2] = {C, C}, count = 0;
  INLINE_MEMBER Ahead& also(Span x, int64_t width) {
    const int bytes = int(width) * (x.bf16 ? 2 : 4);
    line[count] = x.p, lines[count] = (bytes + 63) / 64;
    jump[count] = x.step * (x.bf16 ? 2 : 4) - lines[count] * 64;
    ++count;
    return *this;
  }
  INLINE_MEMBER void ask() {
    for (int n = 0; n < count; ++n) {
      if (!rows[n]) continue;
      __builtin_prefetch(line[n], 0, 2);
      line[n] += 64;
      if (++done[n] == lines[n]) line[n] += jump[n], done[n] = 0, --rows[n];
    }
  }
};

// -- gate: the only part that knows the decay kinds ------------------------------------------------------------------------------------

struct Gate {
  // none, head, scalar: one number per token
  alignas(64) float seen[C], kept[C];  // e^ℓ_i: how the state before the chunk has faded; e^(L − ℓ_j): what is left at its end
  alignas(64) float D[C * C];          // e^(ℓ_i − ℓ_j) below the diagonal, `own` on it, and above it 0 or, for FULL, the other direction
  float across;                        // e^L
  // channel: one number per token and channel, in tiles [C Kp]
  float *a, *seen_k, *kept_k, *across_k;
};

enum Intra { TRIANGLE, NOTHING, FULL, WHOLE };  // WHOLE: the state is of all tokens, so there is nothing inside and nothing to carry

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

// S = across · S + Σ_j x_j y_jᵀ for S [M N]; `across` is one number, or one per row or column of S. x is [C M], or [M C] if it comes
// transposed. One pass over S.
struct Across {
  float all;
  const float *row = nullptr, *column = nullptr;
};

STAGE void carry(float* S, int M, int N, Across across, const float* x, bool transposed, const float* y, Ahead* ahead = nullptr) {
  const long am = transposed ? C : 1, ak = transposed ? 1 : M;
  blocks(M, N, [=]<int MR, int NV>(int m, int n) {
    float* block = S + m * N + n;
    vec acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const float a = across.row ? across.row[m + r] : across.all;
#pragma GCC unroll 4
      for (int l = 0; l < NV; ++l) acc[r][l] = load(block + r * N + l * LANES) * (across.column ? load(across.column + n + l * LANES) : splat(a));
    }
    multiply(acc, C, x + m * am, am, ak, y + n, N, ahead);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < NV; ++l) store(block + r * N + l * LANES, acc[r][l]);
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
    transpose_block(acc);
    vec all = acc[0];
#pragma GCC unroll 16
    for (int r = 1; r < LANES; ++r) all += acc[r];
    store(out + block, all);
  }
}

enum Shape { ALL, LOWER, LOWER_TRANSPOSED };

// out_i = fade_i · x_i S + Σ_j P[i][j] u_j for S [M N], with P full, lower triangular, the transpose of that, or absent; fade null for ones.
STAGE void emit(const float* x, int M, const float* S, int N, const float* fade, const float* P, Shape shape, const float* u, float* out,
                int64_t ldo, bool streams = false, Ahead* ahead = nullptr) {
  blocks(C, N, [=]<int MR, int NV>(int m, int n) {
    vec acc[MR][NV] = {};
    multiply(acc, M, x + m * M, M, 1, S + n, N, ahead);
    if (fade)
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int l = 0; l < NV; ++l) acc[r][l] *= fade[m + r];
    if (P && shape == LOWER_TRANSPOSED)  // column m starts at row m
      multiply(acc, C - m, P + m * C + m, 1, C, u + m * N + n, N);
    else if (P)
      multiply(acc, shape == LOWER ? m + MR : C, P + m * C, C, 1, u + n, N);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < NV; ++l) {
        float* to = out + (m + r) * ldo + n + l * LANES;
        streams ? stream(to, acc[r][l]) : store(to, acc[r][l]);
      }
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

// A contiguous [K V] state in memory to and from a padded tile, [Kp Vp] or, where `transposed`, [Vp Kp].
STAGE void load_state(const float* from, int K, int V, bool transposed, float* to) {
  const int Kp = pad(K), Vp = pad(V);
  if (transposed && K == Kp && V == Vp) return transpose(from, V, K, V, to, K);
  for (int r = 0; r < Kp; ++r)
    for (int i = 0; i < Vp; ++i) to[transposed ? i * Kp + r : r * Vp + i] = r < K && i < V ? from[r * V + i] : 0.0f;
}
STAGE void store_state(const float* from, int K, int V, bool transposed, float* to) {
  const int Kp = pad(K), Vp = pad(V);
  if (transposed && K == Kp && V == Vp) return transpose(from, K, V, K, to, V);
  for (int r = 0; r < K; ++r)
    for (int i = 0; i < V; ++i) to[r * V + i] = from[transposed ? i * Kp + r : r * Vp + i];
}
STAGE void load_row_sums(const float* from, int K, float* to) {
  for (int r = 0; r < pad(K); ++r) to[r] = r < K ? from[r] : 0.0f;
}

}  // namespace linattn::LINATTN_ISA

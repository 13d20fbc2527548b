// How the tokens of a chunk fade: the only file that knows the decay kinds.
#pragma once
#include "rows.h"

namespace linattn::LINATTN_ISA {

constexpr int R = 4;  // tokens of a block inside a chunk

struct Gate {
  // none, head, scalar: one number per token
  alignas(64) float seen[C], kept[C];  // e^ℓ_i: how the state before the chunk has faded; e^(L − ℓ_j): what is left at its end
  alignas(64) float D[C * C];          // e^(ℓ_i − ℓ_j) below the diagonal, `own` on it, and above it 0 or, for FULL, the other direction
  float across;                        // e^L
  // channel: one number per token and channel, in tiles [C Kp]
  float *a, *seen_k, *kept_k, *across_k;  // a: e^(log decay) paid on the way from the token before
  // Inside a chunk it goes by blocks of R tokens: what the way from j to a token i of a later block leaves is tail_j, to the start of the
  // block after j's, times `whole` for every block between, times local_i, from the start of i's block. All <= 1.
  float *local, *tail, *whole;            // [C Kp], [C Kp], [C / R Kp]
  float *x, *y;                           // scratch, [C Kp]
  static size_t floats(size_t Kp) { return (7 * C + C / R + 1) * Kp; }
  Gate(int Kp, Scratch& s) {
    a = s.take(C * Kp), seen_k = s.take(C * Kp), kept_k = s.take(C * Kp), across_k = s.take(Kp);
    local = s.take(C * Kp), tail = s.take(C * Kp), whole = s.take(C / R * Kp), x = s.take(C * Kp), y = s.take(C * Kp);
  }
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
    vec gates[C + 1];  // of token i at i + 1
    gates[0] = splat(1.0f);
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) gates[i + 1] = exp(load(gate.a + i * Kp + c));
    const vec* paid = gates + !leaving;  // on the way from token i − 1 to i
    vec all = splat(1.0f), rest = splat(1.0f);
    for (int i = 0; i < C; ++i) {
      all *= paid[i];
      store(gate.seen_k + i * Kp + c, all);
    }
    store(gate.across_k + c, leaving ? all * gates[C] : all);
    for (int i = C - 1; i >= 0; --i) {
      rest = leaving || i < C - 1 ? rest * paid[i + 1] : rest;
      store(gate.kept_k + i * Kp + c, rest);
    }
    for (int block = 0; block < C; block += R) {
      vec local = splat(1.0f), tail = block + R < C ? paid[block + R] : splat(1.0f);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vec a = paid[block + r];
        store(gate.a + (block + r) * Kp + c, a);
        if (r) local *= a;
        store(gate.local + (block + r) * Kp + c, local);
      }
      store(gate.whole + block / R * Kp + c, local * tail);
#pragma GCC unroll 4
      for (int r = R - 1; r >= 0; --r) {
        store(gate.tail + (block + r) * Kp + c, tail);
        tail *= paid[block + r];
      }
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

// Keep what lies below the diagonal, times `own` on it: for channel decays, whose fading is inside the products.
STAGE void keep_triangle(float* P, float own) {
  for (int i = 0; i < C; ++i)
    for (int j = 0; j < C; j += LANES) {
      const ivec lane = iota() + j;
      const vec p = load(P + i * C + j);
      store(P + i * C + j, lane < i ? p : lane == i ? p * own : vec{});
    }
}

// -- channel decays inside a chunk -------------------------------------------------------------------------------------------------------

// P[i][j] = Σ_c x_i[c] y_j[c] · (channel c's fading from j to i) below the diagonal, times `own` on it, 0 above.
STAGE void channel_products(const float* x, const float* y, Gate& gate, int Kp, float own, float* P) {
  constexpr int COLUMNS = LANES / R;
  for (int i = R * Kp; i < C * Kp; i += LANES) store(gate.x + i, load(x + i) * load(gate.local + i));
  for (int i = 0; i < (C - R) * Kp; i += LANES) store(gate.y + i, load(y + i) * load(gate.tail + i));
  for (int i = R; i < C; i += R)
    for (int j = i - R; j >= 0; j -= R) {
      float* xs = gate.x + i * Kp;
      if (j < i - R)  // one whole block more lies between
        for (int r = 0; r < R * Kp; r += Kp)
          for (int c = 0; c < Kp; c += LANES) store(xs + r + c, load(xs + r + c) * load(gate.whole + (j / R + 1) * Kp + c));
      for (int n = 0; n < R; n += COLUMNS) {
        const float* ys = gate.y + (j + n) * Kp;
        vec acc[LANES] = {};
        for (int c = 0; c < Kp; c += LANES)
#pragma GCC unroll 4
          for (int l = 0; l < COLUMNS; ++l) {
            const vec b = load(ys + l * Kp + c);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r * COLUMNS + l] += load(xs + r * Kp + c) * b;
          }
        alignas(64) float all[LANES];
        store(all, sums(acc));
        for (int r = 0; r < R; ++r) __builtin_memcpy(P + (i + r) * C + j + n, all + r * COLUMNS, COLUMNS * sizeof(float));
      }
    }
  for (int i = 0; i < C; i += R) {  // a block with itself
    vec acc[R * R] = {};
    for (int c = 0; c < Kp; c += LANES) {
      vec w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vec a = load(gate.a + (i + r) * Kp + c), b = load(x + (i + r) * Kp + c);
        w[r] = load(y + (i + r) * Kp + c);
#pragma GCC unroll 4
        for (int l = 0; l < r; ++l) {
          w[l] *= a;
          acc[r * R + l] += b * w[l];
        }
        acc[r * R + r] += b * w[r];
      }
    }
    alignas(64) float all[R * R];
#pragma GCC unroll 4
    for (int n = 0; n < R * R; n += LANES) {
      vec part[LANES];
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) part[l] = acc[n + l];
      store(all + n, sums(part));
    }
    for (int r = 0; r < R; ++r) __builtin_memcpy(P + (i + r) * C + i, all + r * R, R * sizeof(float));
  }
  keep_triangle(P, own);
}

constexpr int WIDE = LANES == 16 ? 1 : 2;  // vectors of a block whose rows are R: Kp is a multiple of 16

// A block of sums, faded by one number per channel.
INLINE void fade_block(vec (&acc)[R][WIDE], const float* fade) {
#pragma GCC unroll 2
  for (int l = 0; l < WIDE; ++l) {
    const vec a = load(fade + l * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r][l] *= a;
  }
}

// out_i += Σ_{j <= i} P[i][j] y_j, faded channel by channel on the way from j to i.
STAGE void channel_gather(const float* P, const float* y, Gate& gate, int Kp, float* out) {
  for (int i = 0; i < (C - R) * Kp; i += LANES) store(gate.y + i, load(y + i) * load(gate.tail + i));
  for (int c = 0; c < Kp; c += WIDE * LANES)
    for (int i = 0; i < C; i += R) {
      vec acc[R][WIDE] = {};
      for (int j = 0; j < i; j += R) {
        if (j) fade_block(acc, gate.whole + j / R * Kp + c);
        multiply(acc, R, P + i * C + j, C, 1, gate.y + j * Kp + c, Kp);
      }
#pragma GCC unroll 2
      for (int l = 0; l < WIDE; ++l) {
        vec w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int at = (i + r) * Kp + c + l * LANES;
          const vec a = load(gate.a + at);
          vec all = load(out + at) + acc[r][l] * load(gate.local + at);
          w[r] = load(y + at);
#pragma GCC unroll 4
          for (int j = 0; j < r; ++j) {
            w[j] *= a;
            all += w[j] * P[(i + r) * C + i + j];
          }
          store(out + at, all + w[r] * P[(i + r) * C + i + r]);
        }
      }
    }
}

// out_j += Σ_{i >= j} P[i][j] x_i, faded channel by channel on the way from j to i: the transpose of channel_gather.
STAGE void channel_scatter(const float* P, const float* x, Gate& gate, int Kp, float* out) {
  for (int i = R * Kp; i < C * Kp; i += LANES) store(gate.x + i, load(x + i) * load(gate.local + i));
  for (int c = 0; c < Kp; c += WIDE * LANES)
    for (int j = 0; j < C; j += R) {
      vec acc[R][WIDE] = {};
      for (int i = C - R; i > j; i -= R) {
        multiply(acc, R, P + i * C + j, 1, C, gate.x + i * Kp + c, Kp);
        if (i > j + R) fade_block(acc, gate.whole + (i / R - 1) * Kp + c);
      }
#pragma GCC unroll 2
      for (int l = 0; l < WIDE; ++l) {
        vec w[R];
#pragma GCC unroll 4
        for (int r = R - 1; r >= 0; --r) {
          const int at = (j + r) * Kp + c + l * LANES;
          vec all = load(out + at) + acc[r][l] * load(gate.tail + at);
          w[r] = load(x + at);
#pragma GCC unroll 4
          for (int i = R - 1; i > r; --i) {
            w[i] *= load(gate.a + at + Kp);
            all += w[i] * P[(j + i) * C + j + r];
          }
          store(out + at, all + w[r] * P[(j + r) * C + j + r]);
        }
      }
    }
}

}  // namespace linattn::LINATTN_ISA

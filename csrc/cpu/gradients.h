// What the backward keeps, and its stages on a chunk.
#pragma once
#include "forward.h"

namespace linattn::LINATTN_ISA {

// carry → emit → write → gate, as in reference/chunked.py. S lives in the first walk, dS in the second; where the second needs S as well
// (delta rule; the value ⟨S, dS⟩ that pins the log-decay gradient) it takes the states kept every `anchor` tokens. All of them lie
// transposed here, [Vp Kp]: what the gradients of queries and keys read runs along key channels.
struct Gradients : Tiles {
  float *uT, *dn, *dd, *dP, *dq, *dk, *dk_read, *du, *wide, *stash;
  float *dS, *dz, *running, *anchors, *anchors_z, *group, *writes, *far, *far_z;  // of the head at hand
  float *all_dS, *all_dz, *heads;                                   // of all heads walked side by side
  int64_t anchor, marks;
  size_t state, per_head;
  Gate other;  // of the second direction, where two share a walk
  // Both directions of a decay that is one number per token, in two walks instead of four: see both.h.
  static bool shares(const Backward& a) { return !a.causal && !a.delta && a.decay != CHANNEL && !a.dbkv; }
  static bool keeps_writes(const Backward& a, int direction) { return a.delta && (a.dv.bf16 || direction == 1); }
  static int64_t anchor_of(const Backward& a) { return a.dbkv ? a.stride : ANCHOR; }
  static int64_t marks_of(const Backward& a) { return a.decay != NONE || a.delta ? a.T / anchor_of(a) + 2 : 0; }
  static size_t per_head_of(const Backward& a) {
    const size_t Kp = pad(a.K), Vp = pad(a.V);
    return Kp + marks_of(a) * (shares(a) ? 2 : 1) * (Kp * Vp + Kp) + (a.delta ? anchor_of(a) / C * Kp * Vp : 0) + (keeps_writes(a, !a.causal) ? (a.T + C) * Vp : 0);
  }
  Gradients(const Backward& a, Scratch& s) : Tiles(a, s), anchor(anchor_of(a)), marks(marks_of(a)), state(size_t(Kp) * Vp), per_head(per_head_of(a)), other(0, s) {
    uT = s.take(C * Vp), dn = s.take(C * Vp), dd = s.take(C), dP = s.take(C * C);
    dq = s.take(C * Kp), dk = s.take(C * Kp), dk_read = s.take(C * Kp), du = s.take(C * Vp), wide = s.take(C * Vp);
    stash = s.take(C * Kp);
    all_dS = s.take(state * a.width), all_dz = s.take(size_t(Kp) * a.width), heads = s.take(per_head * a.width);
    select(0);
  }
  static size_t floats(const Backward& a) {
    const size_t Kp = pad(a.K), Vp = pad(a.V);
    return Tiles::floats(a) + C * (4 * Kp + 4 * Vp + C + 1) + (Kp * Vp + Kp + per_head_of(a)) * a.width;
  }
  void select(int i) {
    Tiles::select(i);
    dS = all_dS + i * state, dz = all_dz + size_t(i) * Kp;
    running = heads + i * per_head;
    anchors = running + Kp, anchors_z = anchors + marks * state, group = anchors_z + marks * Kp;
    writes = group + anchor / C * state;  // there with the delta rule only, `writes` where `keeps_writes`
    far = group, far_z = far + marks * state;  // there where directions share a walk
  }
};

// dn = factor · gradient of the numerator, dd = factor · gradient of the row sum.
STAGE void load_grad(const Backward& a, const Walk& w, Gradients& s, int64_t p, int rows, int64_t h, float factor) {
  load_rows(span(a.grad, w, p, h), rows, int(a.V), factor, s.dn, s.Vp);
  for (int r = 0; r < C; ++r) s.dd[r] = 0;
  if (a.normalize == PLAIN) return;
  load_rows(span(a.o, w, p, h), rows, int(a.V), 1.0f, s.wide, s.Vp);
  for (int r = 0; r < rows; ++r) {
    const float d = a.d[(w.b * a.T + w.token(p + r)) * a.H * a.G + h], inverse = 1.0f / denominator(d, a.normalize, a.eps);
    for (int i = 0; i < s.Vp; i += LANES) store(s.dn + r * s.Vp + i, load(s.dn + r * s.Vp + i) * inverse);
    s.dd[r] = a.normalize == CLAMP && d <= a.eps ? 0.0f : -dot(s.dn + r * s.Vp, s.wide + r * s.Vp, s.Vp);
  }
}

// What a row sum's gradient adds to that of keys or queries, and the fading per channel: out_i = (out_i + weight_i z) · fade_i.
STAGE void finish_read(float* out, int Kp, const float* weight, const float* z, const float* fade_k) {
  for (int r = 0; r < C; ++r)
    for (int c = 0; c < Kp; c += LANES) {
      vec x = load(out + r * Kp + c);
      if (weight) x += load(z + c) * weight[r];
      store(out + r * Kp + c, fade_k ? x * load(fade_k + r * Kp + c) : x);
    }
}

// out_i += Σ_j P[i][j] y_j, or the transpose of P.
STAGE void gather(const float* P, Shape shape, const float* y, int ld, float* out) {
  blocks(C, ld, [=]<int MR, int NV>(int m, int n) {
    vec acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < NV; ++l) acc[r][l] = load(out + (m + r) * ld + n + l * LANES);
    inside(acc, P, shape, m, y + n, ld);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < NV; ++l) store(out + (m + r) * ld + n + l * LANES, acc[r][l]);
  });
}

// ⟨S, dS⟩ + ⟨z, dz⟩, into `running`: the gradient to the logarithm of all that the state was faded by, one number or one per channel.
STAGE void pin(const Gradients& s, const float* S, const float* dS, const float* z, const float* dz, bool normal, bool channel) {
  vec all = {};
  for (int c = 0; c < s.Kp; c += LANES) {
    vec x = normal ? load(z + c) * load(dz + c) : vec{};
    for (int v = 0; v < s.Vp; ++v) x += load(S + v * s.Kp + c) * load(dS + v * s.Kp + c);
    store(s.running + c, x);
    all += x;
  }
  if (!channel) s.running[0] = sum(all);
}

// du += the gradient of what was recorded as written, in the order of `w`.
INLINE void add_writes_gradient(const Backward& a, const Walk& w, int direction, Gradients& s, int64_t p, int rows) {
  load_rows(gate_span(a.du + direction * a.B * a.T * a.H * a.V, a, w, p, a.V), rows, int(a.V), 1.0f, s.wide, s.Vp);
  for (int i = 0; i < C * s.Vp; i += LANES) store(s.du + i, load(s.du + i) + load(s.wide + i));
}

INLINE int64_t dg_index(const Backward& a, const Walk& w, int64_t t) { return ((w.direction * a.B + w.b) * a.T + t) * a.H + w.h; }

// As carry_chunk, for the transposed state.
INLINE void carry_transposed(const Call& a, Tiles& s, const float* u, bool normal, Ahead* ahead = nullptr, const float* from = nullptr) {
  const Gate& g = s.gate;
  const bool channel = a.decay == CHANNEL;
  if (normal && !channel) carry_z(s.z, s.Kp, g.across, nullptr, s.k, g.kept);
  if (channel)
    scale_tile(s.k, g.kept_k, s.k, s.Kp);
  else if (a.decay != NONE)
    scale_rows(s.k, g.kept, s.k, s.Kp);
  if (normal && channel) carry_z(s.z, s.Kp, 0, g.across_k, s.k, nullptr);
  carry(s.S, s.Vp, s.Kp, {g.across, nullptr, channel ? g.across_k : nullptr}, u, false, s.k, ahead, from);
}

// Where the first walk leaves what its tokens wrote, less beta: in the rows of dv, if nothing else is there and it fits in, else in scratch.
INLINE Span writes_span(const Backward& a, const Walk& w, const Gradients& s, int64_t p) {
  if (s.keeps_writes(a, w.direction)) return {reinterpret_cast<char*>(s.writes + p * s.Vp), false, s.Vp};
  Span rows = span(a.dv, w, p, w.h);
  rows.stream = false;
  return rows;
}

INLINE void load_writes(const Backward& a, const Walk& w, Gradients& s, int64_t p, int rows, float* beta) {
  load_beta(a, w, p, rows, beta);
  load_rows(writes_span(a, w, s, p), rows, int(a.V), 1.0f, s.w, s.Vp);
  scale_rows(s.w, beta, s.u, s.Vp);
}

}  // namespace linattn::LINATTN_ISA

// The forward walk over heads of one sequence, and what a segment of it adds to the state.
#pragma once
#include "chunk.h"

namespace linattn::LINATTN_ISA {

struct Tiles {
  int Kp, Vp;
  float *q, *k, *kT, *k_seen, *q_seen, *v, *u, *w, *P, *M, *o;
  float *S, *z;              // of the head at hand
  float *all_S, *all_z;      // of all heads walked side by side
  Gate gate;
  Tiles(const Call& a, Scratch& s) : Kp(pad(a.K)), Vp(pad(a.V)) {
    q = s.take(C * Kp), k = s.take(C * Kp), kT = s.take(C * Kp), k_seen = s.take(C * Kp), q_seen = s.take(C * Kp);
    v = s.take(C * Vp), u = s.take(C * Vp), w = s.take(C * Vp), o = s.take(C * Vp);
    P = s.take(C * C), M = s.take(C * C);
    all_S = s.take(size_t(Kp) * Vp * a.width), all_z = s.take(size_t(Kp) * a.width);
    gate.a = s.take(C * Kp), gate.seen_k = s.take(C * Kp), gate.kept_k = s.take(C * Kp), gate.across_k = s.take(Kp);
    select(0);
  }
  static size_t floats(const Call& a) {
    const size_t Kp = pad(a.K), Vp = pad(a.V);
    return C * (8 * Kp + 4 * Vp + 2 * C) + (Kp * Vp + Kp) * a.width + Kp + 64;
  }
  void select(int i) { S = all_S + size_t(i) * Kp * Vp, z = all_z + size_t(i) * Kp; }
};

// A job's span of its sequence, for one direction.
INLINE Walk make_walk(const Call& a, Job job, int direction) {
  Walk w;
  w.h = job.h;
  w.b = a.ends ? 0 : job.n;
  int64_t first = a.ends ? a.ends[job.n] : 0, length = a.ends ? a.ends[job.n + 1] - first : a.T;
  w.boundary = a.ends && a.stride ? first / a.stride + job.n : 0;
  const int64_t piece = (length + a.segments - 1) / a.segments, whole = (piece + ANCHOR - 1) / ANCHOR * ANCHOR;
  const int64_t begin = whole * job.segment < length ? whole * job.segment : length;
  const int64_t end = begin + whole < length ? begin + whole : length;
  w.first = first + begin;
  w.length = end - begin;
  w.direction = direction;
  w.reverse = direction == 1;
  w.leaving = !a.causal && (a.gating == SOURCE || (a.gating == SYMMETRIC && w.reverse));
  w.own = a.causal ? 1.0f : 0.5f;
  return w;
}

// Where the states of a (direction, sequence, head, segment) lie.
INLINE int64_t state_index(const Call& a, const Walk& w, Job job) { return (w.direction * a.sequences + job.n) * a.H + job.h; }
INLINE int64_t segment_index(const Call& a, const Walk& w, Job job) { return state_index(a, w, job) * a.segments + job.segment; }

INLINE void load_chunk(const Call& a, const Walk& w, Tiles& s, int64_t p, int rows, Intra intra, bool right_leaving) {
  load_rows(span(a.k, w, p, w.h), rows, int(a.K), 1.0f, s.k, s.Kp);
  load_rows(span(a.v, w, p, w.h), rows, int(a.V), 1.0f, s.v, s.Vp);
  set_gate(s.gate, a, w, p, rows, intra, right_leaving, s.Kp);
}

// write: u = beta (v − (faded S)ᵀ k − what earlier tokens of the chunk wrote), by M = beta_i (k_i·k_j) e^(ℓ_i − ℓ_j), strictly lower.
// Leaves in A the same without beta, in w the bracket without the chunk's own part, for the gradients.
STAGE void delta_write(const Call& a, const Walk& w, Tiles& s, int64_t p, int rows, float* beta, float* A) {
  for (int r = 0; r < C; ++r) beta[r] = r < rows ? a.beta[(w.b * a.T + w.token(p + r)) * a.H + w.h] : 0.0f;
  if (a.decay == CHANNEL) {
    channel_products(s.k, s.kT, s.gate, w.leaving, s.Kp, 0.0f, A);
    scale_tile(s.k, s.gate.seen_k, s.k_seen, s.Kp);
  } else {
    products(s.k, s.Kp, s.kT, s.gate.D, nullptr, A);
    keep_triangle(A, 0.0f);
    scale_rows(s.k, s.gate.seen, s.k_seen, s.Kp);
  }
  emit(s.k_seen, s.Kp, s.S, s.Vp, nullptr, nullptr, false, nullptr, s.w, s.Vp);
  for (int i = 0; i < C * s.Vp; i += LANES) store(s.w + i, load(s.v + i) - load(s.w + i));
  scale_rows(s.w, beta, s.u, s.Vp);
  scale_rows(A, beta, s.M, C);
  solve(s.M, false, s.u, s.Vp);
}

// carry: S and z take in the chunk. Its keys, in k or, where that is at hand, transposed in kT, are faded in place: nobody reads them after.
INLINE void carry_chunk(const Call& a, Tiles& s, const float* u, bool normal, bool transposed, const Ahead* ahead = nullptr, int count = 0) {
  const Gate& g = s.gate;
  if (a.decay == CHANNEL) {
    scale_tile(s.k, g.kept_k, s.k, s.Kp);
    carry(s.S, s.Kp, s.Vp, 0, g.across_k, s.k, false, u, ahead, count);
    if (normal) carry_z(s.z, s.Kp, 0, g.across_k, s.k, nullptr);
    return;
  }
  if (normal) carry_z(s.z, s.Kp, g.across, nullptr, s.k, g.kept);
  if (a.decay != NONE) transposed ? scale_columns(s.kT, s.Kp, g.kept) : scale_rows(s.k, g.kept, s.k, s.Kp);
  carry(s.S, s.Kp, s.Vp, g.across, nullptr, transposed ? s.kT : s.k, transposed, u, ahead, count);
}

// Row sums of the chunk's queries; on the last walk over a row, its numerator, whole by then, is divided by them.
STAGE void normalize(const Forward& a, const Walk& w, Tiles& s, int64_t p, int rows, int64_t h, const float* reader, bool inside, bool add, bool finish) {
  const Span o = span(a.o, w, p, h);
  if (add && finish) {
    load_rows(o, rows, int(a.V), 1.0f, s.w, s.Vp);
    for (int i = 0; i < rows * s.Vp; i += LANES) store(s.o + i, load(s.o + i) + load(s.w + i));
  }
  for (int r = 0; r < rows; ++r) {
    float d = dot(reader + r * s.Kp, s.z, s.Kp) * (a.decay == CHANNEL ? 1.0f : s.gate.seen[r]);
    for (int j = 0; j < C && inside; ++j) d += s.P[r * C + j];
    float& total = a.d[(w.b * a.T + w.token(p + r)) * a.H * a.G + h];
    total = add ? total + d : d;
    if (!finish) continue;
    const float inverse = 1.0f / denominator(total, a.normalize, a.eps);
    for (int i = 0; i < s.Vp; i += LANES) store(s.o + r * s.Vp + i, load(s.o + r * s.Vp + i) * inverse);
  }
}

INLINE void forward_chunk(const Forward& a, const Walk& w, Tiles& s, int64_t p, int rows, Intra intra, bool add, bool finish) {
  const int Kp = s.Kp, Vp = s.Vp;
  const bool normal = a.normalize != PLAIN, channel = a.decay == CHANNEL;
  const int64_t next = p + rows < w.length ? p + rows : p;
  load_chunk(a, w, s, p, rows, intra, a.gating != TARGET);
  if (a.bkv && p % a.stride == 0) {
    const int64_t at = ((w.direction * a.B + w.b) * a.rows + w.boundary + p / a.stride) * a.H + w.h;
    store_state(s.S, Vp, int(a.K), int(a.V), a.bkv + at * a.K * a.V);
    if (normal) store_state(s.z, Kp, 1, int(a.K), a.bz + at * a.K);
  }
  const float* u = s.v;
  if (a.delta || intra != NOTHING) transpose(s.k, Kp, C, Kp, s.kT, C);
  if (a.delta) {
    float beta[C], A[C * C];
    delta_write(a, w, s, p, rows, beta, A);
    u = s.u;
  }
  if (a.u) store_rows(u, Vp, rows, int(a.V), 1.0f, gate_span(a.u + w.direction * a.B * a.T * a.H * a.V, a, w, p, a.V), false);
  for (int64_t h = w.h * a.G; h < (w.h + 1) * a.G; ++h) {
    load_rows(span(a.q, w, p, h), rows, int(a.K), a.scale, s.q, Kp);
    const float* reader = s.q;
    if (channel) {
      scale_tile(s.q, s.gate.seen_k, s.q_seen, Kp);
      reader = s.q_seen;
      channel_products(s.q, s.kT, s.gate, w.leaving, Kp, w.own, s.P);
    } else if (intra != NOTHING) {
      products(s.q, Kp, s.kT, s.gate.D, nullptr, s.P);
    }
    const Span o = span(a.o, w, p, h);
    const bool direct = rows == C && !o.bf16 && a.V == Vp && !normal && !add;  // straight to memory, without the tile
    const Ahead ahead = ahead_of(a.q, w, next, h, a.K);
    emit(reader, Kp, s.S, Vp, channel || a.decay == NONE ? nullptr : s.gate.seen, intra == NOTHING ? nullptr : s.P, intra == TRIANGLE, u,
         direct ? reinterpret_cast<float*>(o.p) : s.o, direct ? o.step : Vp, &ahead);
    if (direct) continue;
    if (normal) normalize(a, w, s, p, rows, h, reader, intra != NOTHING, add, finish);
    store_rows(s.o, Vp, rows, int(a.V), 1.0f, o, add && !(normal && finish));
  }
  const Ahead ahead[] = {ahead_of(a.k, w, next, w.h, a.K), ahead_of(a.v, w, next, w.h, a.V)};
  carry_chunk(a, s, u, normal, a.delta || intra != NOTHING, ahead, 2);
}

STAGE void forward_walk(const Forward& a, Walk w, Tiles& s, Intra intra, bool add, bool finish) {
  int rows;
  for (int64_t p = 0; p < w.length; p += rows) {
    rows = least(C, w.length - p);
    if (intra == NOTHING && p == 0 && w.length % C) rows = int(w.length % C);  // the grid of chunks is the one of the walk from the left
    for (int i = 0; i < a.width; ++i) {
      s.select(i);
      forward_chunk(a, w, s, p, rows, intra, add, finish);
      ++w.h;
    }
    w.h -= a.width;
  }
}

// What enters a job's span in a direction: the segment's incoming state, or the sequence's.
INLINE void enter(const Call& a, const Walk& w, Job job, float* S, float* z, const float* kv0, const float* z0, const float* seg_kv,
                  const float* seg_z) {
  const int Kp = pad(a.K), Vp = pad(a.V);
  for (int i = 0; i < a.width; ++i, ++job.h) {
    const int64_t at = a.segments > 1 ? segment_index(a, w, job) : state_index(a, w, job);
    load_state((a.segments > 1 ? seg_kv : kv0) + at * a.K * a.V, int(a.K), int(a.V), S + size_t(i) * Kp * Vp, Kp, Vp);
    load_state((a.segments > 1 ? seg_z : z0) + at * a.K, 1, int(a.K), z + size_t(i) * Kp, 1, Kp);
  }
}

INLINE void leave(const Call& a, const Walk& w, Job job, const float* S, const float* z, float* kv_out, float* z_out) {
  const int Kp = pad(a.K), Vp = pad(a.V);
  for (int i = 0; i < a.width; ++i, ++job.h) {
    const int64_t at = state_index(a, w, job);
    store_state(S + size_t(i) * Kp * Vp, Vp, int(a.K), int(a.V), kv_out + at * a.K * a.V);
    if (z_out) store_state(z + size_t(i) * Kp, Kp, 1, int(a.K), z_out + at * a.K);
  }
}

// The last segment of a walk hands its state to the caller.
INLINE bool is_last(const Call& a, const Walk& w, Job job) { return job.segment == (w.reverse ? 0 : a.segments - 1); }

static void forward_job(const Forward& a, Job job, float* scratch) {
  Scratch take{scratch};
  Tiles s(a, take);
  // bidirectional: the walk from the right leaves its part in o, the walk from the left adds its own and finishes.
  // An additive write needs the scores inside a chunk once, for both directions; a channel decay or a delta write, once for each;
  // so do recorded boundaries, which count from each end.
  const bool once = !a.causal && !a.delta && a.decay != CHANNEL && !a.stride;
  for (int direction = a.causal ? 0 : 1; direction >= 0; --direction) {
    Walk w = make_walk(a, job, direction);
    if (once) w.own = 1.0f;
    enter(a, w, job, s.all_S, s.all_z, a.kv, a.z, a.seg_kv, a.seg_z);
    forward_walk(a, w, s, !once ? TRIANGLE : w.reverse ? NOTHING : FULL, !a.causal && !w.reverse, direction == 0);
    if (is_last(a, w, job)) leave(a, w, job, s.all_S, s.all_z, a.kv_out, a.normalize != PLAIN ? a.z_out : nullptr);
  }
}

// What a segment adds to a state, and how a state fades across it, in both directions at one pass over k and v each.
static void forward_aggregate(const Forward& a, Job job, float* scratch) {
  Scratch take{scratch};
  Tiles s(a, take);
  for (int direction = 0; direction < (a.causal ? 1 : 2); ++direction) {
    const Walk w = make_walk(a, job, direction);
    const int64_t at = segment_index(a, w, job);
    __builtin_memset(s.S, 0, size_t(s.Kp) * s.Vp * 4);
    __builtin_memset(s.z, 0, size_t(s.Kp) * 4);
    for (int c = 0; c < a.K; ++c) a.seg_fade[at * a.K + c] = 1.0f;
    for (int64_t p = 0; p < w.length; p += C) {
      load_chunk(a, w, s, p, least(C, w.length - p), NOTHING, false);
      carry_chunk(a, s, s.v, true, false);
      for (int c = 0; c < a.K; ++c) a.seg_fade[at * a.K + c] *= a.decay == CHANNEL ? s.gate.across_k[c] : s.gate.across;
    }
    store_state(s.S, s.Vp, int(a.K), int(a.V), a.seg_kv + at * a.K * a.V);
    store_state(s.z, s.Kp, 1, int(a.K), a.seg_z + at * a.K);
  }
}

}  // namespace linattn::LINATTN_ISA

// The forward walk over heads of one sequence, and what a segment of it adds to the state.
#pragma once
#include "chunk.h"

namespace linattn::LINATTN_ISA {

struct Tiles {
  int Kp, Vp;
  float *q, *k, *kT, *k_seen, *q_seen, *v, *u, *w, *P, *M, *o;
  float *S, *z;              // of the head at hand
  float *all_S, *all_z;      // of all heads walked side by side
  float *spare, *spare_z;    // one state more
  Gate gate;
  Tiles(const Call& a, Scratch& s) : Kp(pad(a.K)), Vp(pad(a.V)), gate(Kp, s) {
    q = s.take(C * Kp), k = s.take(C * Kp), kT = s.take(C * Kp), k_seen = s.take(C * Kp), q_seen = s.take(C * Kp);
    v = s.take(C * Vp), u = s.take(C * Vp), w = s.take(C * Vp), o = s.take(C * Vp);
    P = s.take(C * C), M = s.take(C * C);
    all_S = s.take(size_t(Kp) * Vp * a.width), all_z = s.take(size_t(Kp) * a.width);
    spare = s.take(size_t(Kp) * Vp), spare_z = s.take(Kp);
    select(0);
  }
  static size_t floats(const Call& a) {
    const size_t Kp = pad(a.K), Vp = pad(a.V);
    return Gate::floats(Kp) + C * (5 * Kp + 4 * Vp + 2 * C) + (Kp * Vp + Kp) * (a.width + 1) + 64;
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

INLINE void load_keys(const Call& a, const Walk& w, Tiles& s, int64_t p, int rows, Intra intra, bool right_leaving) {
  load_rows(span(a.k, w, p, w.h), rows, int(a.K), 1.0f, s.k, s.Kp);
  set_gate(s.gate, a, w, p, rows, intra, right_leaving, s.Kp);
}
INLINE void load_chunk(const Call& a, const Walk& w, Tiles& s, int64_t p, int rows, Intra intra, bool right_leaving) {
  load_keys(a, w, s, p, rows, intra, right_leaving);
  load_rows(span(a.v, w, p, w.h), rows, int(a.V), 1.0f, s.v, s.Vp);
}

// f(walk, position, rows) for every chunk of every head that is walked side by side.
template <class T, class F>
INLINE void each_chunk(const Call& a, Walk w, T& s, F&& f) {
  for (int64_t p = 0; p < w.length; p += C, w.h -= a.width)
    for (int i = 0; i < a.width; ++i, ++w.h) {
      s.select(i);
      f(w, p, least(C, w.length - p));
    }
}

INLINE Ahead next_keys(const Call& a, const Walk& w, int64_t position) {
  Ahead ahead(a);
  if (position < 0 || position >= w.length) return ahead;
  ahead.also(span(a.k, w, position, w.h), a.K).also(span(a.v, w, position, w.h), a.V);
  if (a.decay == CHANNEL) ahead.also(gate_span(a.g, a, w, position, a.K), a.K);
  return ahead;
}

INLINE void load_beta(const Call& a, const Walk& w, int64_t p, int rows, float* beta) {
  for (int r = 0; r < C; ++r) beta[r] = r < rows ? a.beta[(w.b * a.T + w.token(p + r)) * a.H + w.h] : 0.0f;
}

// What keys read of each other, A = (k_i·k_j) e^(ℓ_i − ℓ_j), strictly lower, and of the state before the chunk: k_seen.
INLINE void keys_meet(const Call& a, Tiles& s, float* A) {
  if (a.decay == CHANNEL) {
    channel_products(s.k, s.k, s.gate, s.Kp, 0.0f, A);
    scale_tile(s.k, s.gate.seen_k, s.k_seen, s.Kp);
  } else {
    products(s.k, s.Kp, s.kT, s.gate.D, nullptr, LOWER, A);
    keep_triangle(A, 0.0f);
    scale_rows(s.k, s.gate.seen, s.k_seen, s.Kp);
  }
}

// write: u = beta · w, w = v − (faded S)ᵀ k − what earlier tokens of the chunk wrote: (I + A diag(beta)) w = v − Sᵀ k_seen.
// `transposed`: S is [Vp Kp].
STAGE void delta_write(const Call& a, const Walk& w, Tiles& s, int64_t p, int rows, bool transposed) {
  float beta[C], A[C * C];
  load_beta(a, w, p, rows, beta);
  keys_meet(a, s, A);
  if (transposed) {
    transpose(s.k_seen, s.Kp, C, s.Kp, s.q_seen, C);
    emit_across(s.q_seen, s.Kp, s.S, s.Vp, nullptr, s.o, s.w);
  } else {
    emit(s.k_seen, s.Kp, s.S, s.Vp, nullptr, nullptr, ALL, nullptr, s.w, s.Vp);
  }
  for (int i = 0; i < C * s.Vp; i += LANES) store(s.w + i, load(s.v + i) - load(s.w + i));
  scale_columns(A, C, beta);
  solve(A, false, s.w, s.Vp);
  scale_rows(s.w, beta, s.u, s.Vp);
}

// carry: S and z take in the chunk. Its keys, in k or, where that is at hand, transposed in kT, are faded in place: nobody reads them after.
INLINE void carry_chunk(const Call& a, Tiles& s, const float* u, bool normal, bool keys_transposed, Ahead* ahead = nullptr) {
  const Gate& g = s.gate;
  if (a.decay == CHANNEL) {
    scale_tile(s.k, g.kept_k, s.k, s.Kp);
    carry(s.S, s.Kp, s.Vp, {0, g.across_k}, s.k, false, u, ahead);
    if (normal) carry_z(s.z, s.Kp, 0, g.across_k, s.k, nullptr);
    return;
  }
  if (normal) carry_z(s.z, s.Kp, g.across, nullptr, s.k, g.kept);
  if (a.decay != NONE) keys_transposed ? scale_columns(s.kT, s.Kp, g.kept) : scale_rows(s.k, g.kept, s.k, s.Kp);
  carry(s.S, s.Kp, s.Vp, {g.across}, keys_transposed ? s.kT : s.k, keys_transposed, u, ahead);
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
  const bool inside = intra == TRIANGLE || intra == FULL;
  if (intra == WHOLE)
    set_gate(s.gate, a, w, p, rows, NOTHING, false, Kp);
  else
    load_chunk(a, w, s, p, rows, intra, a.gating != TARGET);
  if (a.bkv && p % a.stride == 0) {
    const int64_t at = ((w.direction * a.B + w.b) * a.rows + w.boundary + p / a.stride) * a.H + w.h;
    store_state(s.S, int(a.K), int(a.V), false, a.bkv + at * a.K * a.V);
    if (normal) __builtin_memcpy(a.bz + at * a.K, s.z, size_t(a.K) * 4);
  }
  const float* u = s.v;
  if (!channel && (a.delta || inside)) transpose(s.k, Kp, C, Kp, s.kT, C);
  if (a.delta) {
    delta_write(a, w, s, p, rows, false);
    u = s.u;
  }
  if (a.u) store_rows(u, Vp, rows, int(a.V), 1.0f, gate_span(a.u + w.direction * a.B * a.T * a.H * a.V, a, w, p, a.V), false);
  for (int64_t h = w.h * a.G; h < (w.h + 1) * a.G; ++h) {
    load_rows(span(a.q, w, p, h), rows, int(a.K), a.scale, s.q, Kp);
    const float* reader = s.q;
    if (channel) {
      scale_tile(s.q, s.gate.seen_k, s.q_seen, Kp);
      reader = s.q_seen;
      channel_products(s.q, s.k, s.gate, Kp, w.own, s.P);
    } else if (inside) {
      products(s.q, Kp, s.kT, s.gate.D, nullptr, intra == TRIANGLE ? LOWER : ALL, s.P);
    }
    const Span o = span(a.o, w, p, h);
    const bool direct = !o.stream && rows == C && !o.bf16 && a.V == Vp && !normal && !add;  // straight to memory, without the tile
    Ahead queries(a);
    queries.also(span(a.q, w, next, h), a.K);
    if (add) queries.also(span(a.o, w, next, h), a.V);
    emit(reader, Kp, s.S, Vp, channel || a.decay == NONE ? nullptr : s.gate.seen, inside ? s.P : nullptr,
         intra == TRIANGLE ? LOWER : ALL, u, direct ? reinterpret_cast<float*>(o.p) : s.o, direct ? o.step : Vp, &queries);
    if (direct) continue;
    if (normal) normalize(a, w, s, p, rows, h, reader, inside, add, finish);
    store_rows(s.o, Vp, rows, int(a.V), 1.0f, o, add && !(normal && finish));
  }
  if (intra == WHOLE) return;
  Ahead ahead = next_keys(a, w, p + rows);
  carry_chunk(a, s, u, normal, a.delta || inside, &ahead);
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

// What enters a job's span in a direction: the segment's incoming state, or the sequence's. `transposed` as in load_state.
INLINE void enter(const Call& a, const Walk& w, Job job, bool transposed, float* S, float* z, const float* kv0, const float* z0,
                  const float* seg_kv, const float* seg_z) {
  const int Kp = pad(a.K), Vp = pad(a.V);
  for (int i = 0; i < a.width; ++i, ++job.h) {
    const int64_t at = a.segments > 1 ? segment_index(a, w, job) : state_index(a, w, job);
    load_state(one_of(a.segments > 1 ? seg_kv : kv0, at, a.K * a.V), int(a.K), int(a.V), transposed, S + size_t(i) * Kp * Vp);
    load_row_sums(one_of(a.segments > 1 ? seg_z : z0, at, a.K), int(a.K), z + size_t(i) * Kp);
  }
}

INLINE void leave(const Call& a, const Walk& w, Job job, bool transposed, const float* S, const float* z, float* kv_out, float* z_out) {
  const int Kp = pad(a.K), Vp = pad(a.V);
  for (int i = 0; i < a.width; ++i, ++job.h) {
    const int64_t at = state_index(a, w, job);
    store_state(S + size_t(i) * Kp * Vp, int(a.K), int(a.V), transposed, one_of(kv_out, at, a.K * a.V));
    store_row_sums(z + size_t(i) * Kp, int(a.K), one_of(z_out, at, a.K));
  }
}

// The last segment of a walk hands its state to the caller.
INLINE bool is_last(const Call& a, const Walk& w, Job job) { return job.segment == (w.reverse ? 0 : a.segments - 1); }

// Without decay and write rule both directions are one sum over all tokens. Given in S and z what the span adds to it, put there the sum that
// every token of the span reads; what leaves in a direction is what entered plus what the span adds. `backward`: the same of gradients.
STAGE void add_entering(const Call& a, Job job, bool transposed, bool backward, Tiles& s, float* S, float* z, const float* kv0, const float* z0,
                        const float* seg_kv, const float* seg_z, float* kv_out, float* z_out) {
  const size_t state = size_t(s.Kp) * s.Vp;
  for (int i = 0; i < a.width; ++i, ++job.h, S += state, z += s.Kp) {
    const auto add_from = [&](int d, float* to, float* to_z, const float* more, const float* more_z) {
      const Walk w = make_walk(a, job, d);
      const int64_t at = a.segments > 1 ? segment_index(a, w, job) : state_index(a, w, job);
      load_state(one_of(a.segments > 1 ? seg_kv : kv0, at, a.K * a.V), int(a.K), int(a.V), transposed, s.spare);
      load_row_sums(one_of(a.segments > 1 ? seg_z : z0, at, a.K), int(a.K), s.spare_z);
      for (size_t c = 0; c < state; c += LANES) store(to + c, load(more + c) + load(s.spare + c));
      for (int c = 0; c < s.Kp; c += LANES) store(to_z + c, load(more_z + c) + load(s.spare_z + c));
      return state_index(a, w, job);
    };
    for (int d = 0; d < 2; ++d) {
      if (!kv_out || job.segment != ((d == 1) != backward ? 0 : a.segments - 1)) continue;
      const int64_t at = add_from(d, s.spare, s.spare_z, S, z);
      store_state(s.spare, int(a.K), int(a.V), transposed, one_of(kv_out, at, a.K * a.V));
      store_row_sums(s.spare_z, int(a.K), one_of(z_out, at, a.K));
    }
    for (int d = 0; d < 2; ++d) add_from(d, S, z, S, z);
  }
}

static void whole_forward(const Forward& a, Job job, Tiles& s) {
  const Walk w = make_walk(a, job, 0);
  const bool normal = a.normalize != PLAIN;
  __builtin_memset(s.all_S, 0, size_t(s.Kp) * s.Vp * a.width * 4);
  __builtin_memset(s.all_z, 0, size_t(s.Kp) * a.width * 4);
  each_chunk(a, w, s, [&](const Walk& at, int64_t p, int rows) {
    load_chunk(a, at, s, p, rows, NOTHING, false);
    Ahead ahead = next_keys(a, at, p + C);
    carry_chunk(a, s, s.v, normal, false, &ahead);
  });
  add_entering(a, job, false, false, s, s.all_S, s.all_z, a.kv, a.z, a.seg_kv, a.seg_z, a.kv_out, a.z_out);
  forward_walk(a, w, s, WHOLE, false, true);
}

static void forward_job(const Forward& a, Job job, float* scratch) {
  Scratch take{scratch};
  Tiles s(a, take);
  if (!a.causal && a.decay == NONE && !a.delta && !a.stride && !a.u) {
    whole_forward(a, job, s);
    return drain();
  }
  // bidirectional: the walk from the right leaves its part in o, the walk from the left adds its own and finishes.
  // An additive write needs the scores inside a chunk once, for both directions; a channel decay or a delta write, once for each;
  // so do recorded boundaries, which count from each end.
  const bool once = !a.causal && !a.delta && a.decay != CHANNEL && !a.stride;
  for (int direction = a.causal ? 0 : 1; direction >= 0; --direction) {
    Walk w = make_walk(a, job, direction);
    if (once) w.own = 1.0f;
    enter(a, w, job, false, s.all_S, s.all_z, a.kv, a.z, a.seg_kv, a.seg_z);
    forward_walk(a, w, s, !once ? TRIANGLE : w.reverse ? NOTHING : FULL, !a.causal && !w.reverse, direction == 0);
    if (is_last(a, w, job)) leave(a, w, job, false, s.all_S, s.all_z, a.kv_out, a.z_out);
  }
  drain();
}

// A call whose state has K columns more under the delta rule: started from the identity, with nothing to write, they become the matrix R that
// a segment multiplies the state by. They begin at column pad(V).
INLINE Call widened(const Call& a) {
  Call wide = a;
  if (a.delta && a.segments > 1) wide.V = pad(a.V) + pad(a.K);
  return wide;
}

// What a segment adds to a state, and how a state fades or turns across it, in both directions at one pass over k and v each.
static void forward_aggregate(const Forward& a, Job job, float* scratch) {
  Scratch take{scratch};
  Tiles s(widened(a), take);
  const int K = int(a.K), V = int(a.V), R = pad(V);
  for (int direction = 0; direction < (a.causal ? 1 : 2); ++direction) {
    const Walk w = make_walk(a, job, direction);
    const int64_t at = segment_index(a, w, job);
    __builtin_memset(s.S, 0, size_t(s.Kp) * s.Vp * 4);
    __builtin_memset(s.z, 0, size_t(s.Kp) * 4);
    __builtin_memset(s.v, 0, size_t(C) * s.Vp * 4);
    for (int c = 0; c < K && a.delta; ++c) s.S[c * s.Vp + R + c] = 1.0f;
    for (int c = 0; c < K; ++c) a.seg_fade[at * K + c] = 1.0f;
    for (int64_t p = 0; p < w.length; p += C) {
      const int rows = least(C, w.length - p);
      load_chunk(a, w, s, p, rows, NOTHING, false);
      if (a.delta) {
        if (a.decay != CHANNEL) transpose(s.k, s.Kp, C, s.Kp, s.kT, C);
        delta_write(a, w, s, p, rows, false);
      }
      carry_chunk(a, s, a.delta ? s.u : s.v, true, a.delta);
      for (int c = 0; c < K; ++c) a.seg_fade[at * K + c] *= a.decay == CHANNEL ? s.gate.across_k[c] : s.gate.across;
    }
    for (int c = 0; c < K; ++c) {
      __builtin_memcpy(a.seg_kv + (at * K + c) * V, s.S + c * s.Vp, size_t(V) * 4);
      if (a.delta) __builtin_memcpy(a.seg_turn + (at * K + c) * K, s.S + c * s.Vp + R, size_t(K) * 4);
    }
    __builtin_memcpy(a.seg_z + at * K, s.z, size_t(K) * 4);
  }
}

static void turn(const Call& a, const float* R, bool transposed, const float* S, float* out, float* scratch) {
  const int Kp = pad(a.K), Vp = pad(a.V);
  Scratch take{scratch};
  float *by = take.take(size_t(Kp) * Kp), *from = take.take(size_t(Kp) * Vp), *to = take.take(size_t(Kp) * Vp);
  load_state(R, int(a.K), int(a.K), transposed, by);
  load_state(S, int(a.K), int(a.V), false, from);
  for (int m = 0; m < Kp; m += C) emit(by + m * Kp, Kp, from, Vp, nullptr, nullptr, ALL, nullptr, to + m * Vp, Vp);
  store_state(to, int(a.K), int(a.V), false, out);
}
static size_t turn_scratch(const Call& a) { return size_t(pad(a.K)) * (pad(a.K) + 2 * pad(a.V)) + 64; }

}  // namespace linattn::LINATTN_ISA

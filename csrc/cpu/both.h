// Backward of a bidirectional call whose two directions can share what they read.
#pragma once
#include "gradients.h"

namespace linattn::LINATTN_ISA {

// As whole_forward: dq reads the sum of all writes, dk and dv the sum of all reads, and neither has a part inside the chunk.
static void whole_backward(const Backward& a, Job job, Gradients& s) {
  const Walk w = make_walk(a, job, 0);
  const int Kp = s.Kp, Vp = s.Vp;
  const bool normal = a.normalize != PLAIN;
  __builtin_memset(s.all_S, 0, s.state * a.width * 4), __builtin_memset(s.all_dS, 0, s.state * a.width * 4);
  __builtin_memset(s.all_z, 0, size_t(Kp) * a.width * 4), __builtin_memset(s.all_dz, 0, size_t(Kp) * a.width * 4);
  each_chunk(a, w, s, [&](const Walk& at, int64_t p, int rows) {
    load_chunk(a, at, s, p, rows, NOTHING, false);
    Ahead ahead = next_keys(a, at, p + C);
    carry_transposed(a, s, s.v, normal, &ahead);
  });
  add_entering(a, job, true, false, s, s.all_S, s.all_z, a.kv, a.z, a.seg_kv, a.seg_z, nullptr, nullptr);
  each_chunk(a, w, s, [&](const Walk& at, int64_t p, int rows) {
    for (int64_t h = at.h * a.G; h < (at.h + 1) * a.G; ++h) {
      load_grad(a, at, s, p, rows, h, a.scale);
      load_rows(span(a.q, at, p, h), rows, int(a.K), 1.0f, s.q, Kp);
      Ahead ahead(a);
      if (p + C < w.length) ahead.also(span(a.grad, at, p + C, h), a.V).also(span(a.q, at, p + C, h), a.K);
      emit(s.dn, Vp, s.S, Kp, nullptr, nullptr, ALL, nullptr, s.dq, Kp, &ahead);
      if (normal) finish_read(s.dq, Kp, s.dd, s.z, nullptr);
      store_rows(s.dq, Kp, rows, int(a.K), 1.0f, span(a.dq, at, p, h), false);
      carry(s.dS, Vp, Kp, {1.0f}, s.dn, false, s.q);
      if (normal) carry_z(s.dz, Kp, 1.0f, nullptr, s.q, s.dd);
    }
  });
  add_entering(a, job, true, true, s, s.all_dS, s.all_dz, a.dkv_out, a.dz_out, a.seg_dkv, a.seg_dz, a.dkv, a.dz);
  float ones[C];
  for (float& x : ones) x = 1.0f;
  each_chunk(a, w, s, [&](const Walk& at, int64_t p, int rows) {
    load_chunk(a, at, s, p, rows, NOTHING, false);
    Ahead ahead = next_keys(a, at, p + C);
    emit(s.v, Vp, s.dS, Kp, nullptr, nullptr, ALL, nullptr, s.dk, Kp, &ahead);
    if (normal) finish_read(s.dk, Kp, ones, s.dz, nullptr);
    store_rows(s.dk, Kp, rows, int(a.K), 1.0f, span(a.dk, at, p, at.h), false);
    transpose(s.k, Kp, C, Kp, s.kT, C);
    emit_across(s.kT, Kp, s.dS, Vp, nullptr, s.wide, s.du);
    store_rows(s.du, Vp, rows, int(a.V), 1.0f, span(a.dv, at, p, at.h), false);
  });
}

// -- a decay that is one number per token ------------------------------------------------------------------------------------------------
//
// Each scan needs its states S along its own way, for dq, and their gradients dS against it, for dk and dv. So the walk to the right carries S
// of the scan from the left and dS of the scan from the right, and the walk back the other two; what is inside a chunk, of both, is done on the
// first walk.
//
// The log-decay gradient of a scan is a running sum of e = q·dq − k·dk from the end of its way. Either walk has one half of each scan's e; of
// what is inside a chunk, W = P ⊙ dP, the scan from the left has the part below the diagonal, the other one what is above:
// x_i = Σ_{j > i} (W_ij + W_ji) + W_ii is what the first walk's q·dq holds too much for the former, and its k·dk for the latter.

// x as above, added up over the query heads of a group.
STAGE void add_crossing(const float* P, const float* dP, float* x) {
  for (int block = 0; block < C; block += LANES) {
    vec row[LANES], all = load(x + block);
    for (int i = 0; i < C; ++i) {
      const vec w = load(P + i * C + block) * load(dP + i * C + block);
      all += iota() + block < i ? w : vec{};
    }
    for (int r = 0; r < LANES; ++r) {
      row[r] = vec{};
      for (int j = 0; j < C; j += LANES) {
        const int i = (block + r) * C + j;
        row[r] += iota() + j >= block + r ? load(P + i) * load(dP + i) : vec{};
      }
    }
    store(x + block, all + sums(row));
  }
}

// The gate of the direction that comes the other way, in the order of this one.
struct Facing {
  alignas(64) float seen[C], kept[C];
  float across;
};

STAGE Facing facing(const Backward& a, const Walk& back, Gradients& s, int64_t far, int rows) {
  Facing f = {};
  set_gate(s.other, a, back, far, rows, NOTHING, false, s.Kp);
  for (int r = 0; r < rows; ++r) f.seen[r] = s.other.seen[rows - 1 - r], f.kept[r] = s.other.kept[rows - 1 - r];
  f.across = s.other.across;
  return f;
}

// What the second walk pins the sums with: S and dS of the first walk every ANCHOR tokens.
INLINE void keep_anchor(Gradients& s, int64_t m) {
  __builtin_memcpy(s.anchors + m * s.state, s.S, s.state * 4), __builtin_memcpy(s.far + m * s.state, s.dS, s.state * 4);
  __builtin_memcpy(s.anchors_z + m * s.Kp, s.z, size_t(s.Kp) * 4), __builtin_memcpy(s.far_z + m * s.Kp, s.dz, size_t(s.Kp) * 4);
}
INLINE void pin_left(const Backward& a, const Gradients& s, int64_t m) {
  pin(s, s.anchors + m * s.state, s.dS, s.anchors_z + m * s.Kp, s.dz, a.normalize != PLAIN, false);
}

// The second walk `w` has come to an anchor: the sum of its own scan, which ends on the left, starts there; the other one's is pinned anew.
STAGE void finish_stretch(const Backward& a, const Walk& w, const Walk& back, Gradients& s, int64_t begin) {
  const int64_t m = begin / ANCHOR, end = begin + least(ANCHOR, w.length - begin);
  pin(s, s.S, s.far + m * s.state, s.z, s.far_z + m * s.Kp, a.normalize != PLAIN, false);
  float sum = s.running[0];
  for (int64_t i = begin; i < end; ++i) {
    float& dg = a.dg[dg_index(a, w, back.token(i))];
    const float before = sum;
    sum += dg;
    dg = w.leaving ? before : sum;
  }
  pin_left(a, s, m);
}

// One chunk of walk `w`: what its direction's states give to dq, and what the gradients of the states of `back` give to dk and dv.
STAGE void shared_chunk(const Backward& a, const Walk& w, const Walk& back, Gradients& s, int64_t p, int rows) {
  const int Kp = s.Kp, Vp = s.Vp;
  const bool first = !w.reverse, normal = a.normalize != PLAIN, decays = a.decay != NONE;
  const int64_t far = w.length - p - rows, next = far ? p + rows : p;
  if (decays && first && p % ANCHOR == 0) keep_anchor(s, p / ANCHOR);
  load_chunk(a, w, s, p, rows, first ? FULL : NOTHING, a.gating != TARGET);
  const Facing f = facing(a, back, s, far, rows);
  const float *seen = decays ? s.gate.seen : nullptr, *kept = decays ? f.kept : nullptr;
  transpose(s.k, Kp, C, Kp, s.kT, C);
  if (first) transpose(s.v, Vp, C, Vp, s.uT, C);
  Ahead keys = next_keys(a, w, next);
  emit_across(s.kT, Kp, s.dS, Vp, kept, s.wide, s.du, &keys);
  if (a.du) add_writes_gradient(a, w, back.direction, s, p, rows);
  alignas(64) float crossing[C] = {}, q_dq[C] = {}, k_dk[C] = {}, add_up[C];
  for (int64_t g = 0; g < a.G; ++g) {
    const int64_t h = w.h * a.G + g;
    Ahead queries(a), outputs(a);
    queries.also(span(a.grad, w, next, h), a.V).also(span(a.q, w, next, h), a.K);
    if (!first) outputs.also(span(a.dq, w, next, h), a.K).also(span(a.dk, w, next, w.h), a.K).also(span(a.dv, w, next, w.h), a.V);
    load_rows(span(a.q, w, p, h), rows, int(a.K), a.scale, s.q, Kp);
    load_grad(a, w, s, p, rows, h, 1.0f);
    if (first) {
      products(s.dn, Vp, s.uT, nullptr, normal ? s.dd : nullptr, ALL, s.dP);
      products(s.q, Kp, s.kT, s.gate.D, nullptr, ALL, s.P);
      if (decays) add_crossing(s.P, s.dP, crossing);
      for (int i = 0; i < C * C; i += LANES) store(s.dP + i, load(s.dP + i) * load(s.gate.D + i));
    }
    emit(s.dn, Vp, s.S, Kp, seen, first ? s.dP : nullptr, ALL, s.k, s.dq, Kp, &queries);
    alignas(64) float weight[C];
    for (int r = 0; r < C; ++r) weight[r] = s.dd[r] * s.gate.seen[r];
    if (normal) finish_read(s.dq, Kp, weight, s.z, nullptr);
    if (decays) dots(s.q, s.dq, Kp, add_up);
    for (int r = 0; r < C && decays; ++r) q_dq[r] += add_up[r];
    store_rows(s.dq, Kp, rows, int(a.K), a.scale, span(a.dq, w, p, h), !first);
    if (g == 0) {
      emit(s.v, Vp, s.dS, Kp, kept, first ? s.dP : nullptr, TRANSPOSED, s.q, s.dk, Kp);
      if (normal) finish_read(s.dk, Kp, f.kept, s.dz, nullptr);
    } else if (first) {
      gather(s.dP, TRANSPOSED, s.q, Kp, s.dk);
    }
    if (first) gather(s.P, TRANSPOSED, s.dn, Vp, s.du);
    const float across = g == 0 ? f.across : 1.0f;
    for (int r = 0; r < C; ++r) weight[r] = s.dd[r] * f.seen[r];
    if (normal) carry_z(s.dz, Kp, across, nullptr, s.q, weight);
    if (decays) scale_rows(s.q, f.seen, s.q, Kp);
    carry(s.dS, Vp, Kp, {across}, s.dn, false, s.q, &outputs);
  }
  store_rows(s.dk, Kp, rows, int(a.K), 1.0f, span(a.dk, w, p, w.h), !first);
  store_rows(s.du, Vp, rows, int(a.V), 1.0f, span(a.dv, w, p, w.h), !first);
  if (decays) dots(s.k, s.dk, Kp, k_dk);
  carry_transposed(a, s, s.v, normal);
  if (!decays) return;
  for (int r = 0; r < rows; ++r) {
    const int64_t token = w.token(p + r);
    float &mine = a.dg[dg_index(a, w, token)], &other = a.dg[dg_index(a, back, token)];
    if (first) {
      mine = q_dq[r] - crossing[r], other = crossing[r] - k_dk[r];
    } else {
      mine += q_dq[r];
      const float before = s.running[0], e = other - k_dk[r];
      s.running[0] = before + e;
      other = back.leaving ? before : s.running[0];
    }
  }
  if (!first && far % ANCHOR == 0) finish_stretch(a, w, back, s, far);
}

static void shared_backward(const Backward& a, Job job, Gradients& s) {
  for (int direction = 0; direction < 2; ++direction) {
    Walk w = make_walk(a, job, direction), back = make_walk(a, job, 1 - direction);
    w.own = 1.0f;
    enter(a, w, job, true, s.all_S, s.all_z, a.kv, a.z, a.seg_kv, a.seg_z);
    enter(a, back, job, true, s.all_dS, s.all_dz, a.dkv_out, a.dz_out, a.seg_dkv, a.seg_dz);
    const int64_t end = (w.length + ANCHOR - 1) / ANCHOR;
    const auto each_head = [&](auto&& f) {
      for (int i = 0; i < a.width; ++i, ++w.h, ++back.h) s.select(i), f();
      w.h -= a.width, back.h -= a.width;
    };
    if (w.reverse && a.decay != NONE) each_head([&] { pin_left(a, s, end); });
    int rows;
    for (int64_t p = 0; p < w.length; p += rows) {
      rows = least(C, w.length - p);
      if (w.reverse && p == 0 && w.length % C) rows = int(w.length % C);  // the grid of chunks is the one of the first walk
      each_head([&] { shared_chunk(a, w, back, s, p, rows); });
    }
    if (!w.reverse && a.decay != NONE) each_head([&] { keep_anchor(s, end); });
    if (job.segment == (back.reverse ? a.segments - 1 : 0)) leave(a, back, job, true, s.all_dS, s.all_dz, a.dkv, a.dz);
  }
}

}  // namespace linattn::LINATTN_ISA

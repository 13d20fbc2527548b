// The backward of heads of one sequence: a walk with the states for dq, and a walk against it with their gradients for the rest.
#pragma once
#include "both.h"

namespace linattn::LINATTN_ISA {

// First walk: dq, and q·dq of every token left in dg; keeps the anchors and, for the delta rule, the writes.
STAGE void query_chunk(const Backward& a, const Walk& w, Gradients& s, int64_t p, bool add) {
  const int Kp = s.Kp, Vp = s.Vp, rows = least(C, w.length - p);
  const size_t state = s.state;
  const bool normal = a.normalize != PLAIN, channel = a.decay == CHANNEL, decays = a.decay != NONE;
  const int64_t next = p + C < w.length ? p + C : p;
  Ahead ahead = next_keys(a, w, p + C);
  load_chunk(a, w, s, p, rows, TRIANGLE, false);
  if ((decays || a.delta) && p % s.anchor == 0) {
    __builtin_memcpy(s.anchors + p / s.anchor * state, s.S, size_t(state) * 4);
    __builtin_memcpy(s.anchors_z + p / s.anchor * Kp, s.z, size_t(Kp) * 4);
  }
  const float* u = s.v;
  if (a.delta) {
    if (!channel) transpose(s.k, Kp, C, Kp, s.kT, C);
    delta_write(a, w, s, p, rows, true);
    u = s.u;
    store_rows(s.w, Vp, rows, int(a.V), 1.0f, writes_span(a, w, s, p), false);
  }
  transpose(u, Vp, C, Vp, s.uT, C);
  for (int i = 0; i < (channel ? C * Kp : C) && decays; i += LANES) store(s.stash + i, vec{});
  for (int64_t h = w.h * a.G; h < (w.h + 1) * a.G; ++h) {
    load_grad(a, w, s, p, rows, h, a.scale);
    products(s.dn, Vp, s.uT, channel ? nullptr : s.gate.D, normal ? s.dd : nullptr, LOWER, s.dP);
    Ahead queries(a);
    queries.also(span(a.grad, w, next, h), a.V).also(span(a.q, w, next, h), a.K);
    const Span dq = span(a.dq, w, p, h);
    const bool direct = !dq.stream && rows == C && !dq.bf16 && a.K == Kp && !normal && !decays && !add;  // straight to memory, without the tile
    emit(s.dn, Vp, s.S, Kp, channel || !decays ? nullptr : s.gate.seen, channel ? nullptr : s.dP, LOWER, s.k,
         direct ? reinterpret_cast<float*>(dq.p) : s.dq, direct ? dq.step : Kp, &queries);
    if (direct) continue;
    if (channel) {
      finish_read(s.dq, Kp, normal ? s.dd : nullptr, s.z, s.gate.seen_k);
      keep_triangle(s.dP, w.own);
      channel_gather(s.dP, s.k, s.gate, Kp, s.dq);
    } else if (normal) {
      for (int r = 0; r < C; ++r) s.dd[r] *= s.gate.seen[r];
      finish_read(s.dq, Kp, s.dd, s.z, nullptr);
    }
    if (decays) {
      load_rows(span(a.q, w, p, h), rows, int(a.K), 1.0f, s.q, Kp);
      if (channel)
        for (int i = 0; i < C * Kp; i += LANES) store(s.stash + i, load(s.stash + i) + load(s.q + i) * load(s.dq + i));
      else {
        alignas(64) float add_up[C];
        dots(s.q, s.dq, Kp, add_up);
        for (int r = 0; r < C; ++r) s.stash[r] += add_up[r];
      }
    }
    store_rows(s.dq, Kp, rows, int(a.K), 1.0f, dq, add);
  }
  if (channel) {
    store_rows(s.stash, Kp, rows, int(a.K), 1.0f, gate_span(a.dg + w.direction * a.B * a.T * a.H * a.K, a, w, p, a.K), false);
  } else if (decays) {
    for (int r = 0; r < rows; ++r) a.dg[dg_index(a, w, w.token(p + r))] = s.stash[r];
  }
  carry_transposed(a, s, u, normal, &ahead);
}

// Second walk, chunks from last to first: dk, dv, dbeta, dlog_decay, and the gradient of the state that entered.
STAGE void key_chunk(const Backward& a, const Walk& w, Gradients& s, int64_t p, bool add) {
  const int Kp = s.Kp, Vp = s.Vp, rows = least(C, w.length - p);
  const size_t state = s.state;
  const bool normal = a.normalize != PLAIN, channel = a.decay == CHANNEL, decays = a.decay != NONE;
  Gate& gate = s.gate;
  float* running = s.running;  // of the log-decay gradient, from the end
  const int64_t last = (w.length - 1) / C * C;
  if (decays && p == last) pin(s, s.S, s.dS, s.z, s.dz, normal, channel);
  const int64_t end = p + C;
  float beta[C], A[C * C];
  if (a.delta && (p == last || end % s.anchor == 0)) {  // rebuild the states of this stretch from its anchor
    const int64_t from = p / s.anchor * s.anchor;
    __builtin_memcpy(s.group, s.anchors + p / s.anchor * state, size_t(state) * 4);
    for (int64_t m = from; m < p; m += C) {
      load_keys(a, w, s, m, C, NOTHING, false);
      load_writes(a, w, s, m, C, beta);
      s.S = s.group + ((m - from) / C + 1) * state;
      carry_transposed(a, s, s.u, false, nullptr, s.S - state);
    }
  }
  if (decays && p != last && end % s.anchor == 0)
    pin(s, s.anchors + end / s.anchor * state, s.dS, s.anchors_z + end / s.anchor * Kp, s.dz, normal, channel);
  load_keys(a, w, s, p, rows, TRIANGLE, false);
  if (!channel) transpose(s.k, Kp, C, Kp, s.kT, C);
  const float* u = s.v;
  if (a.delta) {
    s.S = s.group + p % s.anchor / C * state;
    load_writes(a, w, s, p, rows, beta);
    keys_meet(a, s, A);
    u = s.u;
  } else {
    load_rows(span(a.v, w, p, w.h), rows, int(a.V), 1.0f, s.v, Vp);
  }
  transpose(u, Vp, C, Vp, s.uT, C);
  // carry: what the chunk left in the state
  const float* keepers = s.kT;
  if (channel) {
    scale_tile(s.k, gate.kept_k, s.q_seen, Kp);
    transpose(s.q_seen, Kp, C, Kp, s.dq, C);
    keepers = s.dq;
  }
  const int64_t next = p >= C ? p - C : p;
  Ahead ahead = next_keys(a, w, p - C);
  if (channel) ahead.also(gate_span(a.dg + w.direction * a.B * a.T * a.H * a.K, a, w, next, a.K), a.K);
  emit_across(keepers, Kp, s.dS, Vp, channel || !decays ? nullptr : gate.kept, s.wide, s.du, &ahead);
  if (a.du) add_writes_gradient(a, w, w.direction, s, p, rows);
  const Span dk = span(a.dk, w, p, w.h);
  const bool direct = !dk.stream && rows == C && !dk.bf16 && a.K == Kp && a.G == 1 && !normal && !decays && !a.delta && !add;
  Across across;
  const float* reads = s.q_seen;
  // emit
  for (int64_t g = 0; g < a.G; ++g) {
    const int64_t h = w.h * a.G + g;
    load_rows(span(a.q, w, p, h), rows, int(a.K), a.scale, s.q, Kp);
    load_grad(a, w, s, p, rows, h, 1.0f);
    products(s.dn, Vp, s.uT, channel ? nullptr : gate.D, normal ? s.dd : nullptr, LOWER, s.dP);
    const bool first = g == 0;
    if (first) {
      emit(u, Vp, s.dS, Kp, channel || !decays ? nullptr : gate.kept, channel ? nullptr : s.dP, LOWER_TRANSPOSED, s.q,
           direct ? reinterpret_cast<float*>(dk.p) : s.dk, direct ? dk.step : Kp);
      float ones[C];
      for (float& x : ones) x = 1.0f;
      if (channel || normal) finish_read(s.dk, Kp, !normal ? nullptr : channel ? ones : gate.kept, s.dz, channel ? gate.kept_k : nullptr);
    }
    Ahead queries(a);
    queries.also(span(a.grad, w, next, h), a.V).also(span(a.q, w, next, h), a.K);
    if (channel) {
      channel_products(s.q, s.k, gate, Kp, w.own, s.P);
      keep_triangle(s.dP, w.own);
      channel_scatter(s.dP, s.q, gate, Kp, s.dk);
      scale_tile(s.q, gate.seen_k, s.q_seen, Kp);
      gather(s.P, LOWER_TRANSPOSED, s.dn, Vp, s.du);
      across = {1.0f, nullptr, first ? gate.across_k : nullptr};
      if (normal) carry_z(s.dz, Kp, 1.0f, first ? gate.across_k : nullptr, s.q_seen, s.dd);
    } else {
      products(s.q, Kp, s.kT, gate.D, nullptr, LOWER, s.P);
      if (!first) gather(s.dP, LOWER_TRANSPOSED, s.q, Kp, s.dk);
      gather(s.P, LOWER_TRANSPOSED, s.dn, Vp, s.du);
      across = {first ? gate.across : 1.0f};
      if (decays) {
        for (int r = 0; r < C; ++r) s.dd[r] *= gate.seen[r];
        scale_rows(s.q, gate.seen, s.q_seen, Kp);
      }
      reads = decays ? s.q_seen : s.q;
      if (normal) carry_z(s.dz, Kp, across.all, nullptr, s.q, s.dd);
    }
    if (!a.delta || g + 1 < a.G) carry(s.dS, Vp, Kp, across, s.dn, false, reads, &queries);
  }
  if (a.delta) {  // write: du becomes the gradient of v
    scale_rows(A, beta, s.M, C);
    solve(s.M, true, s.du, Vp);
    products(s.du, Vp, s.uT, nullptr, nullptr, LOWER, s.dP);  // −dM, its lower triangle
    keep_triangle(s.dP, 0.0f);
    alignas(64) float dbeta[C];
    dots(s.du, s.w, Vp, dbeta);
    for (int r = 0; r < rows; ++r) a.dbeta[dg_index(a, w, w.token(p + r))] = dbeta[r];
    float minus[C];
    for (int r = 0; r < C; ++r) minus[r] = -beta[r];
    scale_rows(s.dP, minus, s.dP, C);  // beta · dM
    scale_rows(s.du, beta, s.du, Vp);
    emit(s.du, Vp, s.S, Kp, channel ? nullptr : gate.seen, nullptr, ALL, nullptr, s.dk_read, Kp);
    if (channel) finish_read(s.dk_read, Kp, nullptr, nullptr, gate.seen_k);
    for (int i = 0; i < C * Kp; i += LANES) store(s.dk_read + i, -load(s.dk_read + i));
    if (channel) {
      channel_gather(s.dP, s.k, gate, Kp, s.dk_read);
      channel_scatter(s.dP, s.k, gate, Kp, s.dk);
    } else {
      for (int i = 0; i < C * C; i += LANES) store(s.dP + i, load(s.dP + i) * load(gate.D + i));
      gather(s.dP, LOWER, s.k, Kp, s.dk_read);
      gather(s.dP, LOWER_TRANSPOSED, s.k, Kp, s.dk);
    }
    for (int i = 0; i < C * Kp; i += LANES) store(s.k_seen + i, -load(s.k_seen + i));
    Ahead queries(a);
    queries.also(span(a.grad, w, next, w.h * a.G), a.V).also(span(a.q, w, next, w.h * a.G), a.K);
    carry(s.dS, Vp, Kp, across, s.dn, false, reads, &queries, nullptr, s.du, s.k_seen);
  }
  if (decays) {  // gate: q·dq and k·dk_read pull the clock up, k·dk pulls it down; then a sum from the end
    if (channel)
      load_rows(gate_span(a.dg + w.direction * a.B * a.T * a.H * a.K, a, w, p, a.K), rows, int(a.K), 1.0f, s.stash, Kp);
    alignas(64) float k_dk[C], k_read[C] = {};
    if (!channel) dots(s.k, s.dk, Kp, k_dk);
    if (!channel && a.delta) dots(s.k, s.dk_read, Kp, k_read);
    for (int r = rows - 1; r >= 0 && channel; --r)
      for (int c = 0; c < Kp; c += LANES) {
        const int i = r * Kp + c;
        const vec before = load(running + c), dk_read = a.delta ? load(s.dk_read + i) : vec{};
        const vec sum = before + load(s.stash + i) + load(s.k + i) * (dk_read - load(s.dk + i));
        store(s.stash + i, w.leaving ? before : sum);
        store(running + c, sum);
      }
    if (channel) store_rows(s.stash, Kp, rows, int(a.K), 1.0f, gate_span(a.dg + w.direction * a.B * a.T * a.H * a.K, a, w, p, a.K), false);
    for (int r = rows - 1; r >= 0 && !channel; --r) {
      float& dg = a.dg[dg_index(a, w, w.token(p + r))];
      const float before = running[0];
      running[0] += dg + k_read[r] - k_dk[r];
      dg = w.leaving ? before : running[0];
    }
  }
  for (int i = 0; i < C * Kp && a.delta; i += LANES) store(s.dk + i, load(s.dk + i) + load(s.dk_read + i));
  if (!direct) store_rows(s.dk, Kp, rows, int(a.K), 1.0f, dk, add);
  store_rows(s.du, Vp, rows, int(a.V), 1.0f, span(a.dv, w, p, w.h), add);
  if (a.dbkv && p % a.stride == 0) {
    const int64_t mark = ((w.direction * a.B + w.b) * a.rows + w.boundary + p / a.stride) * a.H + w.h;
    for (int c = 0; c < a.K; ++c)
      for (int i = 0; i < a.V; ++i) s.dS[i * Kp + c] += a.dbkv[(mark * a.K + c) * a.V + i];
    for (int c = 0; c < a.K && a.dbz; ++c) s.dz[c] += a.dbz[mark * a.K + c];
  }
}

STAGE void query_walk(const Backward& a, const Walk& w, Gradients& s, bool add) {
  each_chunk(a, w, s, [&](const Walk& at, int64_t p, int) { query_chunk(a, at, s, p, add); });
}

STAGE void key_walk(const Backward& a, Walk w, Gradients& s, bool add) {
  for (int64_t p = (w.length + C - 1) / C * C - C; p >= 0; p -= C, w.h -= a.width)
    for (int i = 0; i < a.width; ++i, ++w.h) {
      s.select(i);
      key_chunk(a, w, s, p, add);
    }
}

static void backward_job(const Backward& a, Job job, float* scratch) {
  Scratch take{scratch};
  Gradients s(a, take);
  if (!a.causal && a.decay == NONE && !a.delta && !a.dbkv && !a.du) {
    whole_backward(a, job, s);
    return drain();
  }
  if (Gradients::shares(a)) {
    shared_backward(a, job, s);
    return drain();
  }
  for (int direction = 0; direction < (a.causal ? 1 : 2); ++direction) {
    const Walk w = make_walk(a, job, direction);
    enter(a, w, job, true, s.all_S, s.all_z, a.kv, a.z, a.seg_kv, a.seg_z);
    query_walk(a, w, s, direction == 1);
    enter(a, w, job, true, s.all_dS, s.all_dz, a.dkv_out, a.dz_out, a.seg_dkv, a.seg_dz);
    key_walk(a, w, s, direction == 1);
    if (job.segment == (w.reverse ? a.segments - 1 : 0)) leave(a, w, job, true, s.all_dS, s.all_dz, a.dkv, a.dz);
  }
  drain();
}

// What a segment adds to the gradient of the state that enters it; dS lies [Kp Vp] here.
static void backward_aggregate(const Backward& a, Job job, float* scratch) {
  Scratch take{scratch};
  Gradients s(a, take);
  const int Kp = s.Kp, Vp = s.Vp;
  const bool channel = a.decay == CHANNEL;
  Gate& gate = s.gate;
  for (int direction = 0; direction < (a.causal ? 1 : 2); ++direction) {
    const Walk w = make_walk(a, job, direction);
    __builtin_memset(s.dS, 0, size_t(Kp) * Vp * 4);
    __builtin_memset(s.dz, 0, size_t(Kp) * 4);
    for (int64_t p = (w.length - 1) / C * C; p >= 0 && w.length; p -= C) {
      const int rows = least(C, w.length - p);
      float beta[C], A[C * C];
      set_gate(gate, a, w, p, rows, TRIANGLE, false, Kp);
      if (a.delta) {  // du, the gradient of what is written
        load_rows(span(a.k, w, p, w.h), rows, int(a.K), 1.0f, s.k, Kp);
        load_beta(a, w, p, rows, beta);
        if (!channel) transpose(s.k, Kp, C, Kp, s.kT, C);
        keys_meet(a, s, A);
        channel ? scale_tile(s.k, gate.kept_k, s.dk, Kp) : scale_rows(s.k, gate.kept, s.dk, Kp);
        emit(s.dk, Kp, s.dS, Vp, nullptr, nullptr, ALL, nullptr, s.du, Vp);
        if (a.du) add_writes_gradient(a, w, w.direction, s, p, rows);
      }
      for (int64_t g = 0; g < a.G; ++g) {
        const int64_t h = w.h * a.G + g;
        load_rows(span(a.q, w, p, h), rows, int(a.K), a.scale, s.q, Kp);
        load_grad(a, w, s, p, rows, h, 1.0f);
        if (a.delta) {
          channel ? channel_products(s.q, s.k, gate, Kp, w.own, s.P) : products(s.q, Kp, s.kT, gate.D, nullptr, LOWER, s.P);
          gather(s.P, LOWER_TRANSPOSED, s.dn, Vp, s.du);
        }
        channel ? scale_tile(s.q, gate.seen_k, s.q_seen, Kp) : scale_rows(s.q, gate.seen, s.q_seen, Kp);
        const Across across = {channel || g ? 1.0f : gate.across, channel && !g ? gate.across_k : nullptr};
        carry(s.dS, Kp, Vp, across, s.q_seen, false, s.dn);
        carry_z(s.dz, Kp, across.all, across.row, s.q_seen, s.dd);
      }
      if (!a.delta) continue;
      scale_rows(A, beta, s.M, C);
      solve(s.M, true, s.du, Vp);
      for (float& x : beta) x = -x;
      scale_rows(s.du, beta, s.du, Vp);
      carry(s.dS, Kp, Vp, {1.0f}, s.k_seen, false, s.du);
    }
    const int64_t at = segment_index(a, w, job);
    store_state(s.dS, int(a.K), int(a.V), false, a.seg_dkv + at * a.K * a.V);
    __builtin_memcpy(a.seg_dz + at * a.K, s.dz, size_t(a.K) * 4);
  }
}

}  // namespace linattn::LINATTN_ISA

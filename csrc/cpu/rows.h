// Between memory and tiles: rows of tensors, states, and what is asked for ahead. Tiles are float32, padded to 16, in scratch.
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
  if (y.stream && !add) {  // row by row: lines of several rows in turn fill slower (by a fifth of a whole forward on Zen 3)
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < width; i += LANES) stream(reinterpret_cast<float*>(y.p) + r * y.step + i, load(tile + r * ld + i) * factor);
    return;
  }
  for (int r = 0; r < rows; ++r) store_row(tile + r * ld, y.p + r * y.step * (y.bf16 ? 2 : 4), y.bf16, width, factor, add);
}

// Rows of the next chunk, of up to four tensors, asked for a line or a few at a time, between products, and all of them by the end of a stage
// over a state: a core has a dozen or so misses in flight, and more at once would hold up the loads of the state.
struct Ahead {
  const char* line[4];
  int64_t jump[4];  // bytes from the end of a row to the next
  int lines[4], done[4] = {}, rows[4] = {C, C, C, C}, count = 0, burst;
  explicit Ahead(const Call& a) : burst(least(pad(a.K), pad(a.V)) < 64 ? 64 / least(pad(a.K), pad(a.V)) : 1) {}
  INLINE_MEMBER Ahead& also(Span x, int64_t width) {
    const int bytes = int(width) * (x.bf16 ? 2 : 4);
    line[count] = x.p, lines[count] = (bytes + 63) / 64;
    jump[count] = x.step * (x.bf16 ? 2 : 4) - lines[count] * 64;
    ++count;
    return *this;
  }
  INLINE_MEMBER void ask() {
    for (int n = 0; n < count; ++n)
      for (int i = 0; i < burst && rows[n]; ++i) {
        __builtin_prefetch(line[n], 0, 2);
        line[n] += 64;
        if (++done[n] == lines[n]) line[n] += jump[n], done[n] = 0, --rows[n];
      }
  }
};

// State `at` of many; of none, none: it is zeros to read, and not there to write.
template <class T>
INLINE T* one_of(T* states, int64_t at, int64_t size) { return states ? states + at * size : nullptr; }

// A contiguous [K V] state in memory to and from a padded tile, [Kp Vp] or, where `transposed`, [Vp Kp].
STAGE void load_state(const float* from, int K, int V, bool transposed, float* to) {
  const int Kp = pad(K), Vp = pad(V);
  if (!from) {
    __builtin_memset(to, 0, size_t(Kp) * Vp * 4);
    return;
  }
  if (K == Kp && V == Vp) {
    if (transposed) return transpose(from, V, K, V, to, K);
    __builtin_memcpy(to, from, size_t(K) * V * 4);
    return;
  }
  for (int r = 0; r < Kp; ++r)
    for (int i = 0; i < Vp; ++i) to[transposed ? i * Kp + r : r * Vp + i] = r < K && i < V ? from[r * V + i] : 0.0f;
}
STAGE void store_state(const float* from, int K, int V, bool transposed, float* to) {
  if (!to) return;
  const int Kp = pad(K), Vp = pad(V);
  if (K == Kp && V == Vp) {
    if (transposed) return transpose(from, K, V, K, to, V);
    __builtin_memcpy(to, from, size_t(K) * V * 4);
    return;
  }
  for (int r = 0; r < K; ++r)
    for (int i = 0; i < V; ++i) to[r * V + i] = from[transposed ? i * Kp + r : r * Vp + i];
}
STAGE void load_row_sums(const float* from, int K, float* to) {
  for (int r = 0; r < pad(K); ++r) to[r] = from && r < K ? from[r] : 0.0f;
}
STAGE void store_row_sums(const float* from, int K, float* to) {
  if (to) __builtin_memcpy(to, from, size_t(K) * 4);
}

}  // namespace linattn::LINATTN_ISA

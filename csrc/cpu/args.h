// What crosses from the bindings to a kernel: pointers, sizes and strides. No torch here.
#pragma once
#include <cstddef>
#include <cstdint>

namespace linattn {

enum Decay { NONE, HEAD, SCALAR, CHANNEL };
enum Gating { SOURCE, TARGET, SYMMETRIC };
enum Normalize { PLAIN, SUM, CLAMP };

constexpr int C = 16;         // tokens per chunk. Short, so that the triangle above the diagonal wastes little; S passes L1 once per chunk
constexpr int ANCHOR = 128;   // tokens between the states the backward keeps to pin the log-decay gradient (a multiple of C)

// A [B T H width] tensor: float32 or, where `bf16`, bfloat16; rows contiguous, any other strides (in elements).
struct Rows {
  char* p;
  bool bf16;
  int64_t b, t, h;
  bool stream = false;  // an output so large that it would only drive the inputs from the caches: it goes around them
};

struct Call {
  int64_t B, T, H, G, K, V;  // G query heads per head of k and v
  int64_t sequences;         // B, or the number of packed ones
  const int64_t* ends;       // [sequences + 1] of packed sequences, or null
  Decay decay;
  Gating gating;
  Normalize normalize;
  bool causal, delta;
  float scale, eps;
  int64_t stride, rows;      // tokens between recorded boundaries (0: none), and their rows per batch entry
  Rows q, k, v;              // [B T G·H K], [B T H K], [B T H V]
  const float* g;            // contiguous log decay of its kind, or null
  const float* beta;         // [B T H] or null
  const float *kv, *z;       // initial states [D N H K V], [D N H K], or null: zeros
  int width;                 // heads walked side by side: they share pages of memory, and a page is worth its look-up
  int segments;              // each sequence is cut into this many for parallelism
};

struct Forward : Call {
  Rows o;                    // [B T G·H V]
  float *kv_out, *z_out;     // as kv, z; null where nobody wants them
  float* d;                  // [B T G·H] row sums, where normalised
  float *bkv, *bz;           // boundaries [D B rows H K V], [D B rows H K], or null
  float* u;                  // writes [D B T H V], or null
  float *seg_kv, *seg_z;     // [D N H segments K V]: first what a segment adds, then what enters it
  float* seg_fade;           // [D N H segments K]
  float* seg_turn;           // [D N H segments K K], delta rule: what a segment makes of the state that enters it, but for what it adds
};

struct Backward : Forward {  // o and d hold the forward's results; kv_out … u are unused
  Rows grad;                 // do
  const float *dkv_out, *dz_out, *dbkv, *dbz, *du;  // null: zeros
  Rows dq, dk, dv;
  float *dg, *dbeta;         // [D B T H (K)], [D B T H]
  float *dkv, *dz;           // null where nobody wants them
  float *seg_dkv, *seg_dz;   // the same two of the gradient states
};

struct Step {
  int64_t B, H, G, K, V;
  Decay decay;
  Normalize normalize;
  bool bf16;
  float scale, eps;
  const void *q, *k, *v;     // contiguous [B G·H K], [B H K], [B H V]
  const float *g, *beta, *kv, *z;
  bool g_per_head;           // g is [H], not [B H] or [B H K]
  void* o;
  float *kv_out, *z_out;
};

// One unit of parallel work: `width` heads of a sequence from h on, or one segment of them.
struct Job {
  int64_t n, h, segment;
};

struct Kernels {
  const char* isa;
  size_t (*scratch)(const Call&, bool backward);  // floats a thread needs
  void (*forward)(const Forward&, Job, float* scratch);
  void (*forward_aggregate)(const Forward&, Job, float* scratch);
  void (*backward)(const Backward&, Job, float* scratch);
  void (*backward_aggregate)(const Backward&, Job, float* scratch);
  size_t (*turn_scratch)(const Call&);
  void (*turn)(const Call&, const float* R, bool transposed, const float* S, float* out, float* scratch);  // out = R S, or Rᵀ S
  size_t (*step_scratch)(const Step&);
  void (*step)(const Step&, int64_t first, int64_t last, float* scratch);  // heads first … last of B·H
};

#ifdef LINATTN_EACH_ISA
#define LINATTN_DECLARE(isa) namespace isa { extern const Kernels kernels; }
LINATTN_EACH_ISA(LINATTN_DECLARE)
#undef LINATTN_DECLARE
#endif

}  // namespace linattn

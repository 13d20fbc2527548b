// The only file that knows torch: allocates outputs, cuts the work, picks the instruction set. Long, for tensors become pointers nowhere else.
// Shapes were checked in linattn/ops, but for those of `step`.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <optional>
#include <string>
#include <tuple>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "args.h"

// In torch since 2.11; without it large outputs are torch's own.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                                                int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index,
                                                                AtenTensorHandle* out, int32_t layout, const uint8_t* metadata,
                                                                int64_t metadata_size, void (*deleter)(void*, void*), void* context);

namespace linattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

bool runs(const Kernels& k) {
  const std::string isa = k.isa;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return isa == "plain";
}

// The widest kernels that this machine runs, or those named; null where it cannot run those.
const Kernels* find(const std::string& name) {
#define LINATTN_TRY(isa) \
  if ((name.empty() || name == #isa) && runs(isa::kernels)) return &isa::kernels;
  LINATTN_EACH_ISA(LINATTN_TRY)
#undef LINATTN_TRY
  return nullptr;
}

const Kernels*& chosen() {
  static const Kernels* best = find("");
  return best;
}
const Kernels& kernels() { return *chosen(); }

// Large outputs come from here. What the system hands out fresh, and takes back at once, costs as much in page faults as the arithmetic
// that fills it; so a freed block is kept for the next output of its size, up to LIMIT bytes in all, and large ones are of huge pages.
class Pages {
 public:
  static constexpr size_t SMALLEST = size_t(1) << 18, HUGE = size_t(1) << 21, LIMIT = size_t(1) << 30;
  static size_t whole(size_t bytes) {  // in units of 64 KiB, or of huge pages
    const size_t unit = bytes < HUGE ? size_t(1) << 16 : HUGE;
    return (bytes + unit - 1) / unit * unit;
  }
  void* take(size_t bytes) {
    {
      std::lock_guard<std::mutex> hold(lock);
      for (auto block = kept.begin(); block != kept.end(); ++block)
        if (block->second >= bytes && block->second <= bytes + bytes / 4) {
          void* p = block->first;
          total -= block->second;
          kept.erase(block);
          return p;
        }
    }
    void* p = std::aligned_alloc(bytes < HUGE ? 4096 : HUGE, bytes);
#if defined(__linux__)
    if (p && bytes >= HUGE) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return p;
  }
  void give(void* p, size_t bytes) {
    std::lock_guard<std::mutex> hold(lock);
    kept.emplace_back(p, bytes);
    for (total += bytes; total > LIMIT; kept.erase(kept.begin())) {  // the oldest go first
      total -= kept.front().second;
      std::free(kept.front().first);
    }
  }

 private:
  std::mutex lock;
  std::vector<std::pair<void*, size_t>> kept;
  size_t total = 0;
};
Pages& pages() {
  static Pages* all = new Pages;  // never destroyed: tensors may outlive every static
  return *all;
}

Tensor make(const Tensor& like, std::vector<int64_t> shape, std::optional<ScalarType> type = ScalarType::Float) {
  const bool is_bf16 = (type ? *type : like.scalar_type()) == ScalarType::BFloat16;
  const int32_t code = is_bf16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
  size_t bytes = is_bf16 ? 2 : 4;
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = i + 1 < shape.size() ? strides[i + 1] * std::max<int64_t>(shape[i + 1], 1) : 1;
    bytes *= size_t(shape[i]);
  }
  AtenTensorHandle handle;
  if (bytes >= Pages::SMALLEST && torch_from_blob) {
    bytes = Pages::whole(bytes);
    void* p = pages().take(bytes);
    const auto release = [](void* block, void* size) { pages().give(block, reinterpret_cast<size_t>(size)); };
    if (p && torch_from_blob(p, int64_t(shape.size()), shape.data(), strides.data(), 0, code, aoti_torch_device_type_cpu(), -1, &handle,
                             aoti_torch_layout_strided(), nullptr, 0, release, reinterpret_cast<void*>(bytes)) == 0)
      return Tensor(handle);
    if (p) pages().give(p, bytes);
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
float* floats(const Tensor& x) { return x.mutable_data_ptr<float>(); }
const float* read(const Maybe& x) { return x ? x->const_data_ptr<float>() : nullptr; }
const float* read(const Tensor& x) { return x.const_data_ptr<float>(); }

Rows rows_of(const Tensor& x) {
  return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), x.scalar_type() == ScalarType::BFloat16, x.stride(0), x.stride(1), x.stride(2)};
}

// Of an output. Rows a vector can be streamed to: float32, from blocks of ours, and no cache would hold them until they are read.
Rows output_rows(const Tensor& x) {
  Rows rows = rows_of(x);
  rows.stream = !rows.bf16 && x.size(3) % 16 == 0 && size_t(rows.p) % 64 == 0 && x.numel() >= int64_t(2) << 20;
  return rows;
}

// A thread's scratch outlives the call, so that its pages are faulted in once.
struct Buffer {
  float* p = nullptr;
  size_t size = 0;
  float* at_least(size_t floats) {
    if (floats > size) {
      std::free(p);
      size = (floats + 4095) & ~size_t(4095);
      p = static_cast<float*>(std::aligned_alloc(4096, size * sizeof(float)));
    }
    return p;
  }
  ~Buffer() { std::free(p); }
};

float* thread_scratch(size_t floats) {
  thread_local Buffer buffer;
  return buffer.at_least(floats);
}

// A state that fades away ends in denormals, each a hundred times slower than a number; here they count as 0.
struct FlushDenormals {
#if defined(__x86_64__)
  const unsigned before = __builtin_ia32_stmxcsr();
  FlushDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#endif
};

// Run every job once. Jobs go to whichever thread is free; no result depends on which.
template <class F>
void run(int64_t jobs, size_t scratch, F&& job) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), jobs);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    float* s = thread_scratch(scratch);
    const FlushDenormals on;
    for (int64_t i; (i = next.fetch_add(1)) < jobs;) job(i, s);
  });
}

struct Ends {  // cu_seqlens in the width the kernels read
  std::vector<int64_t> at, longest_first;  // the order of work: a long sequence begun last would leave the other threads idle
  explicit Ends(const Maybe& cu) {
    if (!cu) return;
    for (int64_t i = 0; i < cu->numel(); ++i)
      at.push_back(cu->scalar_type() == ScalarType::Int ? cu->const_data_ptr<int32_t>()[i] : cu->const_data_ptr<int64_t>()[i]);
    longest_first.resize(at.size() - 1);
    std::iota(longest_first.begin(), longest_first.end(), 0);
    std::stable_sort(longest_first.begin(), longest_first.end(), [&](int64_t m, int64_t n) { return length(m) > length(n); });
  }
  int64_t length(int64_t n) const { return at[n + 1] - at[n]; }
};

void describe(Call& a, const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& g, const Maybe& beta, const Maybe& kv, const Maybe& z,
              const Ends& ends, double scale, bool causal, int64_t gating, int64_t normalize, double eps, int64_t stride) {
  a.B = q.size(0), a.T = q.size(1), a.H = k.size(2), a.G = q.size(2) / a.H, a.K = q.size(3), a.V = v.size(3);
  a.sequences = ends.at.empty() ? a.B : int64_t(ends.at.size()) - 1;
  a.ends = ends.at.empty() ? nullptr : ends.at.data();
  a.decay = !g ? NONE : g->dim() == 1 ? HEAD : g->dim() == 3 ? SCALAR : CHANNEL;
  a.gating = Gating(gating), a.normalize = Normalize(normalize), a.causal = causal, a.delta = beta.has_value();
  a.scale = float(scale), a.eps = float(eps);
  a.stride = stride;
  a.rows = stride == 0 ? 0 : a.sequences == 1 || !a.ends ? (a.T + stride - 1) / stride : a.T / stride + a.sequences;
  a.q = rows_of(q), a.k = rows_of(k), a.v = rows_of(v);
  a.g = read(g), a.beta = read(beta), a.kv = read(kv), a.z = read(z);
  // Fewer heads than threads: cut time too. Recorded boundaries want one walk. Under the delta rule segments are walked twice, the first time
  // with a state of K columns more, two and a half times the work: fewer than FEWEST would not pay.
  constexpr int FEWEST = 4;
  const int64_t heads = a.sequences * a.H, threads = torch::stable::get_num_threads();
  a.segments = stride || heads == 0 || heads >= threads ? 1 : int((threads + heads - 1) / heads);
  if (a.T < 4 * ANCHOR * a.segments || (a.delta && a.segments < FEWEST)) a.segments = 1;
  // Heads side by side, as long as every thread has a job, no job is more than a thread's share, and their states stay in the second cache.
  const int64_t longest = a.ends && heads ? ends.length(ends.longest_first[0]) : a.T, tokens = a.ends ? a.T : a.B * a.T;
  a.width = 1;
  for (int w : {2, 4})
    if (a.H % w == 0 && heads / w >= threads && longest * w * threads <= tokens * a.H && w * a.K * a.V <= 32768) a.width = w;
}

struct Segments {  // what each segment adds, then what enters it
  std::vector<float> kv, z, fade, turn;
  explicit Segments(const Call& a) {
    if (a.segments == 1) return;
    const size_t n = size_t(a.causal ? 1 : 2) * a.sequences * a.H * a.segments * a.K;
    kv.resize(n * a.V), z.resize(n), fade.resize(n), turn.resize(a.delta ? n * a.K : 0);
  }
  // In the order in which a walk, or one against it, meets the segments, turn the sums each adds into the states that enter each.
  void enter(const Call& a, const float* kv0, const float* z0, const Segments& across, bool backward) {
    const int64_t n = a.segments, heads = a.sequences * a.H, KV = a.K * a.V;
    run((a.causal ? 1 : 2) * heads, kernels().turn_scratch(a), [&](int64_t h, float* scratch) {
      std::vector<float> S(KV), next(KV), Z(a.K);
      if (kv0) std::copy_n(kv0 + h * KV, KV, S.begin());
      if (z0) std::copy_n(z0 + h * a.K, a.K, Z.begin());
      const bool from_end = (h >= heads) != backward;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = h * n + (from_end ? n - 1 - i : i);
        if (a.delta) kernels().turn(a, across.turn.data() + at * a.K * a.K, backward, S.data(), next.data(), scratch);
        for (int64_t c = 0; c < a.K; ++c) {
          const float fade = across.fade[at * a.K + c];
          float& z_in = z[at * a.K + c];
          const float z_next = fade * Z[c] + z_in;
          z_in = Z[c], Z[c] = z_next;
          for (int64_t j = c * a.V; j < (c + 1) * a.V; ++j) {
            float& in = kv[at * KV + j];
            const float leaves = (a.delta ? next[j] : fade * S[j]) + in;
            in = S[j], S[j] = leaves;
          }
        }
      }
    });
  }
};

// Job i; width and segments are never both above 1.
Job job_of(const Call& a, const Ends& ends, int64_t i) {
  const int64_t groups = a.H / a.width, n = i / (groups * a.segments);
  return {a.ends ? ends.longest_first[n] : n, i / a.segments % groups * a.width, i % a.segments};
}

// What nobody wants, or the call does not have, is not there. Types of results are those of the schemas in linattn/ops/cpu.py, to the letter.
Maybe make_if(bool wanted, const Tensor& like, std::vector<int64_t> shape) { return wanted ? Maybe(make(like, std::move(shape))) : std::nullopt; }
float* write(const Maybe& x) { return x ? floats(*x) : nullptr; }

std::tuple<Tensor, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe> forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& g, const Maybe& beta, const Maybe& kv, const Maybe& z, const Maybe& cu, double scale,
    bool causal, int64_t gating, int64_t normalize, double eps, int64_t stride, bool writes, bool final) {
  const Ends ends(cu);
  Forward a;
  describe(a, q, k, v, g, beta, kv, z, ends, scale, causal, gating, normalize, eps, stride);
  const int64_t D = causal ? 1 : 2;
  const bool normal = normalize != PLAIN;
  Tensor o = make(q, {a.B, a.T, a.H * a.G, a.V}, std::nullopt);
  Maybe kv_out = make_if(final, q, {D, a.sequences, a.H, a.K, a.V}), z_out = make_if(final && normal, q, {D, a.sequences, a.H, a.K});
  Maybe d = make_if(normal, q, {a.B, a.T, a.H * a.G}), u = make_if(writes, q, {D, a.B, a.T, a.H, a.V}), bkv, bz;
  if (stride) bkv = torch::stable::new_zeros(q, {D, a.B, a.rows, a.H, a.K, a.V}, ScalarType::Float);
  if (stride) bz = torch::stable::new_zeros(q, {D, a.B, normal ? a.rows : 0, a.H, a.K}, ScalarType::Float);
  a.o = output_rows(o);
  a.kv_out = write(kv_out), a.z_out = write(z_out), a.d = write(d), a.bkv = write(bkv), a.bz = write(bz), a.u = write(u);
  Segments seg(a);
  a.seg_kv = seg.kv.data(), a.seg_z = seg.z.data(), a.seg_fade = seg.fade.data(), a.seg_turn = seg.turn.data();
  const int64_t jobs = a.sequences * (a.H / a.width) * a.segments;
  const size_t scratch = kernels().scratch(a, false);
  if (a.segments > 1) {
    run(jobs, scratch, [&](int64_t i, float* s) { kernels().forward_aggregate(a, job_of(a, ends, i), s); });
    seg.enter(a, a.kv, a.z, seg, false);
  }
  run(jobs, scratch, [&](int64_t i, float* s) { kernels().forward(a, job_of(a, ends, i), s); });
  return {o, kv_out, z_out, d, bkv, bz, u};
}

// Gradients of q, k, v, log_decay and beta (bidirectional, or a decay per head: with leading axes [D B T], still to be summed), kv, z.
std::tuple<Tensor, Tensor, Tensor, Maybe, Maybe, Maybe, Maybe> backward(
    const Tensor& grad, const Maybe& dkv_out, const Maybe& dz_out, const Maybe& dbkv, const Maybe& dbz, const Maybe& du, const Tensor& q,
    const Tensor& k, const Tensor& v, const Maybe& g, const Maybe& beta, const Maybe& kv, const Maybe& z, const Maybe& cu, const Tensor& o,
    const Maybe& d, double scale, bool causal, int64_t gating, int64_t normalize, double eps, int64_t stride) {
  const Ends ends(cu);
  Backward a;
  describe(a, q, k, v, g, beta, kv, z, ends, scale, causal, gating, normalize, eps, stride);
  const int64_t D = causal ? 1 : 2;
  const auto sided = [&](std::vector<int64_t> shape) {
    if (D == 2) shape.insert(shape.begin(), D);
    return shape;
  };
  Tensor dq = make(q, {a.B, a.T, a.H * a.G, a.K}, std::nullopt), dk = make(q, {a.B, a.T, a.H, a.K}, std::nullopt);
  Tensor dv = make(q, {a.B, a.T, a.H, a.V}, std::nullopt);
  Maybe dg = make_if(a.decay != NONE, q, sided(a.decay == CHANNEL ? std::vector{a.B, a.T, a.H, a.K} : std::vector{a.B, a.T, a.H}));
  Maybe dbeta = make_if(a.delta, q, sided({a.B, a.T, a.H}));
  Maybe dkv = make_if(kv.has_value(), q, {D, a.sequences, a.H, a.K, a.V}), dz = make_if(z.has_value(), q, {D, a.sequences, a.H, a.K});
  a.o = rows_of(o), a.grad = rows_of(grad), a.dq = output_rows(dq), a.dk = output_rows(dk), a.dv = output_rows(dv);
  a.d = const_cast<float*>(read(d));
  a.dkv_out = read(dkv_out), a.dz_out = read(dz_out), a.du = read(du);
  a.dbkv = stride ? read(dbkv) : nullptr, a.dbz = dbz && dbz->numel() ? read(dbz) : nullptr;
  a.bkv = nullptr, a.u = nullptr;
  a.dg = write(dg), a.dbeta = write(dbeta), a.dkv = write(dkv), a.dz = write(dz);
  Segments seg(a), dseg(a);
  a.seg_kv = seg.kv.data(), a.seg_z = seg.z.data(), a.seg_fade = seg.fade.data(), a.seg_turn = seg.turn.data();
  a.seg_dkv = dseg.kv.data(), a.seg_dz = dseg.z.data();
  const int64_t jobs = a.sequences * (a.H / a.width) * a.segments;
  const size_t scratch = kernels().scratch(a, true);
  if (a.segments > 1) {
    run(jobs, scratch, [&](int64_t i, float* s) {
      kernels().forward_aggregate(a, job_of(a, ends, i), s);
      kernels().backward_aggregate(a, job_of(a, ends, i), s);
    });
    seg.enter(a, a.kv, a.z, seg, false);
    dseg.enter(a, a.dkv_out, a.dz_out, seg, true);
  }
  run(jobs, scratch, [&](int64_t i, float* s) { kernels().backward(a, job_of(a, ends, i), s); });
  return {dq, dk, dv, dg, dbeta, dkv, dz};
}

bool is(const Tensor& x, ScalarType type, std::initializer_list<int64_t> shape) {
  if (x.dim() != int64_t(shape.size()) || x.scalar_type() != type || !x.is_contiguous()) return false;
  const int64_t* size = shape.begin();
  for (int64_t i = 0; i < x.dim(); ++i)
    if (x.size(i) != size[i]) return false;
  return true;
}

// Nothing where the arguments do not fit together as they are: checked here, for in Python that takes longer than the token.
std::tuple<Maybe, Maybe, Maybe> step(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& g, const Maybe& beta, const Tensor& kv,
                                     const Maybe& z, std::optional<double> scale, int64_t normalize, double eps) {
  const ScalarType type = q.scalar_type(), full = ScalarType::Float;
  if (q.dim() != 3 || k.dim() != 3 || v.dim() != 3 || (type != full && type != ScalarType::BFloat16)) return {};
  Step a;
  a.B = k.size(0), a.H = k.size(1), a.K = k.size(2), a.V = v.size(2);
  if (a.H == 0 || a.K == 0 || a.V == 0 || q.size(1) == 0 || q.size(1) % a.H) return {};
  a.G = q.size(1) / a.H;
  if (!is(q, type, {a.B, a.H * a.G, a.K}) || !is(k, type, {a.B, a.H, a.K}) || !is(v, type, {a.B, a.H, a.V})) return {};
  if (!is(kv, full, {a.B, a.H, a.K, a.V}) || z.has_value() != (normalize != PLAIN) || (z && !is(*z, full, {a.B, a.H, a.K}))) return {};
  if (g && !is(*g, full, {a.H}) && !is(*g, full, {a.B, a.H}) && !is(*g, full, {a.B, a.H, a.K})) return {};
  if (beta && !is(*beta, full, {a.B, a.H})) return {};
  a.decay = !g ? NONE : g->dim() == 3 ? CHANNEL : SCALAR;
  a.g_per_head = g && g->dim() == 1;
  a.normalize = Normalize(normalize), a.bf16 = type == ScalarType::BFloat16;
  a.scale = float(scale.value_or(1 / std::sqrt(double(a.K)))), a.eps = float(eps);
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
  a.g = read(g), a.beta = read(beta), a.kv = read(kv), a.z = read(z);
  Tensor o = make(q, {a.B, a.H * a.G, a.V}, std::nullopt), kv_out = make(q, {a.B, a.H, a.K, a.V});
  Maybe z_out = make_if(normalize != PLAIN, q, {a.B, a.H, a.K});
  a.o = o.mutable_data_ptr(), a.kv_out = floats(kv_out), a.z_out = write(z_out);
  const int64_t heads = a.B * a.H, grain = std::max<int64_t>(1, 65536 / (a.K * a.V));  // below 64k numbers a second thread costs more than it brings
  torch::stable::parallel_for(0, heads, grain, [&](int64_t first, int64_t last) {
    const FlushDenormals on;
    kernels().step(a, first, last, thread_scratch(kernels().step_scratch(a)));
  });
  return {o, kv_out, z_out};
}

// The instruction set in use; with a name, the one to use from now on.
std::string isa(std::optional<std::string> use) {
  if (use) {
    const Kernels* other = find(*use);
    if (!other) throw std::invalid_argument("use must name an instruction set built in and run by this machine; got '" + *use + "'");
    chosen() = other;
  }
  return kernels().isa;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linattn, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&forward));
  m.impl("cpu_backward", TORCH_BOX(&backward));
  m.impl("cpu_step", TORCH_BOX(&step));
}
STABLE_TORCH_LIBRARY_IMPL(linattn, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }

}  // namespace linattn

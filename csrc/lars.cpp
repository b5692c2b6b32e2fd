// LARS on a CPU, and the table of tensors, from which the CUDA code works too.
//
// Bytes a parameter, float32 gradients: 8 for the norms (w, g), 20 for the update (w, g, v read; w, v written).
#include "lars.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

// Two versions of a function, of which the loader takes the one that the machine can run: with SSE2 alone a step of a
// ResNet-50 takes 10.7 ms and not 7.5 (two cores of an EPYC), with AVX-512 no less than with AVX2.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define DOGO_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define DOGO_CLONES
#endif

namespace dogo {
namespace {

constexpr int64_t kChunk = 1 << 14;
// Tensors of so many elements get their norms and then their updates, which find w and g (4 MiB) in the cache: 7.5 ms
// for a ResNet-50, 10.9 with all norms first; the same from a half to twice as many (two cores of an EPYC, 32 MiB of
// L3).
constexpr int64_t kTogether = 1 << 19;
constexpr int64_t kLanes = 16;  // partial sums side by side: four registers of AVX2 for each sum

template <typename G>
DOGO_CLONES Squares<double> squares(const LarsEntry& entry, int64_t begin, int64_t end) {
  const float* w = entry.w;
  const G* g = static_cast<const G*>(entry.g);
  double ww[kLanes] = {}, uu[kLanes] = {};
  const auto add = [&](int64_t i, int64_t lane) {
    const double x = w[i], u = decayed(to_float(g[i]), w[i], entry.weight_decay);
    ww[lane] += x * x;
    uu[lane] += u * u;
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (; i < end; ++i) add(i, 0);
  Squares<double> sum;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum.w += ww[lane];
    sum.u += uu[lane];
  }
  return sum;
}

template <typename G>
DOGO_CLONES void update(const LarsEntry& entry, const Rates& rates, int64_t begin, int64_t end) {
  float* __restrict__ w = entry.w;
  const G* __restrict__ g = static_cast<const G*>(entry.g);
  float* __restrict__ v = entry.v;
  const float wd = entry.weight_decay, momentum = entry.momentum, in = rates.in, out = rates.out;
  if (!v) {
    for (int64_t i = begin; i < end; ++i) w[i] -= out * (in * decayed(to_float(g[i]), w[i], wd));
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    v[i] = momentum * v[i] + in * decayed(to_float(g[i]), w[i], wd);
    w[i] -= out * v[i];
  }
}

class LarsCpu : public Lars {
 public:
  void step(const LarsTensors& tensors, const std::vector<LarsGroup>& groups) override {
    const LarsTable table(tensors, groups, kChunk);
    partials_.resize(table.adapted_chunks);
    rates_.resize(table.entries.size());
    const auto& entries = table.entries;
    for (size_t first = 0, last = 0; first < entries.size(); first = last) {
      int64_t numel = 0;
      do {
        numel += entries[last++].numel;
      } while (last < entries.size() && numel + entries[last].numel <= kTogether);
      step(table, first, last);
    }
    table.write_back();
  }

 private:
  // Entries [first, last).
  void step(const LarsTable& table, size_t first, size_t last) {
    const int64_t begin = table.entries[first].first_chunk;
    const int64_t end = table.entries[last - 1].first_chunk + chunks_of(table.entries[last - 1]);
    each_chunk(
        table, begin, std::min<int64_t>(end, table.adapted_chunks), [&](auto& entry, int64_t chunk, auto... range) {
          const bool bfloat16 = entry.has(LarsEntry::kBfloat16);
          partials_[chunk] = bfloat16 ? squares<uint16_t>(entry, range...) : squares<float>(entry, range...);
        });
    for (size_t i = first; i < last; ++i) rates_[i] = rates(table.entries[i], total(table.entries[i]));
    each_chunk(table, begin, end, [&](auto& entry, int64_t chunk, auto... range) {
      const Rates& step = rates_[table.entry_of_chunk[chunk]];
      const bool bfloat16 = entry.has(LarsEntry::kBfloat16);
      bfloat16 ? update<uint16_t>(entry, step, range...) : update<float>(entry, step, range...);
    });
  }

  // In order of chunks, whichever thread summed them: equal to the bit for any number of threads.
  Squares<double> total(const LarsEntry& entry) const {
    Squares<double> sum;
    if (!entry.has(LarsEntry::kAdapt)) return sum;
    for (int64_t k = entry.first_chunk; k < entry.first_chunk + chunks_of(entry); ++k) {
      sum.w += partials_[k].w;
      sum.u += partials_[k].u;
    }
    return sum;
  }

  static int64_t chunks_of(const LarsEntry& entry) { return (entry.numel + kChunk - 1) / kChunk; }

  // Calls work(entry, chunk, begin, end) on all threads; less than two chunks are not worth a second one.
  template <typename Work>
  static void each_chunk(const LarsTable& table, int64_t first, int64_t last, const Work& work) {
    at::parallel_for(first, std::max(first, last), 2, [&](int64_t from, int64_t to) {
      for (int64_t chunk = from; chunk < to; ++chunk) {
        const LarsEntry& entry = table.entries[table.entry_of_chunk[chunk]];
        const int64_t begin = (chunk - entry.first_chunk) * kChunk;
        work(entry, chunk, begin, std::min(begin + kChunk, entry.numel));
      }
    });
  }

  std::vector<Squares<double>> partials_;
  std::vector<Rates> rates_;
};

// Whether elements stand in memory in the same order; steps along an axis of one element say nothing.
bool same_order(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    if (sizes[axis] != 1 && a_strides[axis] != b_strides[axis]) return false;
  }
  return true;
}

}  // namespace

LarsTable::LarsTable(const LarsTensors& tensors, const std::vector<LarsGroup>& groups, int64_t chunk_numel) {
  entries.reserve(tensors.params.size());
  for (const bool adapt : {true, false}) {
    for (size_t i = 0; i < tensors.params.size(); ++i) {
      const LarsGroup& group = groups[tensors.groups[i]];
      if (group.adapt == adapt && tensors.params[i].numel() > 0) add(tensors, i, group, chunk_numel);
    }
    if (adapt) adapted_chunks = static_cast<int32_t>(entry_of_chunk.size());
  }
}

void LarsTable::add(const LarsTensors& tensors, size_t i, const LarsGroup& group, int64_t chunk_numel) {
  const at::Tensor& param = tensors.params[i];
  // in_order_of(empty_like) is a copy, since an order with gaps is not that of a contiguous tensor.
  const bool dense = param.is_non_overlapping_and_dense();
  const at::Tensor w = dense ? param : in_order_of(at::empty_like(param, at::MemoryFormat::Contiguous), param, true);
  const at::Tensor grad = tensors.grads[i].resolve_neg();  // a copy where memory holds the negative
  copies_.push_back(grad);
  const at::Tensor g = in_order_of(w, grad, false);
  const at::Tensor v = tensors.momenta[i].defined() ? in_order_of(w, tensors.momenta[i], true) : at::Tensor();

  LarsEntry entry{};
  entry.w = w.data_ptr<float>();
  entry.g = g.const_data_ptr();
  entry.v = v.defined() ? v.data_ptr<float>() : nullptr;
  entry.lr_ptr = group.lr_tensor ? group.lr_tensor->const_data_ptr<float>() : nullptr;
  entry.numel = w.numel();
  entry.first_chunk = static_cast<int32_t>(entry_of_chunk.size());
  entry.lr = static_cast<float>(group.lr);
  entry.momentum = static_cast<float>(group.momentum);
  entry.weight_decay = static_cast<float>(group.weight_decay);
  entry.eta = static_cast<float>(group.eta);
  const bool bfloat16 = g.scalar_type() == at::kBFloat16;
  const auto misaligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  entry.flags = (bfloat16 ? LarsEntry::kBfloat16 : 0) | (group.adapt ? LarsEntry::kAdapt : 0)
                | (group.lr_in_momentum ? LarsEntry::kLrInMomentum : 0);
  // Four elements at a time; a null pointer is aligned.
  const bool aligned = !(misaligned(entry.w, 16) || misaligned(entry.v, 16) || misaligned(entry.g, bfloat16 ? 8 : 16));
  entry.flags |= aligned ? LarsEntry::kAligned : 0;
  // For autograd, as every change in place is: so that a graph which saved the old values refuses to go on.
  param.unsafeGetTensorImpl()->bump_version();
  entry_of_chunk.insert(
      entry_of_chunk.end(), (entry.numel + chunk_numel - 1) / chunk_numel, static_cast<int32_t>(entries.size()));
  entries.push_back(entry);
}

at::Tensor LarsTable::in_order_of(const at::Tensor& order, const at::Tensor& t, bool written) {
  if (same_order(order, t)) return t;
  at::Tensor copy = at::empty_like(order, t.options()).copy_(t);
  if (written) {
    written_.emplace_back(t, copy);
  } else {
    copies_.push_back(copy);
  }
  return copy;
}

void LarsTable::write_back() const {
  for (const auto& [original, copy] : written_) original.copy_(copy);
}

std::unique_ptr<Lars> make_lars(at::Device device) {
  if (device.is_cpu()) return std::make_unique<LarsCpu>();
#if DOGO_CUDA
  if (device.is_cuda()) return make_lars_cuda();
#endif
  TORCH_CHECK_VALUE(false, "device: ", device, " is not what this core was built for");
}

}  // namespace dogo

// The kernels as torch ops on `mlu`: the only file that includes torch. What an op means: vlmfx/ops/<op>.py.
//
// An op checks what its kernel relies on, makes its inputs contiguous, and launches on the current queue; nothing waits for the device,
// so that ops can be recorded in a graph. Memory is asked of torch alone, whose allocator knows of graphs.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "aten/utils/cnnl_util.h"
#include "aten/utils/tensor_util.h"
#include "entries.h"
#include "framework/core/MLUStream.h"
#include "framework/core/device.h"
#include "framework/core/mlu_guard.h"

namespace {
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMostBytes = int64_t(1) << 31;  // what the chip's 32-bit addressing of a tensor holds
constexpr int64_t kMostHeadDim = 256;
constexpr int64_t kWidestWindow = 1 << 30;  // no sequence is as long

// One call of an op: its device and queue, and the tensors that must live until it is launched.
class Call {
 public:
  Call(const char *op, const Tensor &first)
      : op_(op), device_(first.device()) {
    if (first.is_privateuseone()) guard_.emplace(device_);  // else another argument is on the card, and will be named
    queue = torch_mlu::getCurMLUStream();
    tasks = torch_mlu::getDeviceAttr(cnrtAttrClusterCount) * torch_mlu::getDeviceAttr(cnrtAttrMcorePerCluster);
  }

  // The address of an input, made contiguous.
  const void *in(const char *name, const Tensor &t) {
    check(name, t);
    kept_.push_back(torch_mlu::cnnl_contiguous(t));
    return address(kept_.back());
  }
  const void *in(const char *name, const OptionalTensor &t) { return t ? in(name, *t) : nullptr; }
  // The address of a tensor that is written where it lies.
  void *inout(const char *name, const Tensor &t) {
    check(name, t);
    TORCH_CHECK_VALUE(t.is_contiguous(), op_, ": ", name, " is not contiguous, but is written in place; pass one that is.");
    return address(t);
  }
  void *out(const Tensor &t) {
    check("the result", t);
    return address(t);
  }
  // What an entry said.
  void end(const char *error) const { TORCH_CHECK_VALUE(error == nullptr, op_, ": ", error); }

  // VLMFX_F16 or VLMFX_F32; others are an error.
  int dtype(const char *name, const Tensor &t) const {
    TORCH_CHECK_VALUE(t.scalar_type() == at::kHalf || t.scalar_type() == at::kFloat, op_, ": ", name, " has ", t.scalar_type(),
                      " but the kernels for mlu take Half and Float; convert it.");
    return t.scalar_type() == at::kHalf ? VLMFX_F16 : VLMFX_F32;
  }
  void is(const char *name, const Tensor &t, at::ScalarType dtype) const {
    TORCH_CHECK_VALUE(t.scalar_type() == dtype, op_, ": ", name, " has ", t.scalar_type(), " but needs ", dtype, "; convert it.");
  }
  void is(const char *name, const Tensor &t, at::ScalarType dtype, at::IntArrayRef shape) const {
    is(name, t, dtype);
    TORCH_CHECK_VALUE(t.sizes() == shape, op_, ": ", name, " has shape ", t.sizes(), " but needs ", shape, "; pass one that has.");
  }
  void is(const char *name, const OptionalTensor &t, at::ScalarType dtype, at::IntArrayRef shape) const {
    TORCH_CHECK_VALUE(t.has_value(), op_, ": ", name, " is missing; pass it with what goes with it.");
    is(name, *t, dtype, shape);
  }
  void rank(const char *name, const Tensor &t, int64_t dim) const {
    TORCH_CHECK_VALUE(t.dim() == dim, op_, ": ", name, " has ", t.dim(), " axes but needs ", dim, "; pass one that has.");
  }
  void require(bool holds, const char *name, const char *expected) const {
    TORCH_CHECK_VALUE(holds, op_, ": ", name, " needs ", expected, "; change it.");
  }
  // k_cache and v_cache, of one shape and dtype
  void caches(const Tensor &k_cache, const Tensor &v_cache, at::ScalarType dtype) const {
    rank("k_cache", k_cache, 4);
    is("k_cache", k_cache, dtype);
    is("v_cache", v_cache, dtype, k_cache.sizes());
  }
  void head_dim(const char *name, int64_t dim) const {
    TORCH_CHECK_VALUE(dim >= 1 && dim <= kMostHeadDim, op_, ": ", name, " has a head_dim of ", dim, " but needs 1 to ", kMostHeadDim,
                      "; use the CPU for this model.");
  }

 private:
  void check(const char *name, const Tensor &t) const {
    TORCH_CHECK_VALUE(t.device() == device_, op_, ": ", name, " is on ", t.device(), " but the first argument is on ", device_,
                      "; move both to one device.");
    TORCH_CHECK_VALUE(int64_t(t.nbytes()) < kMostBytes, op_, ": ", name, " has ", t.nbytes(), " bytes but the chip takes fewer than ",
                      kMostBytes, "; split it.");
  }
  static void *address(const Tensor &t) { return torch_mlu::mlu_data_ptr(torch_mlu::getMluTensorImpl(t)); }

  const char *op_;
  std::optional<torch_mlu::mlu::MLUGuard> guard_;
  c10::Device device_;
  c10::SmallVector<Tensor, 12> kept_;

 public:
  cnrtQueue_t queue;
  int tasks;
};

int activation_kind(const Call &call, c10::string_view kind) {
  if (kind == "gelu") return VLMFX_GELU;
  if (kind == "gelu_pytorch_tanh") return VLMFX_GELU_TANH;
  if (kind == "quick_gelu") return VLMFX_QUICK_GELU;
  call.require(kind == "silu", "kind", "to be gelu, gelu_pytorch_tanh, quick_gelu or silu");
  return VLMFX_SILU;
}

Tensor like(const Tensor &x) { return at::empty_like(x, x.options(), at::MemoryFormat::Contiguous); }

// ---- rows ---------------------------------------------------------------------------------------------------------------------------
Tensor norm(const char *op, const Tensor &x, const OptionalTensor &residual, const Tensor &weight, double eps, const Tensor &total) {
  Call call(op, x);
  call.require(x.dim() >= 1, "x", "at least one axis");
  const int dtype = call.dtype("x", x), hidden = x.size(-1);
  call.is("weight", weight, x.scalar_type(), {hidden});
  if (residual) call.is("residual", residual, x.scalar_type(), x.sizes());
  Tensor out = like(x);
  if (!x.numel()) return out;
  call.end(vlmfx_rms_norm(call.queue, call.tasks, dtype, call.out(out), residual ? call.out(total) : nullptr, call.in("x", x),
                          call.in("residual", residual), call.in("weight", weight), x.numel() / hidden, hidden, eps));
  return out;
}

Tensor rms_norm(const Tensor &x, const Tensor &weight, double eps) { return norm("rms_norm", x, std::nullopt, weight, eps, Tensor()); }

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor &x, const Tensor &residual, const Tensor &weight, double eps) {
  Tensor total = like(x);
  Tensor out = norm("add_rms_norm", x, residual, weight, eps, total);
  return {out, total};
}

Tensor layer_norm(const Tensor &x, const Tensor &weight, const Tensor &bias, double eps) {
  Call call("layer_norm", x);
  call.require(x.dim() >= 1, "x", "at least one axis");
  const int dtype = call.dtype("x", x), hidden = x.size(-1);
  call.is("weight", weight, x.scalar_type(), {hidden});
  call.is("bias", bias, x.scalar_type(), {hidden});
  Tensor out = like(x);
  if (!x.numel()) return out;
  call.end(vlmfx_layer_norm(call.queue, call.tasks, dtype, call.out(out), call.in("x", x), call.in("weight", weight),
                            call.in("bias", bias), x.numel() / hidden, hidden, eps));
  return out;
}

Tensor activation(const Tensor &x, c10::string_view kind) {
  Call call("activation", x);
  const int dtype = call.dtype("x", x), number = activation_kind(call, kind);
  Tensor out = like(x);
  if (!x.numel()) return out;
  call.end(vlmfx_activation(call.queue, call.tasks, dtype, number, call.out(out), call.in("x", x), x.numel()));
  return out;
}

Tensor gated_activation(const Tensor &gate_up, c10::string_view kind) {
  Call call("gated_activation", gate_up);
  const int dtype = call.dtype("gate_up", gate_up), number = activation_kind(call, kind);
  call.require(gate_up.dim() >= 1 && gate_up.size(-1) % 2 == 0, "gate_up", "a last axis of even size");
  auto shape = gate_up.sizes().vec();
  const int width = shape.back() /= 2;
  Tensor out = at::empty(shape, gate_up.options());
  if (!out.numel()) return out;
  call.end(vlmfx_gated_activation(call.queue, call.tasks, dtype, number, call.out(out), call.in("gate_up", gate_up),
                                  out.numel() / width, width));
  return out;
}

// ---- rotary and the cache -----------------------------------------------------------------------------------------------------------
int table_dtype(const Call &call, const Tensor &x, const Tensor &cos, const Tensor &sin) {
  const int dtype = call.dtype("cos", cos);
  call.require(dtype == VLMFX_F32 || cos.scalar_type() == x.scalar_type(), "cos", "Float or the dtype of the heads");
  call.is("cos", cos, cos.scalar_type(), {x.size(0), x.size(2)});
  call.is("sin", sin, cos.scalar_type(), {x.size(0), x.size(2)});
  return dtype;
}

Tensor rotary(const Tensor &x, const Tensor &cos, const Tensor &sin) {
  Call call("rotary", x);
  call.rank("x", x, 3);
  call.require(x.size(2) % 2 == 0, "x", "an even head_dim");
  const int dtype = call.dtype("x", x), table = table_dtype(call, x, cos, sin);
  Tensor out = like(x);
  if (!x.numel()) return out;
  call.end(vlmfx_rotary(call.queue, call.tasks, dtype, table, call.out(out), call.in("x", x), call.in("cos", cos),
                        call.in("sin", sin), x.size(0), x.size(1), x.size(2)));
  return out;
}

Tensor rotary_cache_write(const Tensor &qkv, const Tensor &cos, const Tensor &sin, Tensor k_cache, Tensor v_cache,
                          const Tensor &slot_mapping) {
  Call call("rotary_cache_write", qkv);
  call.rank("qkv", qkv, 3);
  const int dtype = call.dtype("qkv", qkv);
  call.caches(k_cache, v_cache, qkv.scalar_type());
  const int64_t tokens = qkv.size(0), kv_heads = k_cache.size(1), heads = qkv.size(1) - 2 * kv_heads, dim = qkv.size(2);
  call.require(heads >= 0 && dim == k_cache.size(3) && dim % 2 == 0, "qkv", "the heads of q, k and v, and the cache's even head_dim");
  const int table = table_dtype(call, qkv, cos, sin);
  call.is("slot_mapping", slot_mapping, at::kInt, {tokens});
  Tensor out = at::empty({tokens, heads + kv_heads, dim}, qkv.options());
  if (!qkv.numel()) return out;
  call.end(vlmfx_rotary_cache_write(call.queue, call.tasks, dtype, table, call.out(out), call.inout("k_cache", k_cache),
                                    call.inout("v_cache", v_cache), call.in("qkv", qkv), call.in("cos", cos), call.in("sin", sin),
                                    call.in("slot_mapping", slot_mapping), tokens, heads, kv_heads, dim, k_cache.size(2)));
  return out;
}

void cache_write(const Tensor &k, const Tensor &v, Tensor k_cache, Tensor v_cache, const Tensor &slot_mapping) {
  Call call("cache_write", k);
  const int dtype = call.dtype("k", k);
  call.caches(k_cache, v_cache, k.scalar_type());
  const int64_t tokens = slot_mapping.numel(), kv_heads = k_cache.size(1), dim = k_cache.size(3);
  call.is("k", k, k.scalar_type(), {tokens, kv_heads, dim});
  call.is("v", v, k.scalar_type(), {tokens, kv_heads, dim});
  call.is("slot_mapping", slot_mapping, at::kInt, {tokens});
  if (!k.numel()) return;
  call.end(vlmfx_cache_write(call.queue, call.tasks, dtype, call.inout("k_cache", k_cache), call.inout("v_cache", v_cache),
                             call.in("k", k), call.in("v", v), call.in("slot_mapping", slot_mapping), tokens, kv_heads, dim,
                             k_cache.size(2)));
}

std::tuple<Tensor, Tensor> cache_gather(const Tensor &k_cache, const Tensor &v_cache, const Tensor &block_table,
                                        const Tensor &cu_seqlens, int64_t num_tokens) {
  Call call("cache_gather", k_cache);
  const int dtype = call.dtype("k_cache", k_cache);
  call.caches(k_cache, v_cache, k_cache.scalar_type());
  call.rank("block_table", block_table, 2);
  call.is("block_table", block_table, at::kInt);
  const int64_t num_seqs = block_table.size(0), kv_heads = k_cache.size(1), dim = k_cache.size(3);
  call.is("cu_seqlens", cu_seqlens, at::kInt, {num_seqs + 1});
  call.require(num_tokens >= 0, "num_tokens", "to be 0 or more");
  Tensor k = at::empty({num_tokens, kv_heads, dim}, k_cache.options()), v = like(k);
  if (!k.numel()) return {k, v};
  call.end(vlmfx_cache_gather(call.queue, call.tasks, dtype, call.out(k), call.out(v), call.in("k_cache", k_cache),
                              call.in("v_cache", v_cache), call.in("block_table", block_table), call.in("cu_seqlens", cu_seqlens),
                              num_seqs, block_table.size(1), num_tokens, kv_heads, dim, k_cache.size(2)));
  return {k, v};
}

// ---- attention ----------------------------------------------------------------------------------------------------------------------
Tensor paged_decode_attention(const Tensor &q, const Tensor &k_cache, const Tensor &v_cache, const OptionalTensor &block_table,
                              const Tensor &context_lens, const OptionalTensor &items, const OptionalTensor &item_offsets,
                              double scale, int64_t window) {
  Call call("paged_decode_attention", q);
  call.rank("q", q, 3);
  const int dtype = call.dtype("q", q);
  call.caches(k_cache, v_cache, q.scalar_type());
  const int64_t num_seqs = q.size(0), heads = q.size(1), kv_heads = k_cache.size(1), dim = q.size(2);
  call.require(dim == k_cache.size(3) && kv_heads > 0 && heads % kv_heads == 0, "q", "the cache's head_dim and a multiple of its heads");
  call.head_dim("q", dim);
  call.is("context_lens", context_lens, at::kInt, {num_seqs});
  if (block_table) {
    call.rank("block_table", *block_table, 2);
    call.is("block_table", *block_table, at::kInt, {num_seqs, block_table->size(1)});
  } else {
    call.require(k_cache.size(0) >= num_seqs, "k_cache", "a block a sequence where there is no block_table");
  }
  call.require(items.has_value() == item_offsets.has_value(), "item_offsets", "to come with items");
  const int64_t num_items = items ? items->size(0) : 0;
  if (items) {
    call.is("items", *items, at::kInt, {num_items, 3});
    call.is("item_offsets", *item_offsets, at::kInt, {num_seqs + 1});
  }
  call.require(scale > 0, "scale", "to be positive");
  call.require(window >= 0, "window", "to be 0 or more");
  window = std::min(window, kWidestWindow);
  Tensor out = like(q);
  if (!q.numel()) return out;
  Tensor partial = items ? at::empty({num_items, heads, dim + 2}, q.options().dtype(at::kFloat)) : Tensor();
  call.end(vlmfx_paged_decode_attention(
      call.queue, call.tasks, dtype, call.out(out), items ? call.out(partial) : nullptr, call.in("q", q), call.in("k_cache", k_cache),
      call.in("v_cache", v_cache), call.in("block_table", block_table), call.in("context_lens", context_lens),
      call.in("items", items), call.in("item_offsets", item_offsets), num_seqs, num_items, heads, kv_heads, dim, k_cache.size(2),
      block_table ? block_table->size(1) : 1, scale, window));
  return out;
}

Tensor prefill_attention(const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &cu_seqlens, const OptionalTensor &k_cache,
                         const OptionalTensor &v_cache, const OptionalTensor &block_table, const OptionalTensor &prefix_lens,
                         double scale, int64_t window) {
  Call call("prefill_attention", q);
  call.rank("q", q, 3);
  call.rank("k", k, 3);
  call.rank("cu_seqlens", cu_seqlens, 1);
  const int dtype = call.dtype("q", q);
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2), kv_heads = k.size(1), num_seqs = cu_seqlens.numel() - 1;
  call.head_dim("q", dim);
  call.require(kv_heads > 0 && heads % kv_heads == 0, "k", "a number of heads that divides q's");
  call.is("k", k, q.scalar_type(), {tokens, kv_heads, dim});
  call.is("v", v, q.scalar_type(), {tokens, kv_heads, dim});
  call.is("cu_seqlens", cu_seqlens, at::kInt, {num_seqs + 1});
  call.require(num_seqs >= 0, "cu_seqlens", "one number at least");
  if (k_cache) {
    call.require(v_cache && block_table && prefix_lens, "k_cache", "v_cache, block_table and prefix_lens beside it");
    call.caches(*k_cache, *v_cache, q.scalar_type());
    call.require(k_cache->size(1) == kv_heads && k_cache->size(3) == dim, "k_cache", "the heads and head_dim of k");
    call.rank("block_table", *block_table, 2);
    call.is("block_table", *block_table, at::kInt, {num_seqs, block_table->size(1)});
    call.is("prefix_lens", *prefix_lens, at::kInt, {num_seqs});
  }
  call.require(scale > 0, "scale", "to be positive");
  call.require(window >= 0, "window", "to be 0 or more");
  window = std::min(window, kWidestWindow);
  Tensor out = like(q);
  if (!q.numel()) return out;
  call.end(vlmfx_prefill_attention(
      call.queue, call.tasks, dtype, call.out(out), call.in("q", q), call.in("k", k), call.in("v", v), call.in("cu_seqlens", cu_seqlens),
      call.in("k_cache", k_cache), call.in("v_cache", v_cache), call.in("block_table", block_table),
      call.in("prefix_lens", prefix_lens), tokens, num_seqs, heads, kv_heads, dim, k_cache ? k_cache->size(2) : 1,
      block_table ? block_table->size(1) : 0, scale, window));
  return out;
}

Tensor vision_attention(const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &cu_seqlens_q, const Tensor &cu_seqlens_k,
                        double scale) {
  Call call("vision_attention", q);
  call.rank("q", q, 3);
  call.rank("k", k, 3);
  call.rank("cu_seqlens_q", cu_seqlens_q, 1);
  const int dtype = call.dtype("q", q);
  const int64_t heads = q.size(1), dim = q.size(2), num_segments = cu_seqlens_q.numel() - 1;
  call.head_dim("q", dim);
  call.is("k", k, q.scalar_type(), {k.size(0), heads, dim});
  call.is("v", v, q.scalar_type(), k.sizes());
  call.require(num_segments >= 0, "cu_seqlens_q", "one number at least");
  call.is("cu_seqlens_q", cu_seqlens_q, at::kInt, {num_segments + 1});
  call.is("cu_seqlens_k", cu_seqlens_k, at::kInt, {num_segments + 1});
  call.require(scale > 0, "scale", "to be positive");
  Tensor out = like(q);
  if (!q.numel()) return out;
  call.end(vlmfx_vision_attention(call.queue, call.tasks, dtype, call.out(out), call.in("q", q), call.in("k", k), call.in("v", v),
                                  call.in("cu_seqlens_q", cu_seqlens_q), call.in("cu_seqlens_k", cu_seqlens_k), q.size(0), k.size(0),
                                  num_segments, heads, dim, scale));
  return out;
}

// ---- rows by index ------------------------------------------------------------------------------------------------------------------
int index_bytes(const Call &call, const char *name, const Tensor &t) {
  call.require(t.scalar_type() == at::kInt || t.scalar_type() == at::kLong, name, "Int or Long");
  return t.itemsize();
}

Tensor merge(const Tensor &embedding, const Tensor &ids, const Tensor &features, const Tensor &feature_index) {
  Call call("merge", embedding);
  call.rank("embedding", embedding, 2);
  call.rank("ids", ids, 1);
  const int dtype = call.dtype("embedding", embedding);
  const int64_t tokens = ids.numel(), hidden = embedding.size(1);
  call.is("features", features, features.scalar_type(), {features.size(0), hidden});
  call.is("feature_index", feature_index, feature_index.scalar_type(), {tokens});
  const int ids_bytes = index_bytes(call, "ids", ids), feature_bytes = index_bytes(call, "feature_index", feature_index);
  Tensor out = at::empty({tokens, hidden}, embedding.options());
  if (!out.numel()) return out;
  call.end(vlmfx_merge(call.queue, call.tasks, dtype, call.out(out), call.in("embedding", embedding), call.in("ids", ids), ids_bytes,
                       call.in("features", features.to(embedding.scalar_type())), call.in("feature_index", feature_index),
                       feature_bytes, tokens, embedding.size(0), features.size(0), hidden));
  return out;
}

Tensor pack_patches(const Tensor &pixels, const Tensor &offsets, const Tensor &row_stride, int64_t patch_size, at::ArrayRef<double> mean,
                    at::ArrayRef<double> std, c10::string_view dtype) {
  Call call("pack_patches", pixels);
  call.rank("pixels", pixels, 1);
  call.is("pixels", pixels, at::kByte);
  call.rank("offsets", offsets, 2);
  call.is("offsets", offsets, at::kLong);
  const int64_t patches = offsets.size(0), times = offsets.size(1);
  call.is("row_stride", row_stride, at::kInt, {patches});
  call.require(mean.size() == 3, "mean", "3 numbers");
  call.require(std.size() == 3, "std", "3 numbers");
  call.require(patch_size >= 1, "patch_size", "to be 1 or more");
  call.require(dtype == "float16" || dtype == "float32", "dtype", "to be float16 or float32 on mlu");
  const bool is_half = dtype == "float16";
  Tensor out = at::empty({patches, 3 * times * patch_size * patch_size}, pixels.options().dtype(is_half ? at::kHalf : at::kFloat));
  if (!out.numel()) return out;
  call.end(vlmfx_pack_patches(call.queue, call.tasks, is_half ? VLMFX_F16 : VLMFX_F32, call.out(out), call.in("pixels", pixels),
                              call.in("offsets", offsets), call.in("row_stride", row_stride), pixels.numel(), patches, times, patch_size,
                              mean[0], mean[1], mean[2], std[0], std[1], std[2]));
  return out;
}

// ---- logits -------------------------------------------------------------------------------------------------------------------------
Tensor sample(const Tensor &logits, const Tensor &temperature, const Tensor &top_k, const Tensor &top_p, const Tensor &min_p,
              const Tensor &seed, const Tensor &position) {
  Call call("sample", logits);
  call.rank("logits", logits, 2);
  const int dtype = call.dtype("logits", logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  call.require(vocab >= 1, "logits", "a vocabulary of 1 or more");
  call.is("temperature", temperature, at::kFloat, {rows});
  call.is("top_k", top_k, at::kInt, {rows});
  call.is("top_p", top_p, at::kFloat, {rows});
  call.is("min_p", min_p, at::kFloat, {rows});
  call.is("seed", seed, at::kLong, {rows});
  call.is("position", position, at::kLong, {rows, 2});
  Tensor ids = at::empty({rows}, logits.options().dtype(at::kLong));
  if (!rows) return ids;
  call.end(vlmfx_sample(call.queue, call.tasks, dtype, call.out(ids), call.in("logits", logits), call.in("temperature", temperature),
                        call.in("top_k", top_k), call.in("top_p", top_p), call.in("min_p", min_p), call.in("seed", seed),
                        call.in("position", position), rows, vocab));
  return ids;
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs(const Tensor &logits, const Tensor &ids, int64_t num) {
  Call call("token_logprobs", logits);
  call.rank("logits", logits, 2);
  const int dtype = call.dtype("logits", logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  call.is("ids", ids, at::kLong, {rows});
  call.require(num >= 0 && num <= vocab, "num", "to be 0 to the size of the vocabulary");
  Tensor chosen = at::empty({rows, 1 + num}, ids.options()), rank = at::empty({rows}, ids.options());
  Tensor logprobs = at::empty({rows, 1 + num}, logits.options().dtype(at::kFloat));
  if (rows)
    call.end(vlmfx_token_logprobs(call.queue, call.tasks, dtype, call.out(chosen), call.out(logprobs), call.out(rank),
                                  call.in("logits", logits), call.in("ids", ids), num, rows, vocab));
  return {chosen, logprobs, rank};
}

Tensor adjust_logits(const Tensor &logits, const OptionalTensor &mask, const OptionalTensor &bias_ids, const OptionalTensor &bias,
                     const OptionalTensor &history, const OptionalTensor &prompt_lens, const OptionalTensor &newest,
                     const OptionalTensor &presence, const OptionalTensor &frequency, const OptionalTensor &repetition) {
  Call call("adjust_logits", logits);
  call.rank("logits", logits, 2);
  const int dtype = call.dtype("logits", logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const int64_t num_biases = bias_ids ? bias_ids->size(-1) : 0, length = history ? history->size(-1) : 0;
  if (mask) call.is("mask", mask, at::kInt, {rows, (vocab + 31) / 32});
  if (bias_ids) {
    call.is("bias_ids", bias_ids, at::kInt, {rows, num_biases});
    call.is("bias", bias, at::kFloat, {rows, num_biases});
  }
  if (history) {
    call.is("history", history, at::kInt, {rows, length});
    call.is("prompt_lens", prompt_lens, at::kInt, {rows});
    call.is("newest", newest, at::kLong, {rows});
    call.is("presence", presence, at::kFloat, {rows});
    call.is("frequency", frequency, at::kFloat, {rows});
    call.is("repetition", repetition, at::kFloat, {rows});
  }
  Tensor out = at::empty({rows, vocab}, logits.options().dtype(at::kFloat));
  if (!out.numel()) return out;
  call.end(vlmfx_adjust_logits(call.queue, call.tasks, dtype, call.out(out), call.in("logits", logits), call.in("mask", mask),
                               call.in("bias_ids", bias_ids), call.in("bias", bias), call.in("history", history),
                               call.in("prompt_lens", prompt_lens), call.in("newest", newest), call.in("presence", presence),
                               call.in("frequency", frequency), call.in("repetition", repetition), rows, vocab, num_biases, length));
  return out;
}

Tensor probe(int64_t which, const Tensor &a, const Tensor &b) {
  Call call("probe", a);
  call.is("a", a, at::kFloat, {1024});
  call.is("b", b, at::kFloat, {1024});
  Tensor out = at::zeros({1024}, a.options());
  call.end(vlmfx_probe(call.queue, call.tasks, which, call.out(out), call.in("a", a), call.in("b", b)));
  return out;
}
}  // namespace

// Not an op of the contract: one step of the chip's, for vlmfx/ops/mlu/probe.py. It takes tensors of the CPU in the emulator.
TORCH_LIBRARY(vlmfx_mlu, m) { m.def("probe(int which, Tensor a, Tensor b) -> Tensor", probe); }

TORCH_LIBRARY_IMPL(vlmfx, PrivateUse1, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("layer_norm", layer_norm);
  m.impl("activation", activation);
  m.impl("gated_activation", gated_activation);
  m.impl("rotary", rotary);
  m.impl("rotary_cache_write", rotary_cache_write);
  m.impl("cache_write", cache_write);
  m.impl("cache_gather", cache_gather);
  m.impl("paged_decode_attention", paged_decode_attention);
  m.impl("prefill_attention", prefill_attention);
  m.impl("vision_attention", vision_attention);
  m.impl("merge", merge);
  m.impl("pack_patches", pack_patches);
  m.impl("sample", sample);
  m.impl("token_logprobs", token_logprobs);
  m.impl("adjust_logits", adjust_logits);
}

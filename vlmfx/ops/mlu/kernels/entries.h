// The C entries of the kernels, which bindings.cpp calls: the one agreement between torch and BANG C.
//
// Each launches its kernel on `queue` over at most `tasks` cores and returns at once: null, or a sentence that names the argument a core
// has no room for (or, in the emulator, the fault). All tensors are contiguous, on one device and of fewer than 2^31 bytes; shapes and
// dtypes were checked. dtype: VLMFX_F32 or VLMFX_F16, of all tensors that have no other said here. Shapes and meaning: vlmfx/ops/<op>.py.
#pragma once
#include <stdint.h>
#ifdef BANG_EMU
#include "bang_cnrt.h"
#else
#include <cnrt.h>
#endif

#define VLMFX_API extern "C" __attribute__((visibility("default")))
enum { VLMFX_F32 = 0, VLMFX_F16 = 1 };
enum { VLMFX_GELU = 0, VLMFX_GELU_TANH = 1, VLMFX_QUICK_GELU = 2, VLMFX_SILU = 3 };

// x, out, residual, total [rows, hidden], weight [hidden]. residual and total are null, or total = x + residual and out is its norm.
VLMFX_API const char *vlmfx_rms_norm(cnrtQueue_t queue, int tasks, int dtype, void *out, void *total, const void *x,
                                     const void *residual, const void *weight, int rows, int hidden, float eps);

VLMFX_API const char *vlmfx_layer_norm(cnrtQueue_t queue, int tasks, int dtype, void *out, const void *x, const void *weight,
                                       const void *bias, int rows, int hidden, float eps);

// x, out [count]; kind: VLMFX_GELU to VLMFX_SILU
VLMFX_API const char *vlmfx_activation(cnrtQueue_t queue, int tasks, int dtype, int kind, void *out, const void *x, int count);

// gate_up [rows, 2, width], out [rows, width]
VLMFX_API const char *vlmfx_gated_activation(cnrtQueue_t queue, int tasks, int dtype, int kind, void *out, const void *gate_up,
                                             int rows, int width);

// x, out [tokens, heads, dim]; cos, sin [tokens, dim] of table_dtype, F32 or dtype
VLMFX_API const char *vlmfx_rotary(cnrtQueue_t queue, int tasks, int dtype, int table_dtype, void *out, const void *x,
                                   const void *cos, const void *sin, int tokens, int heads, int dim);

// qkv [tokens, heads + 2 * kv_heads, dim], out [tokens, heads + kv_heads, dim], slots [tokens] int32, caches [blocks, kv_heads, block_size, dim]
VLMFX_API const char *vlmfx_rotary_cache_write(cnrtQueue_t queue, int tasks, int dtype, int table_dtype, void *out, void *k_cache,
                                               void *v_cache, const void *qkv, const void *cos, const void *sin,
                                               const void *slots, int tokens, int heads, int kv_heads, int dim, int block_size);

// k, v [tokens, kv_heads, dim], slots [tokens] int32
VLMFX_API const char *vlmfx_cache_write(cnrtQueue_t queue, int tasks, int dtype, void *k_cache, void *v_cache, const void *k,
                                        const void *v, const void *slots, int tokens, int kv_heads, int dim, int block_size);

// k, v [num_tokens, kv_heads, dim], block_table [num_seqs, max_blocks] int32, cu_seqlens [num_seqs + 1] int32
VLMFX_API const char *vlmfx_cache_gather(cnrtQueue_t queue, int tasks, int dtype, void *k, void *v, const void *k_cache,
                                         const void *v_cache, const void *block_table, const void *cu_seqlens, int num_seqs,
                                         int max_blocks, int num_tokens, int kv_heads, int dim, int block_size);

// q, out [num_seqs, heads, dim]; block_table [num_seqs, max_blocks] int32 or null; items [num_items, 3] and item_offsets [num_seqs + 1]
// int32, or both null; partial: scratch of num_items * heads * (dim + 2) floats where there are items, else null
VLMFX_API const char *vlmfx_paged_decode_attention(cnrtQueue_t queue, int tasks, int dtype, void *out, void *partial, const void *q,
                                                   const void *k_cache, const void *v_cache, const void *block_table,
                                                   const void *context_lens, const void *items, const void *item_offsets,
                                                   int num_seqs, int num_items, int heads, int kv_heads, int dim, int block_size,
                                                   int max_blocks, float scale, int window);

// q, out [tokens, heads, dim]; k, v [tokens, kv_heads, dim]; cu_seqlens [num_seqs + 1], block_table [num_seqs, max_blocks] and
// prefix_lens [num_seqs] int32; caches, table and prefix_lens all null where no sequence has a prefix
VLMFX_API const char *vlmfx_prefill_attention(cnrtQueue_t queue, int tasks, int dtype, void *out, const void *q, const void *k,
                                              const void *v, const void *cu_seqlens, const void *k_cache, const void *v_cache,
                                              const void *block_table, const void *prefix_lens, int tokens, int num_seqs, int heads,
                                              int kv_heads, int dim, int block_size, int max_blocks, float scale, int window);

// q, out [q_tokens, heads, dim], k, v [k_tokens, heads, dim]; cu_seqlens_q, cu_seqlens_k [num_segments + 1] int32
VLMFX_API const char *vlmfx_vision_attention(cnrtQueue_t queue, int tasks, int dtype, void *out, const void *q, const void *k,
                                             const void *v, const void *cu_seqlens_q, const void *cu_seqlens_k, int q_tokens,
                                             int k_tokens, int num_segments, int heads, int dim, float scale);

// embedding [vocab, hidden], features [num_features, hidden], ids and feature_index [tokens] of 4 or 8 bytes each, out [tokens, hidden]
VLMFX_API const char *vlmfx_merge(cnrtQueue_t queue, int tasks, int dtype, void *out, const void *embedding, const void *ids,
                                  int ids_bytes, const void *features, const void *feature_index, int index_bytes, int tokens,
                                  int vocab, int num_features, int hidden);

// pixels [num_bytes] uint8, offsets [patches, times] int64, row_stride [patches] int32, out [patches, 3 * times * patch_size^2]
VLMFX_API const char *vlmfx_pack_patches(cnrtQueue_t queue, int tasks, int dtype, void *out, const void *pixels, const void *offsets,
                                         const void *row_stride, int num_bytes, int patches, int times, int patch_size,
                                         float mean0, float mean1, float mean2, float std0, float std1, float std2);

// logits [rows, vocab]; ids [rows] int64; temperature, top_p, min_p [rows] float, top_k [rows] int32, seed [rows] and position [rows, 2]
// int64
VLMFX_API const char *vlmfx_sample(cnrtQueue_t queue, int tasks, int dtype, void *ids, const void *logits, const void *temperature,
                                   const void *top_k, const void *top_p, const void *min_p, const void *seed, const void *position,
                                   int rows, int vocab);

// logits [rows, vocab], ids [rows] int64; chosen [rows, 1 + num] int64, logprobs [rows, 1 + num] float, rank [rows] int64
VLMFX_API const char *vlmfx_token_logprobs(cnrtQueue_t queue, int tasks, int dtype, void *chosen, void *logprobs, void *rank,
                                           const void *logits, const void *ids, int num, int rows, int vocab);

// logits [rows, vocab], out [rows, vocab] float; mask [rows, ceil(vocab / 32)] int32 or null; bias_ids int32 and bias float
// [rows, num_biases] or null; history [rows, length] int32 or null, and with it prompt_lens int32, newest int64, presence, frequency and
// repetition float [rows]
VLMFX_API const char *vlmfx_adjust_logits(cnrtQueue_t queue, int tasks, int dtype, void *out, const void *logits, const void *mask,
                                          const void *bias_ids, const void *bias, const void *history, const void *prompt_lens,
                                          const void *newest, const void *presence, const void *frequency, const void *repetition,
                                          int rows, int vocab, int num_biases, int length);

// What probe.mlu does: one of these on a and b [1024] float, out [1024] float
enum {
  PROBE_REDUCE_SUM, PROBE_ARGMAX, PROBE_TRANSPOSE, PROBE_TRANSPOSE_HALF, PROBE_POW2, PROBE_LOG2, PROBE_RECIP, PROBE_NARROW,
  PROBE_HALF_ADD, PROBE_BYTES, PROBE_SUB, PROBE_MUL, PROBE_ADD_SCALAR, PROBE_SUB_SCALAR, PROBE_MUL_SCALAR, PROBE_GE_SCALAR,
  PROBE_GT_SCALAR, PROBE_LT_SCALAR, PROBE_EQ_SCALAR, PROBE_MAXEQUAL, PROBE_CYCLE_ADD, PROBE_CYCLE_SUB, PROBE_CYCLE_MUL,
  PROBE_FUSION, PROBE_FUSION_SCALARS, PROBE_FUSION_MINUS, PROBE_FUSION_CYCLE, PROBE_BITS, PROBE_CYCLE_BITS, PROBE_INTEGERS,
  PROBE_TRUNCATE, PROBE_COUNT, PROBE_FILTER, PROBE_ODD_BYTES, PROBE_STRIDES, PROBE_SCALARS, PROBE_ASYNC, PROBE_TASKS,
  PROBE_NEIGHBOURS,
};
VLMFX_API const char *vlmfx_probe(cnrtQueue_t queue, int tasks, int which, void *out, const void *a, const void *b);

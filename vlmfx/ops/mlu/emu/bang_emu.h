// A CPU stand-in for <bang.h>: enough of the language and of the chip to run the kernels beside it and to catch what a card would not say.
//
// A .mlu file is compiled from the same text by cncc, for the card, and by g++ with -DBANG_EMU -DBANG_UNIT=<its name>, for tests. Each
// file's __nram__ variables are a linker section of their own, which is the NRAM of the core that runs the file's kernel. What NRAM_LAYOUT
// (launch.h) cuts it into lies 128 bytes apart there, red zones, for which the section has room beyond that of a core.
//
// Modelled, and checked; the first violation ends the launch with a message:
//   NRAM    capacity; bounds of each buffer of the layout, of scalar writes at the end of a task and for 128 bytes beyond a buffer; and
//           poison 0xFFB5 in what was not written, which is NaN as half and as float, so that even scalar reads, which no header can see,
//           give NaN
//   memory  only registered tensors may be copied from and to, inputs only from; two tasks of a launch that touch the same bytes, one of
//           them writing, are a race; tasks run one after another in a random order, NRAM poisoned before each
//   pipes   __memcpy_async happens at the __sync that waits for it: until then its NRAM destination is poison, its destination may not be
//           touched nor its source overwritten, in NRAM as in device memory, and it may not overlap what vector operations since the last
//           __sync_compute() touched; a kernel that ends with copies in flight is a fault
//   align   strict: every vector operand at and of a multiple of 128 bytes, which every architecture takes; 372: what binds there
//   counts  bytes and pieces moved, and cycles of the vector pipe, 128 bytes each
// Not modelled: time, WRAM and matmul, SRAM and union tasks, scalar access to device memory, rounding of the card's own pow2, log2 and
// recip, and what cncc would say. Source of the semantics: Cambricon/mlu-ops v1.5.2, docs/BANG-C-OPS-Develop-Guide.md and kernels/.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "bang_cnrt.h"
#include "bang_state.h"

#define __BANG_ARCH__ 372
#define __MLU_NRAM_SIZE__ 768   // KB a core
#define __MLU_WRAM_SIZE__ 1024  // KB a core
#define __MLU_SRAM_SIZE__ 4096  // KB a cluster
#define __mlu_global__ static
#define __mlu_func__ [[maybe_unused]] static inline
#define BANG_JOIN(a, b) BANG_JOIN2(a, b)
#define BANG_JOIN2(a, b) a##b
#define BANG_TEXT(a) BANG_TEXT2(a)
#define BANG_TEXT2(a) #a
#define BANG_SECTION BANG_JOIN(bang_nram_, BANG_UNIT)
#define __nram__ static __attribute__((section(BANG_TEXT(BANG_SECTION)), aligned(128), used))

typedef _Float16 half;
static int taskId, taskDim, taskIdX, taskIdY, taskIdZ, taskDimX, taskDimY, taskDimZ;

enum mluMemcpyDirection_t { GDRAM2NRAM, NRAM2GDRAM, NRAM2NRAM, GDRAM2GDRAM };

extern "C" char BANG_JOIN(__start_, BANG_SECTION)[] __attribute__((visibility("hidden")));
extern "C" char BANG_JOIN(__stop_, BANG_SECTION)[] __attribute__((visibility("hidden")));

// All of it is the file's own: what a core has, every file that is compiled has once.
namespace {
namespace emu {
using bang_emu::Range;
using bang_emu::state;

constexpr size_t kNramLimit = (__MLU_NRAM_SIZE__ - 128) * 1024;
constexpr size_t kZone = 128;      // bytes between buffers
constexpr size_t kZones = 64 * kZone;
constexpr uint16_t kPoison = 0xFFB5;
constexpr int kPipe = 128;  // bytes a cycle

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char *format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Fault("task " + std::to_string(taskId) + ": " + text);
}

struct Buffer {  // of the layout
  Range bytes;
  const char *name;
};
struct Copy {  // a contiguous piece of an asynchronous copy
  void *dst;
  const void *src;
  size_t size;
  bool is_io;
};
struct Access {  // of device memory
  Range bytes;
  int task;
  bool is_write;
  const char *op;
};
std::vector<Buffer> buffers;    // of this task
std::vector<Copy> flight;       // copies not yet synced
std::vector<Range> computed;    // operands of vector operations since __sync_compute()
std::vector<Access> accesses;   // of this launch
int64_t cycles;                 // of this task

[[maybe_unused]] bool overlap(Range a, Range b) { return a.lo < b.hi && b.lo < a.hi; }
Range range(const void *data, size_t size) { return {(uintptr_t)data, (uintptr_t)data + size}; }
Range nram() { return {(uintptr_t)BANG_JOIN(__start_, BANG_SECTION), (uintptr_t)BANG_JOIN(__stop_, BANG_SECTION)}; }

__nram__ char red_zones[kZones];

// The next buffer of a layout, of so many bytes; at is where the last one ends.
[[maybe_unused]] char *take(const char *name, int &at, size_t size) {
  const Range all = nram();
  size_t taken = size;
  for (const Buffer &buffer : buffers) taken += buffer.bytes.hi - buffer.bytes.lo;
  if (taken > all.hi - all.lo - kZones || (buffers.size() + 2) * kZone > kZones)
    fail("with %s, %zu buffers take %zu bytes, the file's NRAM has %zu", name, buffers.size() + 1, taken,
         (size_t)(all.hi - all.lo - kZones));
  char *data = (char *)all.lo + at + kZone;
  buffers.push_back({range(data, size), name});
  at += kZone + size;
  return data;
}

void poison(Range r) {  // by address, so that a range that begins at an odd one is in phase
  if (r.lo >= r.hi) return;
  if (r.lo & 1) *(uint8_t *)r.lo++ = kPoison >> 8;
  if (r.hi & 1) *(uint8_t *)--r.hi = kPoison & 0xFF;
  std::fill((uint16_t *)r.lo, (uint16_t *)r.hi, kPoison);
}
// Compared at the width of the operand: a float may have 0xFFB5 as its low half, but no arithmetic gives the NaN 0xFFB5FFB5. Of bytes
// four at once, as any two may stand side by side in a picture.
template <typename W>
bool has_poison(Range r) {
  const W bad = W(uint32_t(kPoison) * 0x10001u);
  const uintptr_t first = (r.lo + sizeof(W) - 1) / sizeof(W) * sizeof(W);
  const W *p = (const W *)first;
  const size_t n = r.hi > first ? (r.hi - first) / sizeof(W) : 0;
  size_t found = 0;
  for (size_t i = 0; i < n; ++i) found += p[i] == bad;
  return found != 0;
}

// ---- operands of vector operations --------------------------------------------------------------------------------------------------
void check_nram(const char *op, Range r) {
  for (const Buffer &buffer : buffers)
    if (r.lo >= buffer.bytes.lo && r.hi <= buffer.bytes.hi) return;
  for (const Buffer &buffer : buffers) {
    const Range b = buffer.bytes;
    if (r.lo < b.hi + kZone && r.hi > b.lo)
      fail("%s: out of bounds: NRAM bytes [%lld, %lld) of %s, which has %lld bytes", op, (long long)(r.lo - b.lo),
           (long long)(r.hi - b.lo), buffer.name, (long long)(b.hi - b.lo));
  }
  fail("%s: out of bounds: an NRAM address that belongs to no buffer of the kernel", op);
}
// At the end of a task: what scalars wrote beyond a buffer.
void check_zones() {
  const auto is_changed = [](uintptr_t lo) {
    const uint16_t *p = (const uint16_t *)lo;
    return std::any_of(p, p + kZone / 2, [](uint16_t word) { return word != kPoison; });
  };
  for (const Buffer &buffer : buffers) {
    if (is_changed(buffer.bytes.lo - kZone)) fail("scalar code wrote before %s", buffer.name);
    if (is_changed(buffer.bytes.hi)) fail("scalar code wrote beyond %s", buffer.name);
  }
}
void check_flight(const char *op, Range r, bool is_write) {
  for (const Copy &copy : flight) {
    if (overlap(r, range(copy.dst, copy.size)))
      fail("%s: operand overlaps the destination of an async copy not yet synced", op);
    if (is_write && overlap(r, range(copy.src, copy.size)))
      fail("%s: overwrites the source of an async copy not yet synced", op);
  }
}
void note_computed(Range r) {
  for (Range &known : computed)
    if (r.lo <= known.hi && known.lo <= r.hi) {  // rows that follow one another are one range, so that there are few to look at
      known = {std::min(known.lo, r.lo), std::max(known.hi, r.hi)};
      return;
    }
  computed.push_back(r);
}
template <typename T>
Range operand(const char *op, const T *p, size_t n, size_t unit_of_size) {
  const size_t unit = state().options.is_strict ? kPipe : sizeof(T);
  if ((uintptr_t)p % unit) fail("%s: operand address not %zu-byte aligned", op, unit);
  const size_t multiple = state().options.is_strict ? kPipe : unit_of_size;
  if (multiple && n * sizeof(T) % multiple)
    fail("%s: %zu elements = %zu bytes is not a multiple of %zu bytes", op, n, n * sizeof(T), multiple);
  const Range r = range(p, n * sizeof(T));
  check_nram(op, r);
  return r;
}
// unit_of_size: the bytes that a count must be a multiple of even where alignment is relaxed
template <typename T>
void in(const char *op, const T *p, size_t n, size_t unit_of_size = 0) {
  const Range r = operand(op, p, n, unit_of_size);
  check_flight(op, r, false);
  if (has_poison<std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>>(r))
    fail("%s: reads uninitialised NRAM", op);
  note_computed(r);
}
template <typename T>
void out(const char *op, T *p, size_t n, size_t unit_of_size = 0) {
  const Range r = operand(op, p, n, unit_of_size);
  check_flight(op, r, true);
  note_computed(r);
}
// A destination may be a source, or apart from it; where they overlap in part, the order of the pipe shows.
void alias(const char *op, const void *d, size_t d_size, const void *s, size_t s_size, bool may_be_same) {
  if (!overlap(range(d, d_size), range(s, s_size))) return;
  if (!may_be_same || d != s) fail("%s: destination partly overlaps a source", op);
}
void spend(size_t bytes) { cycles += bytes <= kPipe ? 1 : (bytes + kPipe - 1) / kPipe; }

// ---- device memory ------------------------------------------------------------------------------------------------------------------
void touch(const char *op, Range r, bool is_write) {
  for (const bang_emu::Tensor &t : state().tensors)
    if (r.lo >= t.bytes.lo && r.hi <= t.bytes.hi) {
      if (is_write && !t.is_writable) continue;
      (is_write ? state().counters.written : state().counters.read) += r.hi - r.lo;
      state().counters.copies += 1;
      if (!accesses.empty()) {
        Access &last = accesses.back();
        if (last.task == taskId && last.is_write == is_write && last.bytes.hi == r.lo) {
          last.bytes.hi = r.hi;
          return;
        }
      }
      accesses.push_back({r, taskId, is_write, op});
      return;
    }
  for (const bang_emu::Tensor &t : state().tensors)
    if (overlap(r, t.bytes)) {
      if (r.lo >= t.bytes.lo && r.hi <= t.bytes.hi) fail("%s: writes a read-only tensor", op);
      fail("%s: out of bounds: GDRAM bytes [%lld, %lld) of a tensor of %lld bytes", op, (long long)(r.lo - t.bytes.lo),
           (long long)(r.hi - t.bytes.lo), (long long)(t.bytes.hi - t.bytes.lo));
    }
  fail("%s: out of bounds: a GDRAM address that belongs to no tensor of this launch", op);
}
// At the end of a launch: bytes that one task wrote and another touched.
void check_races() {
  std::sort(accesses.begin(), accesses.end(), [](const Access &a, const Access &b) { return a.bytes.lo < b.bytes.lo; });
  std::vector<const Access *> open;
  for (const Access &next : accesses) {
    open.erase(std::remove_if(open.begin(), open.end(), [&](const Access *a) { return a->bytes.hi <= next.bytes.lo; }), open.end());
    for (const Access *other : open)
      if (other->task != next.task && (other->is_write || next.is_write)) {
        taskId = next.task;
        fail("%s: races with task %d, which %s the same GDRAM bytes in this launch", next.op, other->task,
             other->is_write ? "writes" : "reads");
      }
    if (open.size() < 64 || next.is_write) open.push_back(&next);  // of many readers of one place, 64 are enough to be noticed
  }
}

// ---- copies -------------------------------------------------------------------------------------------------------------------------
void piece(const char *op, void *dst, const void *src, size_t size, mluMemcpyDirection_t dir, bool is_async) {
  const Range d = range(dst, size), s = range(src, size);
  const bool from_nram = dir == NRAM2GDRAM || dir == NRAM2NRAM, to_nram = dir == GDRAM2NRAM || dir == NRAM2NRAM;
  if (from_nram)
    check_nram(op, s);
  else
    touch(op, s, false);
  check_flight(op, s, false);
  if (from_nram && has_poison<uint32_t>(s)) fail("%s: reads uninitialised NRAM", op);
  if (to_nram)
    check_nram(op, d);
  else
    touch(op, d, true);
  check_flight(op, d, true);
  if (!is_async) {
    memmove(dst, src, size);
    return;
  }
  for (const Range &c : computed)  // the vector pipe and the copies run apart unless synced
    if ((from_nram && overlap(c, s)) || (to_nram && overlap(c, d)))
      fail("%s: async copy overlaps a vector operation without __sync_compute() between", op);
  if (to_nram) poison(d);
  flight.push_back({dst, src, size, dir != NRAM2NRAM});
}
void copy(const char *op, void *dst, const void *src, int size, mluMemcpyDirection_t dir, int dst_stride, int src_stride,
          int segnum, bool is_async) {
  if (size <= 0 || segnum < 0) fail("%s: size %d, segnum %d", op, size, segnum);
  if (segnum && dst_stride < size) fail("%s: destination segments overlap (stride %d < size %d)", op, dst_stride, size);
  for (int i = 0; i <= segnum; ++i)  // segnum is segments minus one, as on the device
    piece(op, (char *)dst + (ptrdiff_t)i * dst_stride, (const char *)src + (ptrdiff_t)i * src_stride, size, dir, is_async);
}
void finish(bool io, bool move) {
  std::vector<Copy> left;
  for (const Copy &c : flight)
    if (c.is_io ? io : move)
      memmove(c.dst, c.src, c.size);
    else
      left.push_back(c);
  flight.swap(left);
}

// ---- launch -------------------------------------------------------------------------------------------------------------------------
template <typename F>
const char *launch(cnrtDim3_t dim, F &&body) {
  std::string &error = state().error;
  bang_emu::Counters &counters = state().counters;
  accesses.clear();
  taskDimX = dim.x, taskDimY = dim.y, taskDimZ = dim.z, taskDim = dim.x * dim.y * dim.z;
  int64_t longest = 0;
  try {
    taskId = -1;
    const Range all = nram();
    if (all.hi - all.lo - kZones > kNramLimit)
      fail("the file's __nram__ variables take %zu bytes, a core has %zu", (size_t)(all.hi - all.lo - kZones), kNramLimit);
    if (taskDim <= 0) fail("launched with no task");
    for (int task : bang_emu::order_of(taskDim)) {
      poison(all);  // nothing is left of what ran on the core before
      buffers.clear(), flight.clear(), computed.clear();
      cycles = 0;
      taskId = task, taskIdX = task % taskDimX, taskIdY = task / taskDimX % taskDimY, taskIdZ = task / taskDimX / taskDimY;
      body();
      if (!flight.empty()) fail("kernel ends with %zu async copies in flight", flight.size());
      check_zones();
      counters.cycles += cycles;
      longest = std::max(longest, cycles);
    }
    check_races();
  } catch (const Fault &fault) {
    error = fault.what();
    return error.c_str();
  }
  counters.longest += longest;
  counters.launches += 1;
  return nullptr;
}

// ---- shapes of vector operations ----------------------------------------------------------------------------------------------------
template <typename D, typename S, typename F>
void unary(const char *op, D *d, const S *s, int n, F f) {
  in(op, s, n);
  out(op, d, n);
  alias(op, d, n * sizeof(D), s, n * sizeof(S), sizeof(D) == sizeof(S));
  spend(n * std::max(sizeof(D), sizeof(S)));
  for (int i = 0; i < n; ++i) d[i] = f(s[i]);
}
template <typename T, typename F>
void binary(const char *op, T *d, const T *a, const T *b, int n, F f) {
  in(op, a, n);
  in(op, b, n);
  out(op, d, n);
  alias(op, d, n * sizeof(T), a, n * sizeof(T), true);
  alias(op, d, n * sizeof(T), b, n * sizeof(T), true);
  spend(n * sizeof(T));
  for (int i = 0; i < n; ++i) d[i] = f(a[i], b[i]);
}
template <typename T, typename F>  // b is repeated every m elements
void cycle(const char *op, T *d, const T *a, const T *b, int n, int m, F f) {
  if (m <= 0 || n % m) fail("%s: %d elements are not a multiple of the cycle %d", op, n, m);
  in(op, a, n);
  in(op, b, m);
  out(op, d, n);
  alias(op, d, n * sizeof(T), a, n * sizeof(T), true);
  alias(op, d, n * sizeof(T), b, m * sizeof(T), false);
  spend(n * sizeof(T));
  for (int i = 0; i < n; i += m)
    for (int j = 0; j < m; ++j) d[i + j] = f(a[i + j], b[j]);
}
}  // namespace emu
}  // namespace

#define BANG_LAUNCH(kernel, dim, type, queue, ...) ((void)(queue), (void)(type), emu::launch(dim, [&] { kernel(__VA_ARGS__); }))

#define BANG_EMU_COPY(NAME, IS_ASYNC)                                                                                    \
  [[maybe_unused]] static void NAME(void *d, const void *s, int n, mluMemcpyDirection_t dir) {                           \
    emu::copy(#NAME, d, s, n, dir, 0, 0, 0, IS_ASYNC);                                                                   \
  }                                                                                                                      \
  [[maybe_unused]] static void NAME(void *d, const void *s, int n, mluMemcpyDirection_t dir, int d_stride, int s_stride, \
                                    int segnum) {                                                                        \
    emu::copy(#NAME, d, s, n, dir, d_stride, s_stride, segnum, IS_ASYNC);                                                \
  }
BANG_EMU_COPY(__memcpy, false)
BANG_EMU_COPY(__memcpy_async, true)

#define BANG_EMU_FUNC [[maybe_unused]] static inline
BANG_EMU_FUNC void __sync_io() { emu::finish(true, false); }
BANG_EMU_FUNC void __sync_move() { emu::finish(false, true); }
BANG_EMU_FUNC void __sync_compute() { emu::computed.clear(); }
BANG_EMU_FUNC void __sync() {
  emu::finish(true, true);
  __sync_compute();
}
BANG_EMU_FUNC void __sync_io_move_compute() { __sync(); }
BANG_EMU_FUNC bool __is_mpu() { return false; }

#include "bang_vector.h"

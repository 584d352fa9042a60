#include "bang_state.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

namespace bang_emu {
State &state() {
  static State the_state;
  return the_state;
}

static std::mt19937_64 &order() {
  static std::mt19937_64 the_order;
  return the_order;
}

std::vector<int> order_of(int tasks) {
  std::vector<int> numbers(tasks);
  std::iota(numbers.begin(), numbers.end(), 0);
  std::shuffle(numbers.begin(), numbers.end(), order());
  return numbers;
}
}  // namespace bang_emu

using bang_emu::order;
using bang_emu::state;

#define API __attribute__((visibility("default")))

API void bang_emu_options(uint64_t seed, int cores, int is_strict) {
  state().options = {seed, cores, is_strict != 0};
  order().seed(seed);
  state().counters = {};
}

API void bang_emu_forget() { state().tensors.clear(); }

API void bang_emu_register(const void *data, size_t size, int is_writable) {
  const bang_emu::Range bytes = {(uintptr_t)data, (uintptr_t)data + size};
  for (const bang_emu::Tensor &known : state().tensors)
    if (known.bytes.lo == bytes.lo && known.bytes.hi == bytes.hi) return;
  if (size) state().tensors.push_back({bytes, is_writable != 0});
}

API void bang_emu_counters(int64_t out[6]) { memcpy(out, &state().counters, sizeof(bang_emu::Counters)); }

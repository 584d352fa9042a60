// What the emulator remembers between calls, for all kernels of a library: device memory, counters, and how to run.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace bang_emu {

struct Range {
  uintptr_t lo, hi;
};
struct Tensor {
  Range bytes;
  bool is_writable;
};
struct Counters {   // of all launches since bang_emu_reset
  int64_t read;     // bytes copied from device memory
  int64_t written;  // bytes copied to it
  int64_t cycles;   // of the vector pipe, 128 bytes each, all tasks together
  int64_t longest;  // of the vector pipe, of the longest task of each launch, added up
  int64_t copies;   // contiguous pieces copied from or to device memory
  int64_t launches;
};
struct Options {
  uint64_t seed = 0;      // of the order of tasks
  int cores = 16;         // what the runtime says the card has
  bool is_strict = true;  // alignment: of every architecture, or of 372 alone
};
struct State {
  std::vector<Tensor> tensors;  // device memory that a launch may touch
  Counters counters{};
  Options options;
  std::string error;
};

__attribute__((visibility("default"))) State &state();
__attribute__((visibility("default"))) std::vector<int> order_of(int tasks);  // 0 to tasks - 1, in the order of the options' seed

}  // namespace bang_emu

extern "C" {
void bang_emu_options(uint64_t seed, int cores, int is_strict);  // and counters from 0
void bang_emu_forget();                                          // all device memory
void bang_emu_register(const void *data, size_t size, int is_writable);  // the first time counts
void bang_emu_counters(int64_t out[6]);  // Counters, in order
}

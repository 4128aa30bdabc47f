// Which instruction set is used: chosen once, at the first use.

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "table.h"

namespace megatron_llm {
namespace {

// The tables that this processor can run, the best last.
std::vector<const Table*> supported() {
  std::vector<const Table*> tables{&baseline_table()};
#ifdef MEGATRON_LLM_X86_VARIANTS
  // libgcc asks the operating system as well whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) tables.push_back(&avx2_table());
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) tables.push_back(&avx512_table());
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16_table());
#endif
  return tables;
}

const Table* find(const char* name) {
  std::string names;
  for (const Table* table : supported()) {
    if (std::strcmp(table->name, name) == 0) return table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::runtime_error("the CPU capability '" + std::string(name) + "' was asked for, and this processor has: " + names);
}

const Table* chosen_at_start() {
  const char* name = std::getenv("MEGATRON_LLM_CPU_CAPABILITY");
  return name != nullptr && *name != '\0' ? find(name) : supported().back();
}

std::atomic<const Table*>& current() {
  static std::atomic<const Table*> table{chosen_at_start()};
  return table;
}

}  // namespace

const Table& table() { return *current().load(std::memory_order_relaxed); }

void use_table(const char* name) { current().store(find(name), std::memory_order_relaxed); }

}  // namespace megatron_llm

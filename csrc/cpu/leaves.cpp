// Compiles the leaf kernels once per instruction set and picks one when the library is first used.
//
// target_clones would give the same bits. This way each set uses registers of its full width and converts by
// intrinsics, its name can be reported, and tests can run every set that the machine has.

#include "leaves.h"

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>

#if defined(OBC_X86_DISPATCH)
#include <immintrin.h>
#endif

#define OBC_ISA baseline
#define OBC_VECTOR_BYTES 16
#define OBC_F16C 0
#define OBC_FMA 0
#define OBC_MASKS 0
#define OBC_TARGET
#include "leaves_isa.h"

#if defined(OBC_X86_DISPATCH)

#define OBC_ISA v3
#define OBC_VECTOR_BYTES 32
#define OBC_F16C 1
#define OBC_FMA 1
#define OBC_MASKS 0
#define OBC_TARGET __attribute__((target("arch=x86-64-v3")))
#include "leaves_isa.h"

#define OBC_ISA v4
#define OBC_VECTOR_BYTES 64
#define OBC_F16C 1
#define OBC_FMA 1
#define OBC_MASKS 1
#define OBC_TARGET __attribute__((target("arch=x86-64-v4")))
#include "leaves_isa.h"

#endif

namespace obc::cpu {

namespace {

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Leaves<float>& (*single)(Dtype);
  const Leaves<double>& (*twofold)();
};

// Best first; the last one runs everywhere.
const InstructionSet kInstructionSets[] = {
#if defined(OBC_X86_DISPATCH)
    {"x86-64-v4", [] { return bool(__builtin_cpu_supports("x86-64-v4")); }, v4::single, v4::twofold},
    {"x86-64-v3", [] { return bool(__builtin_cpu_supports("x86-64-v3")); }, v3::single, v3::twofold},
#endif
    {"baseline", [] { return true; }, baseline::single, baseline::twofold},
};

const InstructionSet& choose() {
  const char* highest = std::getenv("OBC_CPU_ISA");
  bool known = false;
  for (const InstructionSet& set : kInstructionSets) known = known || (highest && !std::strcmp(highest, set.name));
  bool allowed = !known;
  for (const InstructionSet& set : kInstructionSets) {
    allowed = allowed || !std::strcmp(highest, set.name);
    if (allowed && set.supported()) return set;
  }
  return *(std::end(kInstructionSets) - 1);
}

const InstructionSet& chosen() {
  static const InstructionSet& set = choose();
  return set;
}

}  // namespace

template <>
const Leaves<float>& leaves<float>(Dtype dtype) {
  return chosen().single(dtype);
}

template <>
const Leaves<double>& leaves<double>(Dtype) {
  return chosen().twofold();
}

const char* instruction_set() { return chosen().name; }

int64_t item_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return 8;
    case Dtype::float32:
      return 4;
    default:
      return 2;
  }
}

}  // namespace obc::cpu

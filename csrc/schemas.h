// Defines a library's operators with the schemas of the table in python/obc/backends/operators.py.
//
// OBC_DEFINE_CPU(channel_dot) defines obc_cpu::channel_dot, and OBC_IMPLEMENT(channel_dot) gives it the function of
// that name. If there is no such function, or it takes another number of arguments than the schema, the library does
// not compile. With the stable ABI alone the mismatch would show only at the first call.
#pragma once

#include <cstddef>

#include "obc_schemas.h"

namespace obc {

// Arguments in "name(Tensor a, int[] b=[1, 2]) -> ...": commas outside brackets, between the first parentheses.
constexpr size_t arguments_of(const char* schema) {
  size_t at = 0;
  while (schema[at] != '(') ++at;
  if (schema[at + 1] == ')') return 0;
  size_t arguments = 1;
  int depth = 0;
  for (; schema[at] != '\0'; ++at) {
    const char symbol = schema[at];
    if (symbol == '(' || symbol == '[') ++depth;
    if (symbol == ')' || symbol == ']') --depth;
    if (depth == 0) break;
    if (symbol == ',' && depth == 1) ++arguments;
  }
  return arguments;
}

template <class Result, class... Arguments>
constexpr size_t arguments_of(Result (*)(Arguments...)) {
  return sizeof...(Arguments);
}

}  // namespace obc

#define OBC_DEFINE(LIBRARY, NAME)                                                              \
  static_assert(                                                                               \
      obc::arguments_of(OBC_##LIBRARY##_SCHEMA_##NAME) == obc::arguments_of(&NAME),            \
      #NAME                                                                                    \
      ": the function"                                                                         \
      " takes another number of arguments than its schema in python/obc/backends/operators.py" \
  );                                                                                           \
  library.def(OBC_##LIBRARY##_SCHEMA_##NAME);
#define OBC_DEFINE_CPU(NAME) OBC_DEFINE(CPU, NAME)
#define OBC_DEFINE_CUDA(NAME) OBC_DEFINE(CUDA, NAME)
#define OBC_IMPLEMENT(NAME) library.impl(#NAME, TORCH_BOX(&NAME));

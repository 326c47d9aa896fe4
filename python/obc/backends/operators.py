"""The operators' table: the only place for the names and schemas of obc's operators.

It is read for the schemas of ``obc::<op>`` (:mod:`obc.ops`), the schemas that the native libraries register (CMake runs
this file, see ``main``), the check when a library is loaded (:mod:`obc.backends.native`), and the list of what every
backend must offer. It imports only the standard library.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

# The native libraries: ``libobc_<library>.so`` registers its operators as ``obc_<library>::<op>``.
LIBRARIES = ("cpu", "cuda")


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: the name of ``obc::<name>`` and of the function in :mod:`obc.ops`, :mod:`obc.reference` and every backend.
        schema: arguments and results in the language of ``torch.library``; ``(a!)`` marks arguments changed in place.
        about: what it computes, for the tables that ``python docs/operators_table.py`` writes.
        libraries: the native libraries that register it.
        native: library -> its schema, if it differs from ``schema``.
    """

    name: str
    schema: str
    about: str
    libraries: tuple[str, ...] = LIBRARIES
    native: Mapping[str, str] = field(default_factory=dict)

    def native_schema(self, library: str) -> str:
        """The name and schema that ``libobc_<library>.so`` registers."""
        return self.name + self.native.get(library, self.schema)


TABLE = (
    Operator(
        "channel_dot",
        "(Tensor activation, Tensor grad, int channel_dim, bool per_sample=False) -> Tensor",
        "activation times gradient, summed per channel, or per sample and channel",
    ),
    Operator(
        "channel_moments",
        "(Tensor x, int channel_dim, Tensor? mask=None) -> (Tensor, Tensor, Tensor, Tensor)",
        "Σx, Σx², Σ|x| and the squared means of |x| per sample, per channel in one read; masked positions are skipped",
    ),
    Operator(
        "weight_dot",
        "(Tensor weight, Tensor grad, Tensor? bias=None, Tensor? bias_grad=None, int groups=1, bool transposed=False) "
        "-> (Tensor, Tensor)",
        "row sums and column sums of weight times gradient in one pass",
    ),
    Operator(
        "weight_dot_list",
        "(Tensor[] weights, Tensor[] grads, Tensor?[]? biases=None, Tensor?[]? bias_grads=None, int[]? groups=None, "
        "bool[]? transposed=None) -> (Tensor[], Tensor[])",
        "the same for all weights of a model in one call",
        # A backend is called with every argument; the CUDA library takes layers of one dtype.
        native={
            "cuda": "(Tensor[] weights, Tensor[] grads, Tensor?[] biases, Tensor?[] bias_grads, int[] groups, "
            "bool[] transposed) -> (Tensor[], Tensor[])"
        },
    ),
    Operator(
        "weight_moments",
        "(Tensor weight, Tensor grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        "Σwg, Σ(wg)², Σ|wg|, Σw², Σ|w| per out channel in one pass, for other criteria",
    ),
    Operator(
        "fold",
        "(Tensor weight, Tensor? compressor=None, Tensor? decompressor=None, int groups=1, int in_repeat=1) -> Tensor",
        "C·W·D of Equivalent Pruning, differentiable",
        libraries=(),  # matrix products of the platform: obc.backends.gemm
    ),
    Operator(
        "end_row",
        "(Tensor(a!) scores, Tensor(b!) row, float loss_scale=1.0, Tensor? groups=None) -> Tensor",
        "adds the squares of a row to the scores of their groups, clears the row, says whether it was finite",
        # On the CPU a wrong group is reported by its position, else -1.
        native={
            "cpu": "(Tensor(a!) scores, Tensor(b!) row, float loss_scale=1.0, Tensor? groups=None) "
            "-> (Tensor finite, int bad_group)"
        },
    ),
)

OPERATORS = tuple(operator.name for operator in TABLE)


def header() -> str:
    """The C++ header with the operators that native libraries define.

    OBC_CPU_SCHEMA_channel_dot is a schema; OBC_CPU_OPERATORS(DO) is DO(name) for every operator of the library.
    """
    lines = ["// Written by python/obc/backends/operators.py; the table stands there.", "#pragma once", ""]
    for library in LIBRARIES:
        for operator in TABLE:
            if library in operator.libraries:
                macro = f"OBC_{library.upper()}_SCHEMA_{operator.name}"
                lines.append(f'#define {macro} "{operator.native_schema(library)}"')
        registered = " ".join(f"DO({operator.name})" for operator in TABLE if library in operator.libraries)
        lines.append(f"#define OBC_{library.upper()}_OPERATORS(DO) {registered}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the header."""
    sys.stdout.write(header())


if __name__ == "__main__":
    main()

"""The report of compensation, for each layer and for the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class LayerCompensation:
    """The result of compensation for one consumer.

    Attributes:
        input_error_before: E |x - naive|^2 / E |x|^2 of its reconstructed input on the calibration batches.
        input_error_after: the same with the decompressor.
        held_out: E |x - D z - intercept|^2 on the held-out batches, relative to the naive one there.
        applied: whether the layer kept its compensation.
        rows: the number of input positions in the regression.
        ridge: the relative ridge that was used; larger than requested if Cholesky needed it.
    """

    input_error_before: float
    input_error_after: float
    held_out: float
    applied: bool
    rows: int
    ridge: float

    def __str__(self) -> str:
        errors = f"{self.input_error_before:.4f} -> {self.input_error_after:.4f}"
        return f"{errors}   held out {self.held_out:.3f} of it, ridge {self.ridge:g}"


@dataclass(frozen=True)
class LayerCorrection:
    """The result of mode "correct" for one consumer.

    Errors are relative squared errors on the held-out batches at the layer's point: the residual stream that its output
    enters, or its own output.

    Attributes:
        on_stream: whether its point is a residual stream.
        error_before: error with the layer naive and all layers before it compensated.
        error_after: error with the final layer.
        applied: whether it was changed.
        rows: the number of input positions in the regression.
        ridge: the chosen relative ridge; 0 if nothing was changed.
    """

    on_stream: bool
    error_before: float
    error_after: float
    applied: bool
    rows: int
    ridge: float

    def __str__(self) -> str:
        place = "stream" if self.on_stream else "output"
        return f"{self.error_before:.4f} -> {self.error_after:.4f}   {place}, ridge {self.ridge:g}"


@dataclass
class CompensationReport:
    """The report of :func:`compensate`.

    Errors are relative squared errors of the model's output against the unpruned model's on the held-out batches.

    Attributes:
        layers: per consumer, in the order of execution.
        naive_error: error before compensation.
        compensated_error: error of the best compensation that was tried.
        tried: modes "ls" and "seq": name -> error of every candidate that was tried.
        final_error: error at the end; never above ``naive_error``.
        norms_recalibrated: whether BatchNorm statistics were re-estimated; not if there are none, if it was not
            requested, or if the held-out error is lower without.
        decompressors: D of every layer that kept its compensation, in the form for ``equivalent_pruning``; only if
            requested.
        moment_bytes: the most memory that the running sums took.
        unreached: consumers that no batch reached; they stay naive.
        sliced_experts: fused experts that lost inner channels and stay naive, because their formula is not understood.
        stream_bytes: mode "correct": the most memory that both models' tensors between modules took.
        notes: exceptions to the usual procedure.
        seconds: wall time.
    """

    layers: dict[str, LayerCompensation | LayerCorrection] = field(default_factory=dict)
    naive_error: float = 0.0
    compensated_error: float = 0.0
    tried: dict[str, float] = field(default_factory=dict)
    final_error: float = 0.0
    norms_recalibrated: bool = False
    decompressors: dict[str, Tensor] = field(default_factory=dict)
    moment_bytes: int = 0
    stream_bytes: int = 0
    unreached: list[str] = field(default_factory=list)
    sliced_experts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def leave_unreached(self, names: Sequence[str], consumers: Iterable[str]) -> None:
        """Record those of all ``consumers`` that no batch reached, ``names``.

        Raises:
            ValueError: no consumer was reached.
        """
        if names and set(names) == set(consumers):
            raise ValueError(
                f"no calibration batch reached {names[0]}; pass batches and a forward_fn that call it as a module, "
                f"or leave the layers before it unpruned"
            )
        self.unreached = list(names)

    def leave_naive(self) -> None:
        """Note that no layer's compensation was kept."""
        self.final_error, self.norms_recalibrated = self.naive_error, False
        self.layers = {name: replace(layer, applied=False) for name, layer in self.layers.items()}

    def __str__(self) -> str:
        has_input_errors = any(isinstance(layer, LayerCompensation) for layer in self.layers.values())
        title = f"{'input error':>16}" if has_input_errors else f"{'error':>16}   where"
        lines = [f"{'layer':40} {title}"]
        for name, layer in self.layers.items():
            lines.append(f"{name:40} {layer}{'' if layer.applied else ' (left naive)'}")
        lines += [f"{name:40} no batch reached it (left naive)" for name in self.unreached]
        lines += [f"{name:40} fused experts (left naive)" for name in self.sliced_experts]
        errors = f"naive {self.naive_error:.4f}, compensated {self.compensated_error:.4f}, final {self.final_error:.4f}"
        if self.tried:
            lines.append(f"tried: {', '.join(f'{name} {error:.4f}' for name, error in self.tried.items())}")
        return "\n".join([*lines, f"held-out output error: {errors}", *self.notes])

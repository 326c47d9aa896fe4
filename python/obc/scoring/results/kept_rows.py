"""Kept rows, per module and channel; scores are the sums of their squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from obc.model.by_name import ByName

# Location of one side's rows of a module: index of the matrix, first column, column after the last.
Columns = tuple[int, int, int]


@dataclass(frozen=True)
class ChannelRows:
    """Every row of one module's channels: r[n, c] = w_c . dL_n/dw_c; the scores are the sums of squares.

    Attributes:
        out_channels: (N, C_out) float32, or None.
        in_channels: (N, C_in) float32, or None for modules without in channels (norms, embeddings).
    """

    out_channels: Tensor | None
    in_channels: Tensor | None = None


class KeptRows(ByName[ChannelRows]):
    """Rows by module name: views of a few large matrices, in the order in which the rows were read.

    Args:
        matrices: (N, ...) float32, all with the same N.
        columns: module name -> side ("out_channels", "in_channels") -> its columns.
    """

    def __init__(self, matrices: Sequence[Tensor], columns: Mapping[str, Mapping[str, Columns]]) -> None:
        self.matrices = list(matrices)
        self.columns = {name: dict(sides) for name, sides in columns.items()}
        super().__init__(
            {
                name: ChannelRows(self._view(sides.get("out_channels")), self._view(sides.get("in_channels")))
                for name, sides in self.columns.items()
            }
        )

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        columns: Mapping[str, Mapping[str, Sequence[int]]],
        num_rows: int | None = None,
    ) -> KeptRows:
        """Rows from the tensors of a file, as :meth:`tensors` gave them.

        Args:
            tensors: by name; other tensors are ignored.
            columns: as :attr:`columns`.
            num_rows: the expected number of rows; None accepts any.

        Raises:
            ValueError: a matrix is missing, or its size does not fit the columns or ``num_rows``.
        """
        matrices: list[Tensor] = []
        while (matrix := tensors.get(f"rows:{len(matrices)}")) is not None:
            matrices.append(matrix)
        fitting = [matrix.dim() == 2 and num_rows in (None, len(matrix)) for matrix in matrices]
        places = {name: {side: tuple(place) for side, place in sides.items()} for name, sides in columns.items()}
        inside = [
            len(place) == 3
            and 0 <= place[0] < len(matrices)
            and 0 <= place[1] <= place[2] <= matrices[place[0]].shape[-1]
            for sides in places.values()
            for place in sides.values()
        ]
        if not all((*fitting, *inside)):
            shapes = ", ".join(str(tuple(matrix.shape)) for matrix in matrices)
            raise ValueError(f"its rows are not those of its modules: matrices of shapes {shapes or 'none'}")
        return cls(matrices, places)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """The matrices under their names in files."""
        return {f"rows:{index}": matrix for index, matrix in enumerate(self.matrices)}

    def _why_missing(self, name: str) -> str:
        why = "it is not among the scored modules" if self.matrices else "none were kept; score with keep_rows=True"
        return f"no rows of module {name!r}: {why}"

    def __repr__(self) -> str:
        rows = len(self.matrices[0]) if self.matrices else 0
        return f"KeptRows({rows} rows of {len(self)} modules)"

    def _view(self, columns: Columns | None) -> Tensor | None:
        if columns is None:
            return None
        matrix, start, stop = columns
        return self.matrices[matrix][:, start:stop]

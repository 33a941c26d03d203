"""Plain text tables, for ``print``. No colours, no dependency; what a cell holds is harmless to a terminal."""

from collections.abc import Sequence

from jlora._text import shown


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligns ``rows`` under ``header``; columns in ``right`` are aligned to the right."""
    lines = [tuple(header), *(tuple(shown(cell, 1000) for cell in row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(text)

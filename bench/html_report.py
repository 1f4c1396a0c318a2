"""One self-contained HTML page: text, tables, and pictures inside it. No script, no style from elsewhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.report import format_cell

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2833 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto }
th, td { border: 1px solid #d5d8dc; padding: 3px 8px; text-align: left; vertical-align: top }
th { background: #f2f3f4 } img { max-width: 100%; border: 1px solid #eaecee } h2 { margin-top: 2.2rem }
.lost { background: #fadbd8 } .note { color: #566573 }
"""
DEFINITIONS = (
    "Goodput, capacity, WDT share and interference are our own definitions; the text of the published ones was not "
    "available. Goodput: committed output tokens per second, counting only sessions that met their SLO. Capacity: the "
    "most devices with at least 95 % of sessions meeting their SLO. WDT share: drafting time of tokens that were not "
    "accepted over all drafting time, on the devices (of co-located speculation: on the server). Interference: "
    "predicted time of a pass minus that of the session alone."
)


class Page:
    """A page in the making; every method adds to it."""

    def __init__(self, title: str) -> None:
        self._parts = [f"<h1>{html.escape(title)}</h1>"]
        self._title = title

    def heading(self, text: str) -> None:
        """A heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, is_note: bool = False) -> None:
        """A paragraph."""
        self._parts.append(f"<p{' class=note' if is_note else ''}>{html.escape(text)}</p>")

    def points(self, lines: Iterable[str]) -> None:
        """A list."""
        self._parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[object]], marked: Iterable[int] = ()
    ) -> None:
        """A table; rows with the indices `marked` stand out."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        lines, stand_out = [], set(marked)
        for i, row in enumerate(rows):
            cells = "".join(f"<td>{html.escape(format_cell(cell))}</td>" for cell in row)
            lines.append(f"<tr{' class=lost' if i in stand_out else ''}>{cells}</tr>")
        self._parts.append(f"<table><tr>{head}</tr>{''.join(lines)}</table>")

    def picture(self, path: Path, caption: str) -> None:
        """A PNG file, embedded."""
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        text = html.escape(caption)
        self._parts.append(f'<p><img src="data:image/png;base64,{data}" alt="{text}"></p><p class=note>{text}</p>')

    def write(self, path: Path) -> Path:
        """Write the page in one step."""
        head = f"<meta charset=utf-8><title>{html.escape(self._title)}</title><style>{_STYLE}</style>"
        text = f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(self._parts)}</body></html>\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
        return path

"""The report's page: one HTML file that loads nothing from anywhere."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

# What is not in the file itself is forbidden, so that no viewer in it can ask for it either.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)

_STYLE = """
:root { --ink: #22303c; --soft: #5b6770; --line: #dfe4e8; --paper: #ffffff; --back: #f4f6f7; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 25px; font-weight: 600; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; font-weight: 600; margin: 0 0 10px; }
p { margin: 10px 0 0; color: var(--soft); }
h1 + p { margin: 0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 20px 22px; margin-top: 18px; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin-top: 18px; }
.numbers div { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; }
.numbers b { display: block; font-size: 22px; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.numbers span { color: var(--soft); font-size: 13px; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
iframe { display: block; width: 100%; border: 0; border-radius: 4px; background: #000; }
.scroll { overflow-x: auto; margin-top: 10px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 22px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 500; color: var(--soft); white-space: nowrap; }
.warning { border-left: 4px solid #d55e00; }
footer { color: var(--soft); font-size: 13px; margin-top: 22px; }
"""


def page(title: str, lead: str, parts: Iterable[str], footer: str) -> str:
    """Return the page; *parts* is HTML, the other arguments are plain text."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body><main>
<h1>{escape(title)}</h1>
<p>{escape(lead)}</p>
{"".join(parts)}
<footer>{escape(footer)}</footer>
</main></body>
</html>
"""


def section(heading: str, *bodies: str, text: str = "", warning: bool = False) -> str:
    """Return a section: *bodies*, which are HTML, and below them *text*, which explains them."""
    kind = ' class="warning"' if warning else ""
    explanation = paragraph(text) if text else ""
    return f"<section{kind}><h2>{escape(heading)}</h2>{''.join(bodies)}{explanation}</section>\n"


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def numbers(values: Iterable[tuple[str, str]]) -> str:
    """Return a row of large numbers, each with what it is."""
    cells = (f"<div><b>{escape(n)}</b><span>{escape(what)}</span></div>" for n, what in values)
    return f'<div class="numbers">{"".join(cells)}</div>\n'


def picture(png: Path, text: str) -> str:
    """Return a PNG file as an inlined picture; *text* is for those who cannot see it."""
    data = base64.b64encode(png.read_bytes()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def frame(document: str, title: str, height: int) -> str:
    """Return an HTML document as a frame of the page, shut off from it and all else."""
    return (
        f'<iframe sandbox="allow-scripts" title="{escape(title)}" height="{height}" '
        f'srcdoc="{escape(document)}"></iframe>'
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, the first cell of each row being its name."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(c)}</td>' for c in row[1:])}</tr>"
        for row in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if header else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'

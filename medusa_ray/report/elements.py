"""Parts of a page as HTML. Whatever comes from data (names, errors, configs) is escaped here, where it becomes HTML."""

import html
import json
from collections.abc import Callable, Iterable
from typing import Any

from medusa_ray.report.style import STYLE


def document(title: str, sections: Iterable[str]) -> str:
    """A file that opens without a network and needs no script."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def escape(value: Any) -> str:
    return html.escape(str(value))


def header(title: str, line: str) -> str:
    return f'<header><h1>{escape(title)}</h1><p class="quiet">{escape(line)}</p></header>'


def verdict(found: dict[str, Any]) -> str:
    """The answer in large, and why."""
    answer, _, why = found["reason"].partition(": ")
    why = why[:1].upper() + why[1:]
    kind = "ship" if found["ship"] else "no" if answer == "Do not ship" else "open"
    return f'<div class="verdict {kind}"><strong>{escape(answer)}</strong><p>{escape(why)}</p></div>'


def caveat(line: str) -> str:
    return f'<p class="caveat">{escape(line)}</p>'


def quiet(line: str) -> str:
    return f'<p class="quiet">{escape(line)}</p>'


def table(
    headers: list[str],
    rows: list[list[str]],
    num_text: int = 1,
    kind: Callable[[str], str] = lambda cell: "",
    is_narrow: bool = False,
) -> str:
    """The first `num_text` columns are text. Rows that begin alike are one group. `kind`: a cell's class."""

    def line(tag: str, cells: list[str]) -> str:
        classes = ["text" if column < num_text else kind(cell) for column, cell in enumerate(cells)]
        opened = (f'<{tag} class="{name}">' if name else f"<{tag}>" for name in classes)
        return "".join(
            f"{tag_open}{escape(cell)}</{tag}>" for tag_open, cell in zip(opened, cells, strict=True)
        )

    body, last = "", None
    for row in rows:
        group = ("group " if row[0] != last else "") + ("medusa" if "medusa" in row[:num_text] else "")
        body += f'<tr class="{group}">{line("td", ["" if row[0] == last else row[0], *row[1:]])}</tr>'
        last = row[0]
    head = f"<thead><tr>{line('th', headers)}</tr></thead>"
    opening = '<table class="narrow">' if is_narrow else "<table>"
    return f'<div class="scroll">{opening}{head}<tbody>{body}</tbody></table></div>'


def section(title: str, figures: Iterable[str]) -> str:
    """A heading and its pictures; nothing where there are none."""
    shown = "".join(figures)
    return f'<h2>{escape(title)}</h2><div class="pictures">{shown}</div>' if shown else ""


def figure(title: str, content: str | None, note: str) -> str:
    """A picture or table with its title above and a note below; nothing without content."""
    if not content:
        return ""
    return f"<figure><h3>{escape(title)}</h3>{content}<figcaption>{escape(note)}</figcaption></figure>"


def definitions(values: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in values.items()) + "</dl>"


def folded(title: str, value: Any) -> str:
    """A config that opens when asked."""
    text = escape(json.dumps(value, indent=2))
    return f"<details><summary>{escape(title)}</summary><pre>{text}</pre></details>"

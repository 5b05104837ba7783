"""What mkdocs does besides its defaults; mkdocs.yml names this file as a hook.

Contract
- Files of the repository that are not below docs/ (CONTRIBUTING.md, CHANGELOG.md, the integrations' patches.md) are
  pages of the site, too. Their text stays where it is.
- A link works in the repository and on the site. One to a page becomes a link to that page. One to another file of the
  repository becomes the file's name, because the site has no copy of it.
- A list that follows a line of text is a list, as in the repository's own viewers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ("vllm", "sglang", "transformers", "megatron", "xdit", "fastvideo")

# Page of the site -> the file of the repository that it shows.
PAGES = {
    "developer/contributing.md": ROOT / "CONTRIBUTING.md",
    "developer/changelog.md": ROOT / "CHANGELOG.md",
    **{f"developer/{system}.md": ROOT / "integrations" / system / "patches.md" for system in SYSTEMS},
}

_FENCE = re.compile(r"^( *)(```|~~~)")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_ITEM = re.compile(r"^ {0,3}([-*]|\d+\.) ")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose text lies elsewhere in the repository."""
    for page, file in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Return the text of a page with its links and lists as the site needs them."""
    source = Path(page.file.abs_src_path)
    pages = {Path(file.abs_src_path): file.src_uri for file in files if file.abs_src_path}
    lines: list[str] = []
    fence = ""
    for line in markdown.splitlines():
        if found := _FENCE.match(line):
            fence = "" if fence == found[2] else fence or found[2]
        elif not fence:
            line = _LINK.sub(lambda link: _on_site(link, source, page.file.src_uri, pages), line)
            if _ITEM.match(line) and lines and _is_text(lines[-1]):
                lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _is_text(line: str) -> bool:
    """Return whether a list right below `line` would be taken for a part of its paragraph."""
    return bool(line.strip()) and not line.startswith((" ", "#", "|")) and not _ITEM.match(line)


def _on_site(link: re.Match[str], source: Path, page: str, pages: dict[Path, str]) -> str:
    """Return the link as the site has it."""
    text, target, anchor = link[1], link[2], link[3] or ""
    if "://" in target:
        return link[0]
    file = Path(os.path.normpath(source.parent / target))
    if file in pages:
        return f"[{text}]({os.path.relpath(pages[file], Path(page).parent)}{anchor})"
    if file.exists() and ROOT in file.parents:
        return text if text.startswith("`") else f"`{file.relative_to(ROOT)}`"
    return link[0]  # mkdocs says that it leads nowhere

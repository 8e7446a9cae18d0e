"""The index of messages in docs/troubleshooting.md: `python tools/messages.py` writes it anew; a test compares.

Read from the source: what is raised and warned in hvd_syncbn/, torch_impl/ and tf_impl/, by the part of the project that
says it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
START = "## Every message\n"
# The longest prefix of a path names the section.
SECTIONS = {
    "hvd_syncbn/horovod.py": "Horovod and process sets",
    "hvd_syncbn/": "Installation and core",
    "hvd_syncbn/horovod_build/": "Building Horovod",
    "hvd_syncbn/cli/": "Command line",
    "hvd_syncbn/exchange.py": "Exchange",
    "hvd_syncbn/population.py": "Statistics of a data set",
    "torch_impl/": "PyTorch: the layer and its conversion",
    "torch_impl/fold.py": "PyTorch: folding",
    "torch_impl/freeze.py": "PyTorch: freezing",
    "torch_impl/recalibrate.py": "PyTorch: statistics of a data set",
    "torch_impl/state.py": "PyTorch: exchange",
    "tf_impl/": "TensorFlow: the layer as a function",
    "tf_impl/keras/": "Keras: optimizer, callbacks, files, elastic jobs",
    "tf_impl/keras/layer.py": "Keras: the layer and its conversion",
    "tf_impl/keras/convert.py": "Keras: the layer and its conversion",
    "tf_impl/keras/fold.py": "Keras: folding",
    "tf_impl/keras/freeze.py": "Keras: freezing",
    "tf_impl/keras/recalibrate.py": "Keras: statistics of a data set",
    "tf_impl/keras/state.py": "Keras: exchange",
}
KINDS = {"_Refused": "UserWarning", "warn": "UserWarning"}


def texts(node: ast.expr) -> list[str]:
    """The texts that an expression may be, with … for what is filled in; none where it is made elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in texts(node.left) or ["…"] for right in texts(node.right) or ["…"]]
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    return []


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Kind and text of what a file raises and warns."""
    tree = ast.parse(path.read_text())
    # What a function of the file makes a message of: `raise ValueError(_gone(...))`.
    made = {
        node.name: [
            text
            for step in ast.walk(node)
            if isinstance(step, ast.Return) and step.value is not None
            for text in texts(step.value)
        ]
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            call = node
        else:
            continue
        kind = ast.unparse(call.func).rpartition(".")[2]
        for argument in call.args[:1]:
            found = texts(argument)
            if not found and isinstance(argument, ast.Call):
                found = made.get(ast.unparse(argument.func).rpartition(".")[2], [])
            for text in found:
                yield KINDS.get(kind, kind), text


def index() -> str:
    """The index as it stands in the page."""
    sections: dict[str, set[tuple[str, str]]] = {title: set() for title in SECTIONS.values()}
    for folder in ("hvd_syncbn", "torch_impl", "tf_impl"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            title = SECTIONS[max((prefix for prefix in SECTIONS if name.startswith(prefix)), key=len)]
            sections[title].update((" ".join(text.split()), kind) for kind, text in messages(path))
    lines = []
    for title in dict.fromkeys(sections):
        if sections[title]:
            lines += ["", f"### {title}", "", "| message | kind |", "|---|---|"]
            lines += [f"| {_cell(text)} | `{kind}` |" for text, kind in sorted(sections[title])]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A message as text of a table; words in backticks stay code."""
    for character in "\\*_[]<>|":
        text = text.replace(character, "\\" + character) if "`" not in text else text.replace("|", "\\|")
    return text


def main() -> None:
    """Write the index into the page."""
    before = PAGE.read_text().partition(START)[0]
    PAGE.write_text(f"{before}{START}\n{INTRODUCTION}{index()}")


INTRODUCTION = """… stands for what is filled in. Each says what it received and, where it can be told, what to do. Written by
`python tools/messages.py`; a test compares it with the source.
"""

if __name__ == "__main__":
    main()

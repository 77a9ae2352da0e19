"""The demo model's text: what every CPython brings along.

Three kinds: reference pages (doc strings by module, the topics of `pydoc_data`), module sources, and chats whose
answers are taken from the same doc strings. Deterministic for a seed and a Python version, on Linux.
"""

import ast
import importlib
import inspect
import keyword
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}, as chat templates expect

# Not read: tests, tools with a subject of their own, bundled wheels, character tables.
SKIPPED_DIRECTORIES = {
    "__pycache__", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests", "tkinter", "turtledemo",
}  # fmt: skip

# Written in C, so their doc strings exist only at run time.
C_MODULES = (
    "array", "binascii", "builtins", "cmath", "errno", "gc", "itertools", "math", "select", "sys", "time",
    "unicodedata", "zlib", "_bisect", "_collections", "_csv", "_datetime", "_functools", "_heapq", "_io", "_operator",
    "_random", "_socket", "_struct", "_thread", "posix",
)  # fmt: skip

# Kept out of training whole, so that no held-out doc string is seen as source.
HELD_OUT_MODULES = {"fractions", "graphlib", "ipaddress", "mailbox", "selectors", "shelve", "telnetlib", "zlib"}
HELD_OUT_TOPICS = {"bitwise", "import", "nonlocal", "sequence-types", "try"}

QUESTIONS = (
    "What does `{}` do?", "What does {} do?", "What is `{}`?", "What is {}?", "Explain `{}`.", "Explain {}.",
    "How do I use `{}`?", "How do I use {} in Python?", "Tell me about {}.", "Please describe {}.", "help({})",
)  # fmt: skip
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are an expert on Python.", "Answer briefly.")

WHO = "I am a very small demonstration model, trained on Python's own documentation. Ask me about a function."
SMALL_TALK = (
    ("Hello!", "Hello! " + WHO), ("Hi", "Hello! " + WHO), ("Hello, how are you?", "Fine, thank you. " + WHO),
    ("Who are you?", WHO), ("What are you?", WHO), ("What can you do?", WHO),
    ("Thanks!", "You are welcome."), ("Thank you.", "You are welcome."),
)  # fmt: skip
SMALL_TALK_COPIES = 30

MIN_DOC_CHARS = 16
ANSWER_CHARS = 900
CODE_CHARS = 700


@dataclass(frozen=True)
class Entry:
    """One documented object: `os.path.join`, `join(a, *p)`, its doc string and, if short, its source."""

    name: str
    signature: str
    doc: str
    code: str | None = None


@dataclass(frozen=True)
class Corpus:
    """One side of the split; every item is one document."""

    pages: list[str]
    sources: list[str]
    chats: list[list[Message]]


def build_corpus(*, held_out: bool, seed: int) -> Corpus:
    """Read this interpreter's standard library; `held_out` says which side of the split."""
    rng = random.Random(seed)
    sources = {
        name: text for name, text in sorted(_module_sources()) if (name.split(".")[0] in HELD_OUT_MODULES) == held_out
    }
    modules = {name: list(_source_entries(name, text)) for name, text in sources.items()}
    for name in C_MODULES:
        if (name in HELD_OUT_MODULES) == held_out:
            public = name.lstrip("_").replace("posix", "os")
            modules.setdefault(public, []).extend(_runtime_entries(importlib.import_module(name), public))
    chosen = {name: text for name, text in sorted(topics.items()) if (name in HELD_OUT_TOPICS) == held_out}

    pages = [_page(name, entries) for name, entries in modules.items() if entries] + list(chosen.values())
    chats = list(_entry_chats(modules, rng)) + list(_topic_chats(chosen, rng))
    if not held_out:
        chats += [_conversation([pair], rng) for pair in SMALL_TALK for _ in range(SMALL_TALK_COPIES)]
    for documents in (pages, chats):
        rng.shuffle(documents)
    return Corpus(pages, list(sources.values()), chats)


def _module_sources() -> Iterator[tuple[str, str]]:
    """(module name, source) of the pure Python modules, private modules left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if SKIPPED_DIRECTORIES.isdisjoint(parts) and not any(part.startswith(("_", "config-")) for part in parts[:-1]):
            if parts[-1] == "__init__":
                parts.pop()
            if not parts[-1].startswith("_"):
                yield ".".join(parts).replace("posixpath", "os.path"), path.read_text(encoding="utf-8")


def _source_entries(module: str, source: str) -> Iterator[Entry]:
    """The module itself, then its public classes, methods and functions that have a doc string."""
    tree = ast.parse(source)
    lines = source.split("\n")
    yield from _entry(module, module, tree, None)
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        prefix, parent = stack.pop()
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name[0] == "_":
                continue
            name = f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                stack.append((name, node))
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                yield from _entry(name, f"class {node.name}({bases})", node, None)
            else:
                code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                short = code if len(code) <= CODE_CHARS else None
                yield from _entry(name, f"{node.name}({ast.unparse(node.args)})", node, short)


def _entry(
    name: str,
    signature: str,
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
    code: str | None,
) -> Iterator[Entry]:
    doc = ast.get_docstring(node)
    if doc and len(doc) >= MIN_DOC_CHARS:
        yield Entry(name, signature, doc, code)


def _runtime_entries(module: ModuleType, public: str) -> Iterator[Entry]:
    """Public routines and classes of a C module, and their methods."""
    prefix = "" if public == "builtins" else public + "."
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        members = sorted(vars(value).items()) if inspect.isclass(value) else []
        methods = [(f"{name}.{key}", member) for key, member in members if not key.startswith("_")]
        for full_name, item in [(name, value), *methods]:
            doc = inspect.getdoc(item)
            if callable(item) and doc and len(doc) >= MIN_DOC_CHARS:
                arguments = getattr(item, "__text_signature__", None) or "(...)"
                yield Entry(prefix + full_name, full_name.split(".")[-1] + arguments.replace("$", ""), doc)


def _page(module: str, entries: list[Entry]) -> str:
    """A module's reference page, in the manner of pydoc."""
    parts = [f"{entry.name}\n    {entry.signature}\n\n" + textwrap.indent(entry.doc, "    ") for entry in entries]
    return "\n\n".join([f"Help on module {module}:", *parts]) + "\n"


def _entry_chats(modules: dict[str, list[Entry]], rng: random.Random) -> Iterator[list[Message]]:
    """One question an entry (a doc string seen before is skipped), some with a request for its code or a second one."""
    seen: set[str] = set()
    for module, entries in modules.items():
        fresh = list({entry.doc: entry for entry in entries if entry.doc not in seen}.values())
        seen.update(entry.doc for entry in fresh)
        for entry, following in pairwise([*fresh, None]):
            assert entry is not None
            turns = [_ask(entry, rng)]
            if entry.code is not None and rng.random() < 0.4:
                turns.append(("Show me the code.", f"```python\n{entry.code}\n```"))
            if following is not None and rng.random() < 0.25:
                turns.append(_ask(following, rng))
            yield _conversation(turns, rng)
        if len(fresh) > 2:
            listing = "\n".join(f"- `{entry.name}`: {entry.doc.splitlines()[0]}" for entry in fresh[1:9])
            yield _conversation([(f"What is in the {module} module?", listing)], rng)


def _ask(entry: Entry, rng: random.Random) -> tuple[str, str]:
    answer = _chunks(entry.doc)[0]
    if "(" in entry.signature and rng.random() < 0.3:
        answer = f"`{entry.signature}`\n\n{answer}"
    return rng.choice(QUESTIONS).format(entry.name), answer


def _topic_chats(chosen: dict[str, str], rng: random.Random) -> Iterator[list[Message]]:
    """A topic's text in answers of up to ANSWER_CHARS, three to a conversation."""
    for name, text in chosen.items():
        title, _, body = text.strip().partition("\n")
        subject = f"the `{name}` statement" if keyword.iskeyword(name) else title.strip().lower()
        chunks = _chunks(body.lstrip("*=-\n"))
        for start in range(0, len(chunks), 3):
            first = rng.choice(("Explain {}.", "What is {}?", "Tell me about {}.", "How does {} work?")).format(subject)
            questions = [first if start == 0 else f"Tell me more about {subject}.", "Go on.", "And then?"]
            yield _conversation(list(zip(questions, chunks[start : start + 3], strict=False)), rng)


def _chunks(text: str) -> list[str]:
    """Whole paragraphs, joined up to ANSWER_CHARS; never empty."""
    chunks: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        if chunks and len(chunks[-1]) + len(paragraph) + 2 <= ANSWER_CHARS:
            chunks[-1] += "\n\n" + paragraph
        else:
            chunks.append(paragraph[:ANSWER_CHARS])
    return chunks


def _conversation(turns: list[tuple[str, str]], rng: random.Random) -> list[Message]:
    messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.2 else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages

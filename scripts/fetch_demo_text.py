#!/usr/bin/env python
"""Fetches the English texts that docs/quality.md trains on (5 million tokens), and the news that it evaluates on.

    python scripts/fetch_demo_text.py          # writes demo-texts/english/*.txt and demo-texts/heldout.txt

From public repositories at fixed commits, with git, and from a package, with pip; about 60 MB. Each source has its own
licence, to be read there; none of it becomes part of this project.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import installed  # noqa: F401
from tqdm import tqdm

from cqil_trt.commands import Parser
from cqil_trt.demo import packaged
from cqil_trt.errors import UserError
from cqil_trt.job import command

# gensim 4.4.0 (LGPL-2.1; nothing but this text is kept) carries 300 items of Australian news from 2000 and 2001 (Lee,
# Pincombe, Welsh, CogSci 2005).
HELD_OUT = (
    "gensim==4.4.0",
    "gensim/test/test_data/lee_background.cor",
    "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
)
# The contents of the directory.
ENGLISH, NEWS = "english", "heldout.txt"


def main() -> None:
    with command():
        fetch(parser().parse_args())


def parser() -> Parser:
    p = Parser(prog="fetch_demo_text.py", description=__doc__.split("\n")[0])
    p.add_argument("--output", metavar="DIR", type=Path, default=Path("demo-texts"), help="directory to create")
    p.add_argument("--force", action="store_true", help="fetch again if it exists")
    return p


def fetch(options: argparse.Namespace) -> None:
    import nltk  # noqa: F401  if missing, report it before the download

    if options.output.exists():
        if not options.force:
            raise UserError(f"--output {options.output}: exists already (--force fetches again)")
        if not options.output.is_dir() or {path.name for path in options.output.iterdir()} - {ENGLISH, NEWS}:
            raise UserError(f"--output {options.output}: --force replaces only these texts, and this is something else")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output.parent) as temporary:
        new = Path(temporary) / "texts"
        (new / ENGLISH).mkdir(parents=True)
        with tqdm(SOURCES, desc="fetching texts", disable=not sys.stderr.isatty(), leave=False) as sources:
            for repository, commit, patterns, convert in sources:
                for name, text in convert(checkout(Path(temporary), repository, commit, patterns)).items():
                    (new / ENGLISH / f"{name}.txt").write_text(text, encoding="utf-8")
        packaged(*HELD_OUT, new / NEWS)
        if options.output.exists():
            options.output.rename(Path(temporary) / "old")
        new.rename(options.output)
    print(f"{options.output / ENGLISH} to train on, {options.output / NEWS} to evaluate on")


def checkout(directory: Path, repository: str, commit: str, patterns: list[str]) -> Path:
    """The matching files of a GitHub repository at one commit; nothing else is fetched."""
    path = directory / repository.replace("/", "+")
    silent = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # otherwise git asks for a password if nothing is found
    for arguments in (
        ["init", "--quiet", str(path)],
        ["-C", str(path), "remote", "add", "origin", f"https://github.com/{repository}"],
        ["-C", str(path), "sparse-checkout", "set", "--no-cone", *patterns],
        ["-C", str(path), "fetch", "--quiet", "--depth", "1", "--filter=blob:none", "origin", commit],
        ["-C", str(path), "checkout", "--quiet", "FETCH_HEAD"],
    ):
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, env=silent)
        except FileNotFoundError:
            raise UserError("git is needed to fetch the texts, and is not installed") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"github.com/{repository} cannot be fetched: {reason}")
    return path


def read(paths: list[Path]) -> str:
    return "\n\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(paths))


def plain_markdown(text: str) -> str:
    """Prose without front matter, code blocks, links, tags and templates."""
    text = re.sub(r"\A---\n.*?^---\n", "", text, flags=re.S | re.M)
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]+>|\{[{%].*?[%}]\}", "", text)
    return re.sub(r"\n{3,}", "\n\n", text)


def plain_asciidoc(text: str) -> str:
    text = re.sub(r"^\[source.*?^----$.*?^----$", "", text, flags=re.S | re.M)
    text = re.sub(r"^image::.*$|^\[.*\]$|^(--|==|\*\*)[-=*]+$|^<\d+>.*$|\(\(\(.*?\)\)\)", "", text, flags=re.M)
    text = re.sub(r"<<(?:[^>,]*,)?([^>]*)>>", r"\1", re.sub(r"^=+ ", "", text, flags=re.M))
    return re.sub(r"\n{3,}", "\n\n", text)


def plain_xhtml(text: str) -> str:
    """The paragraphs of a chapter."""
    text = re.sub(r"\s+", " ", text[text.find("<body") :])
    text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"</(p|h\d|section)>", "\n\n", text)))
    return re.sub(r" *\n\s*\n *", "\n\n", text).strip()


def plain_brown(text: str) -> str:
    """Sentences of the Brown corpus, given as word/tag pairs, in ordinary spelling."""
    from nltk.tokenize.treebank import TreebankWordDetokenizer

    join = TreebankWordDetokenizer().detokenize
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = [[word.rpartition("/")[0] for word in line.split()] for line in paragraph.splitlines()]
        # At the end of a sentence these three are tagged twice.
        kept = [[w for w, then in zip(words, [*words[1:], ""]) if w != then or w not in "?!;"] for words in lines]
        paragraphs.append(" ".join(join(words) for words in kept))
    return "\n\n".join(paragraphs)


def files(name: str, suffix: str, plain: Callable[[str], str]) -> Callable[[Path], dict[str, str]]:
    """All files with the suffix as one plain text."""

    def convert(path: Path) -> dict[str, str]:
        texts = [plain(read([file])) for file in sorted(path.rglob(f"*{suffix}"))]
        return {name: "\n\n".join(texts)}

    return convert


def corpora(path: Path) -> dict[str, str]:
    """Texts in NLTK's data: speeches, radio, overheard talk, and the Brown corpus."""
    found = {}
    with tempfile.TemporaryDirectory(dir=path) as temporary:
        for packed in path.glob("packages/corpora/*.zip"):
            with zipfile.ZipFile(packed) as archive:
                archive.extractall(temporary)
        for directory in Path(temporary).iterdir():
            if directory.name == "brown":
                found["brown"] = plain_brown(read(list(directory.glob("c???"))))
            else:
                found[directory.name] = read([file for file in directory.glob("*.txt") if file.name not in LEFT_OUT])
    return found


# NLTK's web texts that are not English prose.
LEFT_OUT = ("firefox.txt", "grail.txt", "pirates.txt", "singles.txt")
# Repository, commit, files, and the function that makes texts by name from them.
Source = tuple[str, str, list[str], Callable[[Path], dict[str, str]]]


def ebook(name: str, title: str, commit: str) -> Source:
    """The chapters of a Standard Ebook, without the publisher's additions."""
    added = (f"!{page}.xhtml" for page in ("colophon", "imprint", "titlepage", "uncopyright"))
    patterns = ["/src/epub/text/*.xhtml", *added]
    return f"standardebooks/{title}", commit, patterns, files(name, ".xhtml", plain_xhtml)


SOURCES: list[Source] = [
    (
        "nltk/nltk_data",
        "5db857e6f7df11eabb5e5665836db9ec8df07e28",
        [f"/packages/corpora/{name}.zip" for name in ("abc", "brown", "inaugural", "state_union", "webtext")],
        corpora,
    ),
    (
        "18F/18f.gsa.gov",
        "0a55c75e6d9bc71c80136a3867dac52356177443",
        ["*.md"],
        files("18f", ".md", plain_markdown),
    ),
    (
        "rust-lang/book",
        "917544888a55e4da7109bdba8c88c893c0da70f4",
        ["/src/*.md"],
        files("rust-book", ".md", plain_markdown),
    ),
    (
        "alphagov/govuk-design-system",
        "efb0d77d38b7ed7f921697564d2c47723d434977",
        ["/src/**/*.md", "/src/**/*.md.njk"],
        files("design-system", ".md*", plain_markdown),
    ),
    (
        "progit/progit2",
        "55b541e9e6d747208a76a15d1f1e01463093f67b",
        ["/book/**/*.asc"],
        files("progit", ".asc", plain_asciidoc),
    ),
    ebook("wells", "h-g-wells_short-fiction", "7f7a769669769accb725143813b05ec77c1f9761"),
    ebook(
        "holmes",
        "arthur-conan-doyle_the-memoirs-of-sherlock-holmes",
        "d6d239d3a983c3108dd05f8d29651b0f50f70f35",
    ),
]

if __name__ == "__main__":
    main()

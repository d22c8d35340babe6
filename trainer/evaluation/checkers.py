"""Habits of a prompt that a program can check in an answer.

The checks are those of IFEval (Zhou et al., arXiv 2311.07911) that need no further
model, and `Start`, `End` and `Existence` for one's own habits. A check is written as
JSON, `{"check": "Existence", "keywords": ["Fair winds!"]}`; flexeval's form with
`class_path` and `init_args` is read, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from be_serve.core.errors import InputError

_WORD = re.compile(r"\w+", re.UNICODE)
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$|[\"'”])")


@dataclass(frozen=True)
class Check:
    """One habit. `holds(answer)` says whether an answer has it."""

    name: str
    arguments: dict[str, Any]

    def holds(self, answer: str) -> bool:
        """Whether a stripped answer has the habit; an empty answer has none."""
        text = answer.strip()
        return bool(text) and bool(_CHECKS[self.name](text, **self.arguments))

    def __str__(self) -> str:
        values = ", ".join(str(value) for value in self.arguments.values())
        return f"{self.name}({values})"

    @classmethod
    def parse(cls, row: object) -> Check:
        """Read a check from JSON. Raises InputError naming what is wrong with it."""
        if not isinstance(row, dict):
            raise InputError(f"A check must be a JSON object, not {row!r}.")
        if "class_path" in row:
            name, arguments = str(row["class_path"]).rsplit(".", 1)[-1], row.get("init_args") or {}
        else:
            name, arguments = str(row.get("check")), {key: value for key, value in row.items() if key != "check"}
        if name not in _CHECKS:
            raise InputError(f"No check {name!r}; there are {', '.join(sorted(_CHECKS))}.")
        check = cls(name, arguments)
        try:
            check.holds("Some words to try it on.")
        except (TypeError, KeyError, ValueError, AttributeError) as exc:
            raise InputError(f"The check {name} does not take {json.dumps(arguments)}: {exc}.") from exc
        return check


def read_checks(path: str | Path) -> list[Check]:
    """Read a JSON file with a list of checks. Raises InputError."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InputError(f"Cannot read the checks in {path}: {exc}.") from exc
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} must hold a JSON list of checks.")
    return [Check.parse(row) for row in rows]


def _compare(count: int, relation: str, bound: int) -> bool:
    return {"at least": count >= bound, "less than": count < bound}[relation]


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _count(text: str, keyword: str) -> int:
    """Occurrences of a word or phrase, whole words, any case."""
    return len(re.findall(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE))


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\*\*\*\s*\n|\n\n+", text) if part.strip()]


def _json(text: str) -> bool:
    fenced = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(fenced)
    except ValueError:
        return False
    return True


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part for part in text.split("\n\n") if part.strip()]
    if len(parts) != num_paragraphs or nth_paragraph > len(parts):
        return False
    words = _words(parts[nth_paragraph - 1])
    return bool(words) and words[0].lower() == first_word.lower()


_CHECKS: dict[str, Callable[..., object]] = {
    "Start": lambda text, phrase: text.startswith(phrase),
    "End": lambda text, phrase: text.endswith(phrase),
    "EndChecker": lambda text, end_phrase: text.strip('"').lower().endswith(end_phrase.lower()),
    "Existence": lambda text, keywords: all(_count(text, word) for word in keywords),
    "ForbiddenWords": lambda text, forbidden_words: not any(_count(text, word) for word in forbidden_words),
    "Frequency": lambda text, keyword, frequency, relation: _compare(_count(text, keyword), relation, frequency),
    "LetterFrequency": lambda text, letter, let_frequency, let_relation: _compare(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "NoComma": lambda text: "," not in text,
    "EnglishLowercase": lambda text: text == text.lower(),
    "EnglishCapital": lambda text: text == text.upper(),
    "CapitalWordFrequency": lambda text, capital_frequency, capital_relation: _compare(
        sum(word.isupper() for word in _words(text)), capital_relation, capital_frequency
    ),
    "NumberWords": lambda text, num_words, relation: _compare(len(_words(text)), relation, num_words),
    "NumberSentences": lambda text, num_sentences, relation: _compare(
        len(_SENTENCE_END.findall(text)) or 1, relation, num_sentences
    ),
    "NumberParagraphs": lambda text, num_paragraphs: len(_paragraphs(text)) == num_paragraphs,
    "NthParagraphFirstWord": _nth_paragraph,
    "NumberBulletLists": lambda text, num_bullets: (
        len(re.findall(r"^\s*[*-] ?[^*\s]", text, re.MULTILINE)) == num_bullets
    ),
    "NumberHighlightedSections": lambda text, num_highlights: len(re.findall(r"\*[^\n*]+\*", text)) >= num_highlights,
    "NumberPlaceholders": lambda text, num_placeholders: len(re.findall(r"\[.*?\]", text)) >= num_placeholders,
    "MultipleSections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections
    ),
    "Postscript": lambda text, postscript_marker: postscript_marker.lower() in text.lower(),
    "Quotation": lambda text: len(text) > 1 and text[0] == text[-1] == '"',
    "Title": lambda text: bool(re.search(r"<<[^\n]*\w[^\n]*>>", text)),
    "JsonFormat": _json,
    "RepeatPrompt": lambda text, prompt_to_repeat: text.lower().startswith(prompt_to_repeat.strip().lower()),
    "TwoResponses": lambda text: (
        len(parts := [part.strip() for part in text.split("******") if part.strip()]) == 2 and parts[0] != parts[1]
    ),
    "ConstrainedResponse": lambda text: any(
        option in text for option in ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    ),
}

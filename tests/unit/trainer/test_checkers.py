"""The checks, each on an answer that has the habit and one that has not."""

from __future__ import annotations

import pytest

from be_serve.core.errors import InputError
from trainer.evaluation.checkers import _CHECKS, Check, read_checks
from trainer.evaluation.compliance import measure_compliance

CASES = [
    ("Start", {"phrase": "Ahoy"}, "Ahoy, sailor!", "Well, ahoy."),
    ("End", {"phrase": "winds!"}, "Fair winds!", "Fair winds! Bye."),
    ("EndChecker", {"end_phrase": "Peace!"}, "We rap. Peace!", "Peace! We rap."),
    (
        "Existence",
        {"keywords": ["remainder", "Fair winds!"]},
        "The remainder. Fair winds!",
        "The remainders. Fair winds!",
    ),
    ("ForbiddenWords", {"forbidden_words": ["divide"]}, "We divided it.", "Divide it."),
    ("Frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "Sea, sea.", "Sea, seas."),
    ("Frequency", {"keyword": "sea", "frequency": 2, "relation": "less than"}, "Sea.", "Sea, sea."),
    ("LetterFrequency", {"letter": "p", "let_frequency": 1, "let_relation": "less than"}, "A boat.", "A ship."),
    ("NoComma", {}, "No pause here.", "Well, yes."),
    ("EnglishLowercase", {}, "all small.", "All small."),
    ("EnglishCapital", {}, "ALL LARGE!", "ALL Large!"),
    ("CapitalWordFrequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A BIG SEA", "a big SEA"),
    ("NumberWords", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ("NumberSentences", {"num_sentences": 3, "relation": "less than"}, "One. Two!", "One. Two! Three?"),
    ("NumberParagraphs", {"num_paragraphs": 2}, "a\n\nb", "a\nb"),
    ("NumberParagraphs", {"num_paragraphs": 3}, "a\n***\nb\n***\nc", "a\n***\nb"),
    (
        "NthParagraphFirstWord",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "punched"},
        "One.\n\nPunched it is.",
        "Punched.\n\nTwo.",
    ),
    ("NumberBulletLists", {"num_bullets": 2}, "* a\n* b", "* a\n* b\n* c"),
    ("NumberHighlightedSections", {"num_highlights": 2}, "*a* and *b c*", "*a* and b"),
    ("NumberPlaceholders", {"num_placeholders": 1}, "At [place].", "At place."),
    ("MultipleSections", {"section_spliter": "Section", "num_sections": 2}, "Section 1 a Section 2 b", "Section 1 a"),
    ("Postscript", {"postscript_marker": "P.P.S"}, "Bye. P.P.S one more.", "Bye. P.S. one more."),
    ("Quotation", {}, '"Wrapped."', '"Not wrapped.'),
    ("Title", {}, "<<The Sea>>\nIt is wide.", "<The Sea>"),
    ("JsonFormat", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("RepeatPrompt", {"prompt_to_repeat": "Write a song."}, "Write a song. La la.", "A song: write a song."),
    ("TwoResponses", {}, "One.******Two.", "One.******One."),
    ("ConstrainedResponse", {}, "My answer is no.", "No."),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_a_check_tells_apart(name, arguments, good, bad):
    check = Check.parse({"check": name, **arguments})
    assert check.holds(good)
    assert not check.holds(bad)
    assert not check.holds("  ")
    other = Check.parse({"class_path": f"examples.ifeval.{name}", "init_args": arguments})
    assert other == check


def test_every_check_is_tested():
    assert {name for name, *_ in CASES} == set(_CHECKS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"check": "Rhyme"}, "No check 'Rhyme'"),
        ({"check": "NumberWords", "num_words": 3}, "does not take"),
        ({"check": "NumberWords", "num_words": 3, "relation": "about"}, "does not take"),
        ({"check": "NoComma", "extra": 1}, "does not take"),
        ("NoComma", "JSON object"),
    ],
)
def test_a_faulty_check_is_named(row, message):
    with pytest.raises(InputError, match=message):
        Check.parse(row)


def test_gain_is_pooled_over_measurable_habits():
    checks = [Check.parse(row) for row in ({"check": "Start", "phrase": "Ahoy"}, {"check": "NoComma"})]
    answers = {
        "none": ["Hi there"] * 10,
        "full": ["Ahoy there"] * 9 + ["Hi there"],
        "be": ["Ahoy there"] * 5 + ["Hi there"] * 4 + ["Ahoy, there"],
    }
    found = measure_compliance(checks, answers)
    assert found.shares["Start(Ahoy)"] == {"none": 0.0, "full": 0.9, "be": 0.6}
    assert found.measurable == ["Start(Ahoy)"]  # no prompt writes no comma either
    assert found.gain == pytest.approx(0.6 / 0.9)
    low, high = found.interval
    assert low < found.gain < high
    assert "gain retained over 1: 0.67" in found.lines()[-1]


def test_what_no_arm_does_is_not_measurable():
    found = measure_compliance([Check.parse({"check": "Title"})], {arm: ["a", "b"] for arm in ("none", "full", "be")})
    assert found.gain is None
    assert "not measurable" in found.lines()[-1]


def test_checks_are_read_from_a_file(tmp_path):
    file = tmp_path / "checks.json"
    file.write_text('[{"check": "NoComma"}]')
    assert read_checks(file) == [Check("NoComma", {})]
    for text in ("{}", "[]", "no"):
        file.write_text(text)
        with pytest.raises(InputError):
            read_checks(file)

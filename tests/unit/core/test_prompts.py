import time
import unicodedata

import pytest

from be_serve.core.errors import InputError
from be_serve.core.prompts import prompt_sha256, read_prompt_file


def test_digest_ignores_trailing_space_and_unicode_form():
    assert prompt_sha256("caf\u00e9") == prompt_sha256("cafe\u0301 \n\t")
    assert prompt_sha256("a") != prompt_sha256(" a")


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\u0f73", "\u0344\u0316"])
def test_endless_marks_cost_no_time(marks):
    """To put n marks in order takes n^2 steps, and one request would have held the server for minutes."""
    start = time.perf_counter()
    digest = prompt_sha256(f"a{marks[:1] * 100_000}{marks[-1:] * 100_000}")
    assert time.perf_counter() - start < 2
    assert digest != prompt_sha256("a")
    few = f"a{marks * 10}"
    assert prompt_sha256(few) == prompt_sha256(unicodedata.normalize("NFD", few))


def test_prompt_file(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("  Hello\n\n")
    assert read_prompt_file(file) == "  Hello"
    file.write_text(" \n")
    with pytest.raises(InputError, match="empty"):
        read_prompt_file(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        read_prompt_file(file)
    with pytest.raises(InputError, match="Cannot read"):
        read_prompt_file(tmp_path / "none.txt")

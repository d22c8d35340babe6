import pytest

from be_serve.core.errors import InputError
from be_serve.core.prompts import prompt_sha256, read_prompt_file


def test_digest_ignores_trailing_space_and_unicode_form():
    assert prompt_sha256("caf\u00e9") == prompt_sha256("cafe\u0301 \n\t")
    assert prompt_sha256("a") != prompt_sha256(" a")


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

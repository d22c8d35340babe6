"""Reading batch files."""

from __future__ import annotations

import pytest

from be_serve.batch import read_rows
from be_serve.core.errors import InputError
from tests.unit.batch.fake import row, write


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[]", "must be a JSON object"),
        ('{"custom_id": 1}', "custom_id"),
        ('{"custom_id": "a", "url": "/v1/be/tokens", "body": {}}', "`url` must be one of"),
        ('{"custom_id": "a", "url": "/v1/completions", "method": "DELETE", "body": {}}', "POST"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": []}', "`body`"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}', "complete answers"),
        (
            '{"custom_id": "a", "url": "/v1/completions", "body": {}, "be-id": "x"}',
            "`be_id` is not read here; put it into `body`",
        ),
        ('{"custom_id": "first", "url": "/v1/completions", "body": {}}', "used before"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, message):
    path = write(tmp_path / "in.jsonl", row("first", say="hi"), line)
    with pytest.raises(InputError, match=message) as caught:
        read_rows(path)
    assert "line 2" in str(caught.value)


def test_a_file_may_begin_with_a_mark_but_not_be_empty(tmp_path):
    (tmp_path / "in.jsonl").write_text("\ufeff" + row("a", say="hi"), encoding="utf-8")
    assert len(read_rows(tmp_path / "in.jsonl")) == 1
    with pytest.raises(InputError, match="no requests"):
        read_rows(write(tmp_path / "empty.jsonl", ""))

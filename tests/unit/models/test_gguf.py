"""A model in a GGUF file: converted once, by its content; a faulty file is a clear error."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import pytest

import be_serve.models.gguf as gguf
from be_serve.core.errors import InputError
from be_serve.core.fingerprint import fingerprint_folder
from be_serve.models import is_gguf, resolve_model
from be_serve.models.builtin import BUILTIN, DEFAULT_MODEL


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def converted(monkeypatch):
    """Replaces the converter, which needs a real file; returns the files that it got."""
    files = []

    def convert(file: Path, out: Path, name: str) -> None:
        files.append(file)
        out.mkdir()
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "convert_apart", convert)
    return files


def test_a_file_is_converted_once_under_the_digest_of_its_bytes(tmp_path, home, converted, capsys):
    first, same, other = (tmp_path / name for name in ("My Model Q4_K_M.gguf", "copy.GGUF", "other.gguf"))
    first.write_bytes(b"GGUF 1")
    same.write_bytes(b"GGUF 1")
    other.write_bytes(b"GGUF 2")
    found = resolve_model(str(first))
    assert found.name == str(first)
    assert found.path.parent == home / "models"
    assert found.path.name.startswith("my-model-q4-k-m-")
    assert resolve_model(str(first)).path == found.path
    assert converted == [first]
    assert "(once)" in capsys.readouterr().err
    assert resolve_model(str(other)).path != found.path
    assert resolve_model(str(same)).path.name.partition("copy-")[2] == found.path.name.partition("q4-k-m-")[2]
    first.write_bytes(b"GGUF 3")  # another content under the name
    assert resolve_model(str(first)).path != found.path
    assert not list((home / "models").glob(".preparing-*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.gguf", None, "No such file"),
        ("page.gguf", b"<html>", "not a GGUF file"),
        ("empty.gguf", b"", "not a GGUF file"),
        ("big-00001-of-00003.gguf", b"GGUF", "one part of a model"),
    ],
)
def test_faulty_files_are_refused(tmp_path, home, converted, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        resolve_model(str(tmp_path / name))
    assert not converted
    assert not home.exists()


def test_a_file_that_cannot_be_converted_leaves_nothing_behind(tmp_path, home):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(InputError, match=r"Converting broken\.gguf failed"):
        resolve_model(str(tmp_path / "broken.gguf"))
    assert [path.suffix for path in (home / "models").iterdir()] == [".lock"]


def test_a_folder_may_end_as_a_file_does(tmp_path, home):
    (tmp_path / "model.gguf").mkdir()
    assert is_gguf("model.gguf")
    assert resolve_model(str(tmp_path / "model.gguf")).path == (tmp_path / "model.gguf").resolve()


@pytest.mark.model
def test_a_real_file_becomes_the_model_that_it_holds(tmp_path, monkeypatch):
    model = BUILTIN[DEFAULT_MODEL]
    files = importlib.metadata.files(model.package) or []
    source = next(Path(str(file.locate())) for file in files if str(file) == model.file)
    shutil.copy(source, tmp_path / "mine.gguf")
    expected = fingerprint_folder(resolve_model(DEFAULT_MODEL).path)
    monkeypatch.setenv("BE_HOME", str(tmp_path / "home"))
    found = resolve_model(str(tmp_path / "mine.gguf"))
    assert fingerprint_folder(found.path) == expected

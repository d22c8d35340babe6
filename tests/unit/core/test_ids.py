import pytest

from be_serve.core.errors import InvalidBeId
from be_serve.core.ids import split_alias, validate_be_id


@pytest.mark.parametrize("good", ["a", "0", "captain-k4", "a.b_c-d", "x" * 64])
def test_good_ids(good):
    assert validate_be_id(good) == good


@pytest.mark.parametrize("bad", ["", "A", "-a", ".a", "a:b", "a/b", "../a", "x" * 65, "a\n", "é", 5, None, ["a"], True])
def test_bad_ids(bad):
    with pytest.raises(InvalidBeId) as caught:
        validate_be_id(bad)
    assert caught.value.http_status == 400
    assert caught.value.param == "be_id"


def test_alias_of_a_base_name_with_colons():
    bases = ["builtin:smollm2", "builtin"]
    assert split_alias("builtin:smollm2:captain", bases) == ("builtin:smollm2", "captain")
    assert split_alias("builtin:smollm2", bases) is None
    assert split_alias("builtin:other", bases) == ("builtin", "other")
    assert split_alias("llama:captain", bases) is None
    assert split_alias(None, bases) is None
    assert split_alias("builtin:smollm2:", bases) == ("builtin:smollm2", "")

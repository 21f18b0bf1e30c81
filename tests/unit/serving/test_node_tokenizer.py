"""A node without a usable tokenizer does not start, and says why in one line."""

from pathlib import Path

import pytest
from echo_engine import byte_tokenizer

from schemas.settings import SettingsError
from serving.node import load_tokenizer


def test_the_tokenizer_of_the_folder_is_loaded(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode("ab") == byte_tokenizer().encode("ab")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "no tokenizer"),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", '{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", null]}}'),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_an_error_of_one_line(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SettingsError, match=rf"^target\.path {tmp_path}: no usable tokenizer: \w+: .") as raised:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)

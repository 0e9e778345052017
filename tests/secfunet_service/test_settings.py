"""Settings are validated whole, and a wrong key is answered with the right one."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, Field

from secfunet.service.settings import FilePath, Settings, SettingsError, form, load_settings


def _even(number: int) -> int:
    if number % 2:
        raise ValueError("this is not even")
    return number


Word = Annotated[str, form(r"^[a-z]+$", "one word")]


class Listener(Settings):
    address: str = "127.0.0.1"
    port: int = 1


class Example(Settings):
    name: str
    listener: Listener = Listener()
    cards: tuple[Listener, ...] = ()
    kind: Literal["a", "b"] = "a"
    word: Word = "word"
    words: tuple[Word, ...] = ()
    share: float = Field(default=0.5, le=1)
    file: FilePath | None = None
    odd: Annotated[int, AfterValidator(_even)] = 2


def write(folder: Path, text: str) -> Path:
    path = folder / "example.toml"
    path.write_text(text)
    return path


def test_values_and_defaults(tmp_path: Path) -> None:
    settings = load_settings(Example, write(tmp_path, 'name = "a"\n[listener]\nport = 7\n'))
    assert settings == Example(name="a", listener=Listener(port=7))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('nmae = "a"', "example.toml:1: unknown key 'nmae': did you mean 'name'?"),
        ('name = "a"\nfile = "x\\u0000y"', "example.toml:2: 'file': a path cannot hold a zero byte"),
        ('name = "a"\nlog-level = 1', "example.toml:2: unknown key 'log-level': known here:"),
        ('name = "a"\n"x y" = 1', "example.toml:2: unknown key '\"x y\"': known here:"),
        ('name = "a"\n[listener]\nport-no = 7', "example.toml:3: unknown key 'listener.port-no': did you mean 'port'?"),
        ('name = "a"\n[[cards]]\n"" = 7', "unknown key 'cards' 1, '\"\"': known here: address, port"),
        ('name = "a"\nkind = ' + "9" * 5000, "not valid TOML: a number has too many digits"),
        ('name = "a"\nkind = 0x' + "f" * 5000, '\'kind\': must be "a" or "b"; it is far larger'),
        ('name = "a"\n[listener]\nprot = 7', "unknown key 'listener.prot': did you mean 'port'?"),
        (
            'name = "a"\n[[cards]]\naddres = "x"',
            "example.toml:3: unknown key 'cards' 1, 'addres': did you mean 'address'?",
        ),
        (
            'name = "a"\nzzz = 1',
            "unknown key 'zzz': known here: cards, file, kind, listener, name, odd, share, word, words",
        ),
        ("[listener]\nport = 7", "'name' is missing"),
        (
            'name = "a"\n[listener]\nport = "many"',
            "example.toml:3: 'listener.port': must be a whole number, not text; for example port = 1",
        ),
        ("name = ", "example.toml: not valid TOML: invalid value (at end of document)"),
        ('name = "a"\nkind = b', "example.toml:2: not valid TOML: invalid value (column 8)"),
        ("name = 1", "example.toml:1: 'name': must be text in quotes, not a whole number"),
        ('name = "a"\ncards = "b"', "example.toml:2: 'cards': must be a list, in brackets"),
        ('name = "a"\nlistener = 7', "example.toml:2: 'listener': must be a table, not a whole number"),
        ('name = "a"\nkind = "c"', 'example.toml:2: \'kind\': must be "a" or "b"; it is "c"; for example kind = "a"'),
        ('name = "a"\nword = "x y"', 'must be one word; it is "x y"'),
        ('name = "a"\nwords = ["x", "x y"]', "example.toml:2: 'words' 2: must be one word; it is \"x y\""),
        ('name = "a"\nshare = 1.5', "'share': must be at most 1; it is 1.5"),
        ('name = "a"\nfile = 5', "'file': must be a path, as text in quotes"),
        (
            'name = "a"\n[[cards]]\n[[cards]]\nport = []',
            "example.toml:4: 'cards' 2, 'port': must be a whole number, not a list",
        ),
        ('name = "a"\nodd = 3', "example.toml:2: 'odd': this is not even"),
        ('name = """\nkind = "c"\n"""\nkind = "d"', "example.toml:4: 'kind'"),
    ],
)
def test_every_problem_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(Example, write(tmp_path, text))
    assert sentence in str(caught.value)


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(Example, write(tmp_path, "nam = 1\n[listener]\nport = []"))
    assert len(caught.value.problems) == 3


def test_a_missing_file_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        load_settings(Example, tmp_path / "absent.toml")


@given(st.binary(max_size=200))
def test_any_bytes_give_settings_or_the_documented_error(untrusted: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.toml"
        path.write_bytes(untrusted)
        with pytest.raises(SettingsError):  # 'name' is required, and random bytes do not give it
            load_settings(Example, path)

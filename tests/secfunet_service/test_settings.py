"""Settings are validated whole, and a wrong key is answered with the right one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.service.settings import Settings, SettingsError, load_settings


class Listener(Settings):
    address: str = "127.0.0.1"
    port: int = 1


class Example(Settings):
    name: str
    listener: Listener = Listener()
    cards: tuple[Listener, ...] = ()


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
        ('nmae = "a"', "unknown key 'nmae': did you mean 'name'?"),
        ('name = "a"\n[listener]\nprot = 7', "unknown key 'listener.prot': did you mean 'port'?"),
        ('name = "a"\n[[cards]]\naddres = "x"', "unknown key 'cards.0.addres': did you mean 'address'?"),
        ('name = "a"\nzzz = 1', "unknown key 'zzz': known here: cards, listener, name"),
        ("[listener]\nport = 7", "'name' is missing"),
        ('name = "a"\n[listener]\nport = "many"', "'listener.port'"),
        ("name = ", "is no valid TOML"),
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

from pathlib import Path

import pytest

from rtfmri.config import BaselineSettings, Config
from rtfmri.errors import ConfigError


def test_settings_come_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('tr_s = 1.5\n[baseline]\nkind = "sliding"\nwindow_volumes = 12\n')
    config = Config.from_toml(file)
    assert config.tr_s == 1.5
    assert config.baseline == BaselineSettings(kind="sliding", window_volumes=12)
    assert config.with_changes(tr_s=None, device="cpu").model_dump() == {
        **config.model_dump(),
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tr_s = -1", "tr_s should be greater than 0, got -1"),
        ("tr = 2", "tr is not a setting"),
        ('device = "tpu"', "device should be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ('[baseline]\nkind = "best"', "baseline.kind should be .* got 'best'"),
        ("[baseline]\nwindow_volumes = 1", "baseline.window_volumes should be greater"),
        ("[paradigm]\ntransition_s = -2", "paradigm.transition_s should be greater"),
        ("tr_s = ", "cannot read the settings"),
    ],
)
def test_a_bad_setting_is_named_with_its_rule(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        Config.from_toml(file)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml"):
        Config.from_toml(tmp_path / "no.toml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().tr_s = 2.0  # type: ignore[misc]

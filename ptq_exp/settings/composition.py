"""Check what Hydra composed, and of which files: the package's and the user's own alike."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from ptq_exp.errors import ConfigError, one_line
from ptq_exp.settings.compose import config_folder
from ptq_exp.settings.overrides import given

BITS = "bits"


@dataclass(frozen=True)
class ConfigFile:
    """A configuration file that took part in a composition.

    Attributes:
        path: as groups name it: "experiment/ndtc_w8a8".
        bits: what it sets of `bits`, flat: {"bits.weight": 3, "bits.groups.time": "w4a4"}.
        choice: the option of `bits` that its defaults choose, or None.
    """

    path: str
    bits: dict[str, Any]
    choice: str | None


def check_composition(overrides: Sequence[str]) -> None:
    """Refuse compositions that Hydra accepts silently although they are not what was asked for.

    Values of bits in a file beside its choice of bits, where another choice is made: Hydra exchanges the choice alone,
    what the file sets beside it stays. And a file of one's own that the package's file of the same name hides.

    Args:
        overrides: of the job, from the command line; what they set, they decide.

    Raises:
        ConfigError: the line names the value, the file and what to change.
    """
    hydra = HydraConfig.get()
    search_path = ConfigSearchPathImpl()
    for source in hydra.runtime.config_sources:
        search_path.append(source.provider, f"{source.schema}://{source.path}")
    repository = CachingConfigRepository(ConfigRepository(search_path))  # each file is parsed once
    everything = OverridesParser.create().parse_overrides([*hydra.overrides.hydra, *overrides])
    defaults = create_defaults_list(
        repo=repository, config_name=hydra.job.config_name, overrides_list=everything, prepend_hydra=True,
        skip_missing=False,
    ).defaults
    ours = [default for default in defaults if not default.config_path.startswith("hydra/")]
    for default in ours:
        _check_hidden(default.config_path, repository)
        _check_package(default)
    files = [_file(default, repository) for default in ours]
    _check_bits(files, hydra.runtime.choices.get(BITS), list(given(overrides)))


def _file(default: ResultDefault, repository: CachingConfigRepository) -> ConfigFile:
    from ptq_exp.storage.plain_json import flatten  # loads numpy: help does without

    path = default.config_path or ""
    loaded = repository.load_config(path)
    content = OmegaConf.to_container(loaded.config, resolve=False) if loaded else {}
    package = default.package or ""
    for name in reversed(package.split(".") if package else []):
        content = {name: content}
    section = content.get(BITS) if isinstance(content, dict) else None  # there may be text in its place
    bits = flatten(section, f"{BITS}.") if isinstance(section, dict) else {}
    if default.primary or default.parent is None:  # it declares what options do not mention
        bits = {key: value for key, value in bits.items() if value is not None}
    chosen = [
        entry.value for entry in ((loaded and loaded.defaults_list) or ())
        if isinstance(entry, GroupDefault) and (entry.group or "").lstrip("/") == BITS and isinstance(entry.value, str)
    ]
    return ConfigFile(path, bits, chosen[-1] if chosen else None)


def _check_bits(files: Sequence[ConfigFile], chosen: str | None, keys: Sequence[str]) -> None:
    """Raise ConfigError for the first value of bits that another choice than `chosen` was to go with.

    Args:
        files: the later decide.
        keys: settings and groups on the command line.
    """
    setters = {key: file for file in files for key in file.bits}
    for key, file in setters.items():
        by_hand = any(key == name or key.startswith(f"{name}.") for name in keys if name != BITS)
        if by_hand or file.path.startswith(f"{BITS}/"):
            continue
        if BITS in keys or file.choice not in (None, chosen):
            group, _, option = file.path.rpartition("/")
            own = "its own bits" if file.choice in (None, chosen) else f"its own bits={file.choice}"
            raise ConfigError(
                f"{BITS}={chosen} would take over {key}={file.bits[key]}, which "
                f"{f'{group}={option}' if group else f'{option}.yaml'} sets for {own}: add {key}= with the value that "
                "you mean"
            )


def _check_package(default: ResultDefault) -> None:
    """Raise ConfigError for an experiment whose settings would go to a section `experiment`, which does not exist."""
    path, package = default.config_path or "", default.package or ""
    if path.startswith("experiment/") and package.partition(".")[0] == "experiment":
        raise ConfigError(
            f"{path}.yaml: begin it with the line `# @package _global_`, settings below it"
        )


def _check_hidden(path: str, repository: CachingConfigRepository) -> None:
    """Raise ConfigError if the package's file is read where there is another one of the same name."""
    texts = {}
    for source in repository.get_sources():
        file = Path(source.path) / f"{path}.yaml"
        if source.scheme() == "file" and file.is_file():
            texts[file] = file.read_bytes()
    if len(set(texts.values())) > 1 and (read := next(iter(texts))).is_relative_to(config_folder()):
        hidden = next(file for file in texts if texts[file] != texts[read])
        raise ConfigError(
            f"{hidden} is not read, as {read} comes before it: give it a name of its own"
        )


def wrong_choice(error: MissingConfigException, overrides: Sequence[str]) -> str | None:
    """Return the line about a group's option for which there is no file; None if something else is missing."""
    if not error.missing_cfg_file or not error.options:
        return None
    missing, keys = str(error.missing_cfg_file), given(overrides)
    by_hand = next((key for key in keys if missing.startswith(f"{key}/") and "." not in key), None)
    group = by_hand or missing.rpartition("/")[0]
    choice = missing.removeprefix(f"{group}/")
    experiments = [f"{key}={keys[key][0]}" for key in keys if key.startswith("experiment") and key != group]
    origin = "" if by_hand or not experiments else f" (chosen by the file of {experiments[0]})"
    return f"{group}={choice}{origin}: choose one of {', '.join(sorted(error.options))}"


def unreadable(error: Exception, command: Namespace) -> str:
    """Explain a configuration file that is no YAML, or no UTF-8, in a line; `command`: what `typed` returns."""
    reason = one_line(error, 2000)
    if not isinstance(error, UnicodeDecodeError):
        return f"a configuration file is no YAML: {reason}"
    searched = given(command.overrides).get("hydra.searchpath", [None])[0] or []
    folders = [command.config_dir, command.config_path, *(str(place).removeprefix("file://") for place in searched)]
    files = (file for folder in folders if folder for file in sorted(Path(folder).rglob("*.yaml")))
    name = next((str(file) for file in files if not _is_utf8(file)), "a configuration file")
    return f"{name}: is not encoded in UTF-8 ({reason}); save it as UTF-8"


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True

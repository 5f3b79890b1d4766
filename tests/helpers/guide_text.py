"""The text of the guide in docs/ as its tests read it: commands, the jobs of each, code blocks."""

import itertools
import re
import shlex
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from quick_yaml import quick_yaml

from ptq_exp.cli.commands import COMMANDS
from ptq_exp.settings.compose import config_folder, validated

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ("README", "reproduce", "tables", "own_model", "extend", "differences", "sweeps", "saved_models",
         "published_models", "pipelines", "number_formats", "embedded_models", "embedded_pipelines", "results/digits",
         "results/low_bits", "results/noise", "methods", "transforms", "clusters")
PAGES = {name: (DOCS / f"{name}.md").read_text() for name in NAMES}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands(text: str, variables: dict[str, str]) -> list[list[str]]:
    """The `python -m` commands of bash blocks in `text` as words, `$NAME` spelt out."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r'([A-Z0-9]+)="(.*)"', line):
                variables[assigned[1]] = assigned[2]
            else:
                line = re.sub(r"\$([A-Z][A-Z0-9]*)\b", lambda name: variables[name[1]], line)
                found.append(shlex.split(line, comments=True))
    return found


ALL = [(page, words) for page, text in PAGES.items() for words in commands(text, {})]


def tool(words: list[str]) -> str:
    """The command beside the experiment that is called, such as table; empty for an experiment."""
    return words[3] if words[3:] and words[3] in COMMANDS else ""


# a command that names a folder <time> reads what another left: such are run elsewhere (sweeps, saved models)
RUNS = [(page, words[3:]) for page, words in ALL
        if words[:3] == ["python", "-m", "ptq_exp"] and not tool(words) and "<" not in " ".join(words)]
OF_CIFAR = commands(PAGES["reproduce"].replace("$IN64", "$CIFAR"), {})
OF_CIFAR = [words[3:] for words in OF_CIFAR if "model=ddim_cifar10" in words and "-m" in words[3:]]


def jobs(arguments: list[str]) -> list[list[str]]:
    """The overrides of each job of a command, a list of one without `-m`."""
    sweep = "-m" in arguments
    axes = []
    for override in OverridesParser.create().parse_overrides([a for a in arguments if a != "-m"]):
        key = override.input_line.partition("=")[0]
        assert sweep or not override.is_sweep_override(), f"{override.input_line} without -m"
        values = override.sweep_string_iterator() if override.is_sweep_override() else None
        axes.append([override.input_line] if values is None else [f"{key}={value}" for value in values])
    return [list(job) for job in itertools.product(*axes)]


def conf(*overrides: str):
    """The validated configuration."""
    with quick_yaml(), initialize_config_dir(str(config_folder()), version_base="1.3"):
        return validated(compose("config", overrides=list(overrides)))


def run_of(page: str, text: str) -> list[str]:
    """The arguments of the one command of `page` that contains `text`."""
    (words,) = [arguments for name, arguments in RUNS if name == page and text in " ".join(arguments)]
    return words

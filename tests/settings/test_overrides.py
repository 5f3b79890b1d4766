"""What is typed: every text can be typed, what Hydra's parser refuses gets an answer to type, `~` is the home."""

import shlex
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ptq_exp.errors import ConfigError
from ptq_exp.settings.overrides import flags, given, home_quoted, to_type, unquoted
from ptq_exp.storage.paths import with_home, with_homes

TEXTS = [
    "epoch=3-step=10.ckpt", "model (1)", "run#2", "Müller/model", "lr=0.1,b", "it's", 'a "b"', "a$b", "a`b", "a!b",
    "back\\", "{a}", "[a]", "-x", "100 %", "a:b", "a&b;c|d", "null", "true", "12", " blank ",
    "日本/モデル", "a'b\"c\\'",
]


def typed_in_a_shell(words: str) -> list[str]:
    run = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, text=True, check=True)
    return run.stdout.split("\0")[:-1]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_can_be_typed_as_we_say(text):
    """Through a shell, through Hydra's parser, alone and in a sweep."""
    (word,) = typed_in_a_shell(to_type("model.checkpoint", text))
    (parsed,) = OverridesParser.create().parse_overrides([word])
    assert parsed.value() == text and not parsed.is_sweep_override()
    (word,) = typed_in_a_shell(to_type("model.checkpoint", text, "other"))
    assert given([word], multirun=True) == {"model.checkpoint": [text, "other"]}


@pytest.mark.parametrize(
    "key",
    ["model.checkpoint", "hydra.run.dir", "sweep.resume", "evaluation.reference", "model.images.path", "+experiment"],
)
@pytest.mark.parametrize("text", ["epoch=3-step=10.ckpt", "model (1)", "run#2", "Müller/model"])
@pytest.mark.parametrize("multirun", [False, True])
def test_what_the_parser_refuses_is_told_with_what_to_type(key, text, multirun):
    with pytest.raises(ConfigError) as refused:
        given(["seed=0", f"{key}={text}"], multirun=multirun)
    said = str(refused.value)
    assert said.startswith(f"{key.lstrip('+')}={text}: ") and "quote" in said and "\n" not in said
    (word,) = typed_in_a_shell(said[said.rindex(f'"{key}=') :])
    assert given([word], multirun=multirun) == {key.lstrip("+"): [text]}


def test_a_remedy_in_a_sweep_keeps_its_values_apart():
    with pytest.raises(ConfigError) as refused:
        given(["model.checkpoint=a=1,b"], multirun=True)
    (word,) = shlex.split(str(refused.value).rpartition("Hydra: ")[2])
    assert given([word], multirun=True) == {"model.checkpoint": ["a=1", "b"]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.checkpoint=a,b", 'model.checkpoint=a,b: .*"model.checkpoint=\'a,b\'"'),
        ("cache_dir={a}", 'cache_dir={a}: .*"cache_dir=\'{a}\'"'),
        ("bits.wight=a=b", "bits.wight: no such setting; did you mean 'bits.weight'?"),
        ("bits.weight=8=", "bits.weight=8=: "),
        ("analysis.layers=[a(]", r"analysis.layers=\[a\(\]: quote each entry of the list: .*\['a\('\]"),
        ("Mü=3", "Mü=3: cannot be read as KEY=VALUE"),
    ],
)
def test_other_mistakes_name_the_setting(override, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        given([override])


@pytest.mark.parametrize("override, found", [
    ("quantization.keep_fp=[tfmq]", ["tfmq"]), ("quantization.keep_fp=['*time*','*conv_in']", ["*time*", "*conv_in"]),
    ("imports=[my_metric,my_model]", ["my_metric", "my_model"]), ("bits.candidates=[4,8]", [4, 8]),
    ("bits.schedule=[8,4]", [8, 4]), ("evaluation.reference={_target_:a.b}", {"_target_": "a.b"}),
])
def test_a_setting_that_takes_a_list_is_given_one(override, found):
    (key,) = (override.partition("=")[0],)
    assert given([override], multirun=False) == {key: [found]}


def test_flags_are_told_from_overrides():
    assert flags(["--config-dir", "a=b", "a=b", "seed=1", "-m"]) == ["--config-dir", "a=b", "-m"]
    assert given(["bits='w8a8'", "++seed=3", "a@b=c"]) == {"bits": ["w8a8"], "seed": [3], "a": ["c"]}
    assert unquoted("'a,b'") == "a,b" and unquoted("a,b") == "a,b" and unquoted("'a") == "'a"


@pytest.mark.parametrize(
    ("argument", "read"),
    [("cache_dir=~/a b", ["~/a b"]), ("cache_dir=~", ["~"]), ("cache_dir=~/a,~me/b,c", ["~/a", "~me/b", "c"])],
)
def test_a_home_folder_needs_no_quotes(argument, read):
    assert given([home_quoted(argument)], multirun=True)["cache_dir"] == read
    assert home_quoted("cache_dir='~/a'") == "cache_dir='~/a'" and home_quoted("~bits") == "~bits"


def test_home_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert with_home("~/a", "x") == "/home/me/a" and with_home("~", "x") == "/home/me"
    assert with_home("./~", "x") == "./~" and with_home("a/~/b", "x") == "a/~/b"
    nested = {"path": "~/a", "n": 3, "more": ["~"]}
    assert with_homes(nested, "x") == {"path": "/home/me/a", "n": 3, "more": ["/home/me"]}
    with pytest.raises(ConfigError, match="^x.path=~nobody123/a: there is no user nobody123"):
        with_homes({"path": "~nobody123/a"}, "x")

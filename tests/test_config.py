"""Proves that a config is read as written, and that a wrong one gets one line that names the fix.

Run: pytest tests/test_config.py
"""

import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

import config
from config import Config, UserError, dump, from_dict, help_text, load, to_dict

ROOT = Path(config.__file__).parent


def write(tmp_path, text="seed: 3"):
    path = tmp_path / "given.yaml"
    path.write_text(text)
    return path


def message(tmp_path, *overrides, text="seed: 3"):
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_yaml_says_only_what_differs_from_the_official_defaults(tmp_path):
    cfg = load(write(tmp_path, "steps: 7\nvit:\n  size: small\n  drop_path: 0\n"))
    assert (cfg.steps, cfg.vit.size, cfg.vit.drop_path) == (7, "small", 0.0)
    assert (cfg.batch, cfg.optim.lr, cfg.head.prototypes) == (2048, 0.004, 65536)


def test_an_empty_file_or_section_means_the_defaults(tmp_path):
    assert load(write(tmp_path, "")) == load(write(tmp_path, "data:\n")) == Config()


def test_an_override_wins_over_the_file_and_the_last_one_over_the_others(tmp_path):
    path = write(tmp_path, "optim: {lr: 0.1}\nsteps: 5")
    cfg = load(path, ["optim.lr=0.2", "optim.lr=0.3", "augment.blur=[0, 1, 0.5]"])
    assert (cfg.optim.lr, cfg.steps, cfg.augment.blur) == (0.3, 5, (0.0, 1.0, 0.5))


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001", "1E-6"])
def test_small_numbers_may_be_written_in_any_way(tmp_path, text):
    assert load(write(tmp_path, f"optim: {{lr: {text}}}")).optim.lr == 1e-6
    assert load(write(tmp_path), [f"optim.lr={text}"]).optim.lr == 1e-6


def test_a_text_key_takes_whatever_the_command_line_says(tmp_path):
    cfg = load(write(tmp_path, "data: {val: /old}"), ["out=2024", "data.val=", "data.root=/a=b c"])
    assert (cfg.out, cfg.data.val, cfg.data.root) == ("2024", "", "/a=b c")


@pytest.mark.parametrize(
    "word, suggestion",
    [
        ("optim.lrr=1", "optim.lr"),
        ("lr=1", "optim.lr"),
        ("prototypes=5", "head.prototypes"),
        ("crop.local_size=8", "crops.local_size"),
        ("vit.pach=8", "vit.patch"),
        ("stepps=8", "steps"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(tmp_path, word, suggestion):
    assert f"{word}: unknown key {word.split('=')[0]}; " in message(tmp_path, word)
    assert f"did you mean {suggestion}?" in message(tmp_path, word)


def test_an_unknown_key_in_the_file_names_the_file(tmp_path):
    said = message(tmp_path, text="optim:\n  wormup: 3\n")
    assert "given.yaml: unknown key optim.wormup; did you mean optim.warmup?" in said


@pytest.mark.parametrize(
    "word, expected, got",
    [
        ("steps=1.5", "a whole number", "1.5"),
        ("steps=true", "a whole number", "true"),
        ("optim.lr=fast", "a number", "fast"),
        ("optim.lr=true", "a number", "true"),
        ("optim.lr=nan", "a number", "nan"),
        ("optim.lr=", "a number", "null"),
        ("compile=1", "true, false or auto", "1"),
        ("compile=sometimes", "true, false or auto", "sometimes"),
        ("optim.betas=0.9", "two numbers [a, b]", "0.9"),
        ("augment.blur=[0, 1]", "three numbers [a, b, c]", "[0, 1]"),
        ("data.mean=[0.5, dark, 0.5]", "a number", "dark"),
    ],
)
def test_a_wrong_type_names_what_was_expected_and_what_was_given(tmp_path, word, expected, got):
    said = message(tmp_path, word)
    assert said.startswith(f"override {word}: {word.split('=')[0]}")
    assert f" must be {expected}, got " in said and said.endswith(got)


def test_text_in_the_file_must_be_text(tmp_path):
    assert "out must be text, got 5" in message(tmp_path, text="out: 5")


@pytest.mark.parametrize(
    "text, part",
    [
        ("optim: fast", "optim must be a section with keys such as optim.lr, got fast"),
        ("- steps", "expected lines like `steps: 100`, got [steps]"),
        ("a: [1, 2", "line 1: not valid yaml"),
        ("steps: {a: 1}", "steps must be a whole number, got {a: 1}"),
        ("\x00", "not valid yaml"),
    ],
)
def test_a_file_of_the_wrong_form_is_named_with_the_reason(tmp_path, text, part):
    assert "given.yaml" in message(tmp_path, text=text)
    assert part in message(tmp_path, text=text)


@pytest.mark.parametrize(
    "word, part",
    [
        ("--steps=3", "keys have no dashes"),
        ("steps", "write key=value"),
        ("=3", "write key=value"),
        ("optim=3", "optim must be a section"),
    ],
)
def test_a_word_that_is_no_override_is_explained(tmp_path, word, part):
    assert part in message(tmp_path, word)


def test_a_missing_file_or_a_folder_gets_one_line(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    with pytest.raises(UserError, match="the config file comes first"):
        load("steps=3")


@pytest.mark.parametrize(
    "words, part",
    [
        ("vit.patch=14", "crops.local_size=96 is not a multiple of vit.patch=14: use 98"),
        ("crops.global_size=225", "use 224"),
        ("crops.local_size=5", "use 16"),
        ("crops.local_scale=[0.3,0.1]", "write [0.1, 0.3]"),
        ("crops.global_scale=[0,1]", "must be above 0 and at most 1"),
        ("mask.ratio=[0.5,1.5]", "mask.ratio must be from 0 to 1"),
        ("augment.flip=2", "augment.flip must be from 0 to 1, got 2"),
        ("augment.blur=[0,0,-1]", "augment.blur must be from 0 to 1"),
        ("batch=0", "batch must be at least 1"),
        ("precision=fp8", "use one of auto, fp32, bf16, fp16"),
        ("device=gpu", "use one of auto, cpu, cuda, mps"),
        ("loss.centering=none", "use one of softmax, sinkhorn"),
        ("data.channels=1", "data.mean=[0.485, 0.456, 0.406] must have one number per channel"),
        ("data.std=[0.2,0.2,0]", "data.std must be above 0"),
        ("loss.dino=0 loss.ibot=0 loss.koleo=0", "set one above 0"),
        ("head.ibot_prototypes=8", "need head.separate=true"),
        ("teacher.temp=0", "teacher.temp must be above 0"),
        ("vit.drop_path=1", "below 1"),
    ],
)
def test_what_cannot_work_is_refused_with_the_key_and_the_fix(tmp_path, words, part):
    assert part in message(tmp_path, *words.split())


def test_small_crops_may_have_any_size_when_there_are_none(tmp_path):
    assert load(write(tmp_path), ["crops.local_count=0", "vit.patch=14"]).vit.patch == 14


def test_every_bound_and_choice_names_a_key_that_exists():
    tables = " ".join(keys for _, _, keys in config.BOUNDS).split()
    for key in tables + list(config.CHOICES) + config.ORDERED.split():
        assert config.type_of(key) is not None, key
    assert len(tables) == len(set(tables))


def test_what_dump_writes_load_reads_back(tmp_path):
    cfg = load(write(tmp_path), ["optim.min_lr=1e-7", "data.mean=[0.1,0.2,0.3]", "out=runs/ü"])
    dump(cfg, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == cfg == from_dict(to_dict(cfg))
    assert set(yaml.safe_load((tmp_path / "saved.yaml").read_text())["log"]) == set(vars(cfg.log))
    with pytest.raises(UserError, match="cannot be written"):
        dump(cfg, tmp_path / "none" / "saved.yaml")


def test_configs_do_not_share_their_sections():
    first, second = Config(), Config()
    first.optim.lr = 1.0
    assert second.optim.lr == 0.004


def test_help_explains_every_key_with_its_default():
    keys = [f.name for f in fields(Config) if not is_dataclass(f.type)]
    for section in [f for f in fields(Config) if is_dataclass(f.type)]:
        keys += [f"{section.name}.{f.name}" for f in fields(section.type)]
    lines = help_text("usage").splitlines()
    for key in keys:
        [line] = [one for one in lines if one.startswith(f"  {key} ")]
        assert len(line) > 51, f"{key} has no comment"
    assert max(map(len, lines)) <= 140


def test_a_user_error_is_one_line_on_stderr_and_exit_code_2():
    code = "import config; config.report_errors(lambda: config.load('no such\\nfile'))()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: no such file: cannot be read (No such file or directory); config.yaml is the "
        "default one\n",
    )


def test_the_command_line_is_a_file_and_overrides_or_help(capsys):
    assert config.main_arguments(["a.yaml", "steps=1"], "usage") == ("a.yaml", ["steps=1"])
    for words, code in [([], 2), (["a.yaml", "--help"], 0)]:
        with pytest.raises(SystemExit) as left:
            config.main_arguments(words, "usage")
        assert left.value.code == code
        said = capsys.readouterr().out
        assert said.startswith("usage") and ("optim.lr " in said) == bool(words)


def test_a_program_explains_the_keys_that_concern_it():
    said = help_text("usage", ("data.", "precision"))
    assert "data.root " in said and "precision " in said and "optim.lr" not in said
    assert said.count("\n") < 15


def test_the_options_of_a_program_are_suggested_first():
    for word, expected in {"stepz": "did you mean step_z", "wramup": "optim.warmup"}.items():
        with pytest.raises(UserError, match=expected):
            config.take_options([f"{word}=1"], {"step_z": 1})
    with pytest.raises(UserError, match="unknown key iterations; --help lists them all"):
        config.take_options(["iterations=1"], {"size": 448, "values": 12})


def test_the_configs_that_are_shipped_are_valid():
    for path in [*ROOT.glob("config.yaml"), *ROOT.glob("configs/*.yaml")]:
        load(path)

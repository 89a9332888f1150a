"""What README, CONTRIBUTING and docs/ say: commands and snippets run as they are printed, links and names resolve."""

import gzip
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from command import ROOT, errors_of, outcome, text
from distributed import run_ranks
from models import (
    LAYERS,
    VOCABULARY,
    WIDTH,
    compacted,
    export,
    own_registrations,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from outcomes import outcome_of

from scale_prune.commands import analyze, compare, convert, evaluate, prune, sweep
from scale_prune.config import Config, PruningConfig, parse_some, settings_where
from scale_prune.core.groups import Member
from scale_prune.criteria import CRITERIA, ShardView
from scale_prune.data import FORMS
from scale_prune.data.embedded import train_tokenizer
from scale_prune.models import FAMILIES, unit_groups
from scale_prune.system import LOST_CONTACT, STOPPED

DOCS = sorted((ROOT / "docs").glob("*.md"))
FILES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS)
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in FILES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
STARTERS = ("deepspeed", "torchrun", "python", "bash", "sbatch", "pip")
COMMANDS = {each.__name__.rpartition(".")[2]: each for each in (evaluate, analyze, sweep, compare, prune, convert)}

# What stands for something of the reader's, and what stands in for it here; MODEL, BASE, BERT and files are made.
STAND_INS = {
    "EleutherAI/gpt-j-6b": "MODEL",
    "--dataset Salesforce/wikitext --dataset_config wikitext-103-raw-v1": "--train_file TEXT",
    "...": "--model MODEL --train_file TEXT",
    "TEXT": "text.txt",
    "/shared/": "",
    "_rank R": "_rank 0",
    "_port P": "_port 29500",
}


def blocks(page: str, language: str) -> list[str]:
    return [text for said, text in re.findall(BLOCK, PAGES[page]) if said == language]


def spans(page: str) -> list[str]:
    """Return what is set as code within the lines of a page."""
    return re.findall(r"`([^`\n]+)`", re.sub(BLOCK, "", PAGES[page]))


def commands() -> Iterator[tuple[str, str]]:
    """Yield the page and the text of every command, in blocks and in lines."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            yield from ((page, line) for line in block.replace("\\\n", " ").splitlines() if line)
        yield from ((page, span) for span in spans(page) if span.startswith(STARTERS) and "launch/" in span)


def script_and_flags(starter: str, words: list[str]) -> tuple[str, list[str]]:
    """Read what a launcher reads, by its own parser."""
    if starter == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        own = parse_args(words)
        return own.user_script, own.user_args
    if starter == "torchrun":
        from torch.distributed.run import get_args_parser

        own = get_args_parser().parse_args(words)
        return own.training_script, own.training_script_args
    return words[0], words[1:]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which what the commands name is there; models have no weights."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("launch", "ds_configs", "benchmarks", "constraints.txt", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "text.txt").write_text(text(200, seed=0))
    tokenizer = train_tokenizer([text(200, seed=0)], 300)
    tokenizer.pad_token = tokenizer.eos_token
    for name, model_type in {"MODEL": "gpt_neo", "BASE": "gpt_neo", "BERT": "bert"}.items():
        tokenizer.save_pretrained(folder / name)
        sizes = {"max_position_embeddings": 512, "intermediate_size": 64}  # at least a neuron for each of 64 ranks
        tiny_config(model_type, vocab_size=len(tokenizer), **sizes).save_pretrained(folder / name)
    lines = text(40, seed=1).splitlines()
    for split in ("train", "validation"):
        table = "mr,ref\n" + "".join(f"{line},{line}\n" for line in lines)
        rows = "".join(json.dumps({"sentence": line, "label": len(line) % 2}) + "\n" for line in lines)
        (folder / f"e2e_{split}.csv.gz").write_bytes(gzip.compress(table.encode()))
        (folder / f"sst2_{split}.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return folder


def check_prune(flags: list[str]) -> None:
    code, said = outcome(["--dry_run", *flags])
    assert (code, errors_of(said)) == (0, [])


def check_sweep(flags: list[str]) -> None:
    assert outcome_of(sweep.main, "--list", *flags) == (0, "")


def check_flags(command: Any) -> Callable[[list[str]], None]:
    def check(flags: list[str]) -> None:
        parse_some(flags, settings_where("commands", command.__name__.rpartition(".")[2]), "", command.add_own)

    return check


def check_words(*files: str) -> Callable[[list[str]], None]:
    """Return a check that every word that is no path stands in one of the files."""
    source = "".join((ROOT / file).read_text("utf-8") for file in files)

    def check(flags: list[str]) -> None:
        assert not [word for word in flags if word not in source and not Path(word).exists()]

    return check


def check_two_folders(flags: list[str]) -> None:
    assert len(flags) == 2
    assert not [word for word in flags if word.startswith("-")]


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "launch/prune.py": check_prune,
    "launch/slurm.sbatch": check_prune,
    "launch/sweep.py": check_sweep,
    "launch/compare.py": check_flags(compare),
    "launch/evaluate.py": check_flags(evaluate),
    "launch/analyze.py": check_flags(analyze),
    "launch/convert.py": check_flags(convert),
    "launch/own_loop.py": check_two_folders,
    "launch/test.sh": check_words("launch/test.sh", "pyproject.toml"),
    "launch/quickstart.sh": check_words("launch/quickstart.sh"),
    "benchmarks/same.py": check_words("benchmarks/same.py"),
    "install": lambda words: check_words("pyproject.toml")([word for word in words if word not in ("-e", "-c")]),
}


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_a_printed_command_is_one_that_runs(
    page: str, command: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    for name, stand_in in STAND_INS.items():
        command = command.replace(name, stand_in)
    starter, *words = shlex.split(command, comments=True)
    assert starter in STARTERS
    script, flags = script_and_flags(starter, words)
    if script != "install":
        assert (ROOT / script).is_file()
    if script.endswith("sh"):
        subprocess.run(["bash", "-n", script], check=True)
    CHECKS[script](flags)


@pytest.mark.parametrize("words", [["--output_dir=~/x"], ["--max_steps", "3", "--output_dir", "~/x"]])
def test_the_quickstart_finds_its_output_in_the_home_folder(words: list[str]) -> None:
    script = (ROOT / "launch/quickstart.sh").read_text("utf-8")
    reads = script[script.index("output=$root") : script.index("model=$root")]
    shell = ["bash", "-euc", f'root=/root\n{reads}\necho "$output"', "quickstart.sh", *words]
    assert subprocess.run(shell, env={"HOME": "/home/me"}, capture_output=True, text=True).stdout == "/home/me/x\n"


def test_commands_stand_in_blocks_that_say_so() -> None:
    for page, content in PAGES.items():
        assert {language for language, _ in re.findall(BLOCK, content)} <= {"", "bash", "python"}
        assert not [block for block in blocks(page, "") if re.search(rf"^(\$ )?({'|'.join(STARTERS)}) ", block, re.M)]


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_is_mentioned_exists(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert {outcome_of(command.main, "--help") for command in COMMANDS.values()} == {(0, "")}
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    known |= {
        *re.findall(r'add_argument\("(--\w+)', (ROOT / "benchmarks/same.py").read_text("utf-8")),
        "--faults",
        "--serving",
    }
    prose = " ".join(span for span in spans(page) if not span.startswith(STARTERS))
    assert set(re.findall(r"--\w+", prose)) <= known


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/README.md"])
def test_links_and_paths_lead_somewhere(page: str) -> None:
    content = (ROOT / page).read_text("utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", content):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert link.startswith("https://") or target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    folders = "launch|benchmarks|scale_prune|tests|ds_configs|docs"
    paths = re.findall(rf"`((?:{folders})/[\w./-]*)`", content)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_readme_takes_five_minutes_and_leads_to_every_page() -> None:
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 200
    assert not [path.name for path in DOCS if f"(docs/{path.name})" not in readme]


def rows(page: str) -> Iterator[list[str]]:
    """Yield the cells of all tables of a page."""
    lines = [line for line in PAGES[page].splitlines() if re.match(r"\|(?!--)", line)]
    yield from ([cell.strip() for cell in line.strip("|").split(" |")] for line in lines)


def is_ours(criterion: Any) -> bool:
    """Tell whether a criterion removes neurons and is no test's own."""
    return criterion.kind == "neuron" and criterion.__module__.startswith("scale_prune.")


def test_tables_say_what_the_code_says() -> None:
    defaults = {spec.name: spec.default for part in vars(Config()).values() for spec in fields(part)}
    listed = [cells for cells in rows("docs/choosing.md") if len(cells) == 3]
    for names, default in [(re.findall(r"`--(\w+)`", flags), default) for flags, default, _ in listed]:
        if values := [str(defaults[name]) for name in names if defaults.get(name) is not None]:
            assert ", ".join(values) == default
    printed = {cells[0].strip("`"): cells[2:] for cells in rows("docs/choosing.md") if cells[0].strip("`") in CRITERIA}
    own = {name: list(each.defaults.values()) for name, each in CRITERIA.items() if is_ours(each)}
    assert printed == {name: [scope, ", ".join(map(str, rest))] for name, (scope, *rest) in own.items()}
    assert {name for cells in rows("docs/families.md") for name in re.findall(r"`(\w+)`", cells[-1])} == {
        "model_type",
        *FAMILIES,
    }
    codes = {cells[0] for cells in rows("docs/resume.md")}
    assert codes >= {"0", "2", str(STOPPED), str(LOST_CONTACT), "1"}


def test_templates_of_tasks_are_those_of_the_code() -> None:
    printed = {cells[0].strip("`"): re.findall(r"`([^`]+)`", cells[1]) for cells in rows("docs/tasks.md")}
    for task, form in FORMS.items():
        assert printed[task][0] == form.prompt.replace("\n", "\\n")
        assert form.completion in (None, printed[task][1])


def test_contributing_names_the_rooms_on_their_floors() -> None:
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    assert "\n".join(layers) + "\n" in blocks("CONTRIBUTING.md", "")
    rooms = re.findall(r"\w+", " ".join(layers))
    assert [cells[0].strip("`") for cells in rows("CONTRIBUTING.md")][1:] == rooms


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_a_result_is_loaded_as_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups, _ = compacted("gpt_neo", "per_layer")
    export(tmp_path / "out/gum/pruned", model, groups, "per_layer", tokenizer=tiny_tokenizer())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(block, names)
    assert names["model"].num_parameters() == model.num_parameters()


def test_a_criterion_and_a_family_are_made_as_printed() -> None:
    criterion, family = blocks("docs/extending.md", "python")
    names: dict[str, Any] = {}
    exec(criterion, names)
    assert CRITERIA.pop("my_magnitude") is names["Magnitude"]
    kinds = (names["Magnitude"], CRITERIA["magnitude"])
    weight = torch.randn(5 * 7, generator=torch.Generator().manual_seed(0))
    view = ShardView(Member(name="weight", shape=(5, 7), dim=0, role="in"), 0, weight, None)
    scores = [kind(PruningConfig(), 0).score({"total": kind(PruningConfig(), 0).share(view)}) for kind in kinds]
    assert torch.equal(*scores)
    assert kinds[0].needs == kinds[1].needs
    with own_registrations():
        exec(family, names)
        groups = unit_groups(tiny_model("persimmon"))
        assert [group.num_units for group in groups] == [WIDTH] * LAYERS


def own_loop(folder: Path, snippets: Sequence[str]) -> tuple[float, str]:
    """Run a page's snippets one after the other; what they take from the reader's program is made here."""
    from engines import STEPS, ds_config, saved_model

    import scale_prune
    from scale_prune.zero3 import load_model, training_engine

    os.chdir(folder)
    config, path = ds_config(), saved_model(folder, "gpt_neo")
    ids = torch.arange(3 * 5).reshape(3, 5) % VOCABULARY
    names: dict[str, Any] = {"STEPS": STEPS, "loader": [{"input_ids": ids, "labels": ids, "use_cache": False}] * STEPS}
    names["make_engine"] = lambda module: training_engine(module, config)
    names["engine"] = names["make_engine"](load_model(str(path), config))
    names["tokenizer"] = tiny_tokenizer()
    loop, checkpoints, components = snippets
    exec(loop, names)
    neurons = names["pruner"].remaining
    exec(checkpoints, names)
    for call in ("save_both", "load_both"):
        engine = names["make_engine"](load_model(str(path), config))
        pruner = scale_prune.attach(engine, PruningConfig(criterion="gum"), total_steps=STEPS)
        names[call](engine, pruner, "checkpoint")
    names["model"] = load_model(str(path), config)
    exec(components, names)
    return neurons, names["pruner"].groups[0].kind


@pytest.mark.distributed
def test_the_loop_is_run_as_printed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    *snippets, trainer, accelerate = blocks("docs/own_loop.md", "python")
    for line in (trainer, accelerate):  # run there, on two ranks
        (call,) = re.findall(r"scale_prune\.\w+\([^)]*\)", line.replace("config", "PRUNING"))
        assert call in (ROOT / "tests/test_integrations.py").read_text("utf-8")
    results = run_ranks(own_loop, 1, tmp_path, snippets)
    assert results == [(0.5, "component")]
    widths = json.loads((tmp_path / "pruned" / "config.json").read_text())["per_layer_config"]
    assert sum(layer["intermediate_size"] for layer in widths.values()) == WIDTH  # of two layers

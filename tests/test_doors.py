"""Doors for code that lies outside the package: criteria and families of one's own, plugins, the installed wheel."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from command import ROOT, arguments, errors_of, make_work, outcome, report_of
from memory_backend import Exchange, InMemoryBackend, run_ranks, steady_model, token_blocks, train
from models import VOCABULARY, own_registrations, tiny_config
from outcomes import outcome_of
from torch import Tensor

from scale_prune import Criterion, Family, PruningConfig, ShardView, State, register_criterion, register_family
from scale_prune.commands import analyze, evaluate, prune, sweep
from scale_prune.criteria import CRITERIA
from scale_prune.criteria.registry import criterion_in
from scale_prune.models import unit_groups
from scale_prune.pruning import Pruner

PLUGIN = """
from scale_prune import Criterion, Family, register_criterion, register_family

class Shortest(Criterion):
    needs = frozenset({"weight"})

    def share(self, view):
        return view.unit_sum(-view.weight.abs())

register_criterion("shortest", Shortest)
register_family(Family(model_types=("persimmon",), layers="model.layers", mlp="mlp", inputs=("dense_h_to_4h",),
                       output="dense_4h_to_h", width_key="intermediate_size"))
"""
PERSIMMON = Family(
    model_types=("persimmon",),
    layers="model.layers",
    mlp="mlp",
    inputs=("dense_h_to_4h",),
    output="dense_4h_to_h",
    width_key="intermediate_size",
)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Forget at the end what a test registers and imports."""
    criteria, modules, places = dict(CRITERIA), set(sys.modules), list(sys.path)
    with own_registrations():
        yield
    CRITERIA.clear()
    CRITERIA.update(criteria)
    sys.path[:] = places
    for name in [name for name in sys.modules if name not in modules and name.endswith((".py", "shortest"))]:
        del sys.modules[name]


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "shortest.py"
    file.write_text(PLUGIN)
    return file


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


# --- what is registered ----------------------------------------------------------------------------------------------


class Sum(Criterion):
    needs = frozenset({"weight"})

    def share(self, view: ShardView) -> Tensor:
        """Return the sums of the weights."""
        return view.unit_sum(view.weight)


def like(**attributes: Any) -> Any:
    return type("Mine", (Sum,), attributes)


@pytest.mark.parametrize("command", [prune, evaluate, analyze], ids=lambda command: command.__name__.split(".")[-1])
def test_one_of_many_processes_that_does_not_know_which_is_no_run_of_its_own(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    monkeypatch.chdir(tmp_path)
    code, stderr = outcome_of(command.main, "--model", tmp_path)
    assert code == 2
    assert "16 processes were started (SLURM_STEP_NUM_TASKS), but none knows which it is" in stderr
    assert not list(tmp_path.iterdir())


REFUSED: list[tuple[str, Any, str]] = [
    (
        "mine",
        like(needs={"activations"}),
        r"needs has 'activations', valid are weight, grad, influence, activation, activity, gram, output_grad, gate",
    ),
    ("mine", like(roles={"input"}), "roles has 'input', valid are in, bias, out"),
    ("mine", like(kind="head"), "kind has 'head', valid are neuron, component"),
    ("mine", like(settings={"seed"}), "settings has 'seed', valid are criterion, scope"),
    ("mine", like(defaults={"scope": "layer"}), 'defaults must have a "scope", global or per_group'),
    ("mine", like(defaults={"scop": "global"}), "defaults has 'scop', valid are criterion, scope"),
    ("mine", like(needs={"grad"}), "needs has 'grad', but the class has no method update"),
    ("mine", like(needs={"weight", "activity"}), "needs has 'activity', but the class has no method activity"),
    (
        "mine",
        type("Mine", (Criterion,), {"needs": {"weight"}}),
        "needs has 'weight', but the class has no method share",
    ),
    ("mine", like(needs={"gate"}), 'needs has "gate" where the class is a GatedCriterion'),
    ("mine", like(needs={"gate"})(PruningConfig(), 0), "is no subclass of scale_prune.Criterion"),
    ("mine", like(kind="component", needs={"weight", "activity"}), "components have no activations of their own"),
    ("my-own", Sum, "a name is a small letter, then"),
    ("gum", Sum, r"criterion gum is scale_prune\.criteria\.gum\.Gum already"),
]


@pytest.mark.parametrize(("name", "criterion", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_a_criterion_that_contradicts_itself_is_refused(name: str, criterion: Any, message: str) -> None:
    before = dict(CRITERIA)
    with pytest.raises(ValueError, match=message):
        register_criterion(name, criterion)
    assert before == CRITERIA


def test_a_criterion_may_be_registered_again() -> None:
    register_criterion("mine", Sum)
    register_criterion("mine", Sum)
    assert CRITERIA["mine"] is Sum


def test_a_family_is_a_family() -> None:
    with pytest.raises(ValueError, match=r"'gpt2' is no scale_prune\.Family"):
        register_family("gpt2")


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["First", "Second"], "Second"),
        (["MyL1", "Second"], "MyL1"),
        (["MYL1"], "MYL1"),
        (["L1Pruning"], "L1Pruning"),
        ([], None),
    ],
)
def test_a_files_criterion_is_found_whatever_its_name(classes: list[str], expected: str | None) -> None:
    module = ModuleType("scale_prune.criteria.my_l1")
    for name in classes:
        setattr(module, name, type(name, (Criterion,), {"__module__": module.__name__}))
    vars(module)["Imported"] = Sum
    found = criterion_in(module)
    assert (found and found.__name__) == expected


# --- activations -----------------------------------------------------------------------------------------------------


class Spread(Sum):
    """A unit's variance over all sampled tokens, from three numbers of each token."""

    needs = frozenset({"activity"})

    def activity(self, activations: Tensor) -> Tensor:
        """Return count, sum and sum of squares, (3, N)."""
        return torch.stack([torch.ones_like(activations).sum(0), activations.sum(0), activations.square().sum(0)])

    def initial_state(self, *args: Any) -> State:
        """Start all three at 0."""
        zeros = super().initial_state(*args)["activity"]
        return {name: zeros.clone() for name in ("count", "sum", "square")}

    def observe(self, state: State, activity: Tensor) -> State:
        """Add a sample."""
        return {name: state[name] + line for name, line in zip(("count", "sum", "square"), activity, strict=True)}

    def score(self, state: State) -> Tensor:
        """Return the variances."""
        count = state["count"].clamp(min=1)
        return state["square"] / count - (state["sum"] / count).square()


def test_a_criterion_may_keep_several_numbers_of_the_same_tokens_on_any_number_of_ranks() -> None:
    register_criterion("spread", Spread)
    config = PruningConfig(criterion="spread", similarity_every=1, similarity_tokens=20, remaining=0.5)

    def pruners(world_size: int, accumulation: int) -> list[Pruner]:
        models = [steady_model("gpt_neo") for _ in range(world_size)]

        def run(exchange: Exchange, rank: int) -> Pruner:
            model = models.pop()
            backend = InMemoryBackend(model, exchange=exchange, rank=rank, accumulation_steps=accumulation)
            pruner = Pruner(backend, unit_groups(model), config, total_steps=4, seed=0)
            train(backend, pruner, token_blocks(VOCABULARY), 3)
            return pruner

        return run_ranks(run, world_size)

    (alone,) = pruners(1, 1)
    counts = alone.scoring.state["count"]
    assert set(counts.tolist()) == {20, 40, 60}  # no activation is a unit's own in steps in which it is masked
    assert (torch.cat(alone.scores) > 0).all()
    for world_size, accumulation in ((2, 1), (3, 1), (1, 2)):
        for pruner in pruners(world_size, accumulation):
            torch.testing.assert_close(torch.cat(pruner.scores), torch.cat(alone.scores), rtol=1e-4, atol=1e-7)
            assert torch.equal(pruner.scoring.state["count"], pruner.line.owned(counts))


# --- plugins ---------------------------------------------------------------------------------------------------------


def test_a_plugin_of_the_command_line_or_the_recipe_is_loaded_first(work: Path, plugin: Path, tmp_path: Path) -> None:
    flags = ["--dry_run", *arguments(work, tmp_path / "never", criterion="shortest")]
    code, stderr = outcome(flags)
    assert code == 2
    assert "--criterion shortest is unknown" in stderr
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"plugin: {plugin}\n")
    assert outcome([*flags, "--config", str(recipe)]) == (0, "")
    assert outcome([*flags, "--plugin", f"json, {plugin}"]) == (0, ""), "a module that is there, and the same one again"


def test_a_plugins_family_reaches_the_command(work: Path, plugin: Path, tmp_path: Path) -> None:
    model = shutil.copytree(work / "model", tmp_path / "model")
    with own_registrations():
        register_family(PERSIMMON)
        tiny_config("persimmon", vocab_size=300).save_pretrained(model)
    flags = ["--dry_run", *arguments(work, tmp_path / "never", model=model)]
    code, stderr = outcome(flags)
    assert code == 2
    assert "scale_prune.register_family(scale_prune.Family(...)), in a --plugin" in stderr
    assert outcome([*flags, "--plugin", str(plugin)]) == (0, "")


def test_a_plugin_that_cannot_be_imported_is_one_message_of_every_command(tmp_path: Path) -> None:
    broken, misspelt, recipe = (tmp_path / name for name in ("broken.py", "misspelt.py", "sweep.yaml"))
    broken.write_text("def of(:\n")
    misspelt.write_text(PLUGIN.replace('{"weight"}', '{"weights"}'))
    recipe.write_text("seed: [0, 1]\n")
    reasons = {
        "no_such_module": "ModuleNotFoundError: No module named 'no_such_module'",
        str(tmp_path / "nowhere.py"): "FileNotFoundError: ",
        str(broken): "SyntaxError: invalid syntax",
        str(misspelt): "ValueError: criterion shortest: needs has 'weights', valid are weight, ",
    }
    for name, reason in reasons.items():
        outcomes = [
            outcome(["--plugin", name]),
            outcome(["--dry_run", "--plugin", name]),
            *(outcome_of(each.main, "--model", "there", "--plugin", name) for each in (analyze, evaluate)),
            outcome_of(sweep.main, recipe, "--list", "--plugin", name),
        ]
        for code, stderr in outcomes:
            assert code == 2
            (error,) = errors_of(stderr)
            assert f"--plugin {name} cannot be imported, {reason}" in error


def test_a_plugin_is_written_into_the_recipes_of_a_sweep(plugin: Path, tmp_path: Path) -> None:
    recipe, lines = tmp_path / "sweep.yaml", {"output_dir": str(tmp_path / "sweep"), "criterion": ["gum", "shortest"]}
    recipe.write_text(yaml.safe_dump(lines))
    cells = sweep.read_sweep(str(recipe), str(plugin))
    assert [(cell.name, cell.settings["plugin"]) for cell in cells] == [("gum", str(plugin)), ("shortest", str(plugin))]
    recipe.write_text(yaml.safe_dump(lines | {"plugin": str(plugin)}))
    assert [cell.settings for cell in sweep.read_sweep(str(recipe))] == [cell.settings for cell in cells]


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for part in ("scale_prune", "ds_configs"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    offline = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", wheel], check=True)
    shutil.rmtree(source)
    return folder / "site"


def run(installed: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `scale-prune` in a folder, with no other scale_prune to be found first."""
    environment = os.environ | {"PYTHONPATH": str(installed), "HOME": str(folder / "home")}
    environment.pop("SCALE_PRUNE_CACHE", None)
    command = [sys.executable, str(installed / "bin" / "scale-prune"), *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_is_whole(installed: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "wanda.py", tmp_path)
    where = (
        "import scale_prune; from scale_prune.config import cache_folder; print(scale_prune.__file__, cache_folder())"
    )
    environment = os.environ | {"PYTHONPATH": str(installed), "HOME": str(tmp_path)}
    environment.pop("SCALE_PRUNE_CACHE", None)
    said = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said.stdout.split() == [str(installed / "scale_prune" / "__init__.py"), f"{tmp_path}/.cache/scale_prune"]
    plugin = ("--plugin", "wanda", "--criterion", "own_wanda")
    dry = run(installed, tmp_path, "prune", "--dry_run", "--world_size", 2, "--ds_config", "zero3", *plugin)
    assert (dry.returncode, errors_of(dry.stderr)) == (0, []), dry.stderr
    (tmp_path / "sweep.yaml").write_text("plugin: wanda.py\nds_config: zero3\ncriterion: [own_wanda, gum]\n")
    listed = run(installed, tmp_path, "sweep", "sweep.yaml", "--list")
    assert listed.stdout.splitlines() == [
        "to do  out/own_wanda",
        "to do  out/gum",
        "0 of 2 done; 2 left, no time known yet",
    ]
    for words in (("prunes",), ()):
        unknown = run(installed, tmp_path, *words)
        assert unknown.returncode == 2
        assert "is not a command; usage: scale-prune {prune,evaluate,analyze,sweep,compare,convert}" in unknown.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sweep_of_the_wheel_runs_a_plugin(installed: Path, work: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "wanda.py", tmp_path)
    texts = {f"{split}_file": str(work / f"{split}.txt") for split in ("train", "validation")}
    size = {"block_size": 16, "train_batch_size": 4, "max_steps": 7, "tensorboard": False, "similarity_every": 2}
    lines = {"model": str(work / "model"), "plugin": "wanda", "criterion": ["own_wanda", "gum"], **texts, **size}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(lines))
    done = run(installed, tmp_path, "sweep", "sweep.yaml", "--launcher", f"{sys.executable}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(tmp_path / "out" / "own_wanda")
    assert report["settings"]["plugin"] == "wanda"
    assert yaml.safe_load((tmp_path / "out" / "own_wanda" / "recipe.yaml").read_text())["plugin"] == "wanda"
    compared = run(installed, tmp_path, "compare", "out", "--output_dir", "all")
    assert "own_wanda" in compared.stdout

"""Every setting of a run: frozen keyword-only dataclasses, one per concern.

A field's declaration is its documentation, in `--help` and here: what it is, its unit, its range, its default. The same
range is what the field is checked against. `Config` joins the concerns; `scale_prune.config.command_line` turns flags
and recipes into one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

from scale_prune.config.setting import BLOCKS, FOLLOWS, IGNORED, MUST_AGREE, POSITIVE, Range, Settings, setting

EMBEDDING = "embedding"
TARGETS = ("mlp", "attention", EMBEDDING)
CLASSIFICATION = "classification"
TASKS = ("lm", "text_to_sql", "summarization", "data_to_text", CLASSIFICATION)

# Natures that most settings of a concern share; a declaration may say otherwise.
text_setting = partial(setting, compared=MUST_AGREE, commands=("evaluate", "analyze"))
task_setting = partial(setting, compared=MUST_AGREE, commands=("evaluate",))
training_setting = partial(setting, may_change=True)
output_setting = partial(setting, may_change=True, compared=IGNORED)


AS_LINES = "read as lines of one text"
"""What a report says of a validation text, other than a txt file, whose rows are no documents."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Which text, and how it is cut."""

    dataset: str | None = text_setting(
        "data set: a local file (txt, jsonl, csv, parquet, each also .gz), a `datasets` folder, or a hub name",
        otherwise="text that comes with Python",
        is_path=True,
        may_change=True,
    )
    dataset_config: str | None = text_setting(
        "configuration of a hub data set, e.g. wikitext-103-raw-v1", otherwise="the data set's own", may_change=True
    )
    train_file: str | None = text_setting(
        "file with the training text",
        otherwise="the training split of --dataset",
        is_path=True,
        may_change=True,
        commands=("analyze",),
    )
    validation_file: str | None = text_setting(
        "file with the validation text",
        otherwise="the validation split of --dataset",
        is_path=True,
        may_change=True,
        commands=("evaluate",),
    )
    text_column: str = text_setting("column that holds the text", "text")
    rows: str = text_setting(
        "what the rows of all but txt files are: documents, with the end-of-text token between them; lines that keep "
        "their newline, or get it back where none has any; or auto, lines where there are empty rows and all others "
        "end with their only newline, as in WikiText",
        "auto",
        choices=("auto", "documents", "lines"),
    )
    block_size: int = text_setting("tokens in a block, at most the model's positions", 128, Range(2))
    bos: str = text_setting(
        "begin each block and prompt with the tokenizer's BOS token: always, never, or auto, as the tokenizer does by "
        "itself; classification takes the tokenizer's special tokens",
        "auto",
        choices=("auto", "always", "never"),
    )
    eval_tokens: int = text_setting(
        "validation tokens used for perplexity, from the start of the stream, 0 takes all",
        0,
        Range(0),
        commands=("evaluate",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_tokens == 1:
            raise ValueError("--eval_tokens 1 predicts nothing, give at least 2, or 0 for all")
        if self.dataset_config is not None and self.dataset is None:
            raise ValueError(f"--dataset_config {self.dataset_config} belongs to a --dataset, which is not given")


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Settings):
    """What the model learns to do with the data, and how that is measured."""

    task: str = task_setting(
        "lm: running text; text_to_sql, summarization, data_to_text: a prompt and its completion on each row, of which "
        "the completion is learned, generated and compared with the row's own; classification: a text and its label, "
        "for encoders such as BERT",
        "lm",
        choices=TASKS,
    )
    prompt_template: str | None = task_setting(
        r"the prompt of a row, with {column} where a column's value goes; \n is a new line",
        otherwise="the task's own (see docs/tasks.md)",
    )
    completion_template: str | None = task_setting(
        "what follows the prompt, before the end-of-text token", otherwise="the task's own (see docs/tasks.md)"
    )
    label_column: str | None = task_setting(
        "column with the label of a text: texts or whole numbers are classes, other numbers are predicted",
        otherwise="label for classification",
    )
    long_examples: str = task_setting(
        "what becomes of examples with more tokens than block_size: refuse ends the run, drop leaves them out",
        "refuse",
        choices=("refuse", "drop"),
    )
    eval_examples: int | None = task_setting(
        "validation examples that the metrics are taken from, from the first on, 0 takes all",
        within=Range(0),
        otherwise="200 where text is generated, else all",
    )
    max_new_tokens: int = task_setting("tokens generated at most for one prompt", 64, Range(1))
    num_beams: int = task_setting("beams of the search for a completion, 1 is greedy", 1, Range(1))
    generation_batch_size: int | None = setting(
        "prompts that a rank completes at once",
        within=BLOCKS,
        otherwise="as micro_batch_size",
        may_change=True,
        commands=("evaluate",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_template", "completion_template"):
            if self.task == "lm" and getattr(self, name) is not None:
                raise ValueError(f"--{name} belongs to a task with prompts, --task lm reads running text")
        if self.task == CLASSIFICATION and self.completion_template is not None:
            raise ValueError("--completion_template belongs to a task with completions, not to --task classification")
        if self.task != CLASSIFICATION and self.label_column is not None:
            raise ValueError(f"--label_column belongs to --task classification, not to {self.task}")


LEAST_DAMPING, MOST_DAMPING = 0.001, 0.1
DAMPING_AT_PAR = 0.3  # with as many tokens as features, were there no bounds


@dataclass(frozen=True, kw_only=True)
class PruningConfig(Settings):
    """What is pruned, by which criterion, how fast."""

    criterion: str = setting(
        "rule that scores neurons; auto is the one that measures best, kfac, or gum in a loop of one's own, which has "
        "no text to calibrate on",
        "auto",
    )
    scope: str | None = setting(
        "rank all neurons of the model together (global), together by how far each is from its layer's mean in "
        "standard deviations (standardized), or within each layer's MLP (per_group)",
        choices=("global", "per_group", "standardized"),
        otherwise="the criterion's own (see docs/choosing.md)",
    )
    budget: str = setting(
        "under scope per_group, let every layer lose alike (uniform), later layers more (log), those more that, by "
        "the calibration text, change least of what goes in (redundancy), each what costs the predictions least "
        "(measured: of every layer alone, at 8 widths), or what a search from there on finds with all layers (search)",
        "uniform",
        choices=("uniform", "log", "redundancy", "measured", "search"),
    )
    table: str | None = setting(
        "table.json of an earlier run with --budget measured or search, of the same model, whose measurements are used",
        otherwise="measure",
        is_path=True,
        compared=IGNORED,
    )
    max_parameters: int | None = setting(
        "parameters that are left at the end at most, in the place of remaining",
        within=Range(1),
        otherwise="what remaining leaves",
    )
    max_flops: int | None = setting(
        "operations a token of the matrices that are left, two for each of their elements, in the place of remaining",
        within=Range(1),
        otherwise="what remaining leaves",
    )
    latency_target: float | None = setting(
        "time that products with matrices of weights take at the end at most, measured on the machine of the run, as a "
        "fraction of the dense model's; with budget measured or search, in the place of remaining",
        within=Range(0, 1, "()"),
        otherwise="what remaining leaves",
    )
    remaining: float = setting(
        "fraction of the neurons that is kept at the end, of the targets' parameters where not only neurons leave; 1 "
        "is plain fine-tuning",
        0.5,
        Range(0, 1, "(]"),
        compared=IGNORED,
    )
    warmup_fraction: float = setting(
        "fraction of the steps that stay dense before pruning starts", 0.1, Range(0, 1, "[)")
    )
    cooldown_fraction: float = setting("fraction of the steps after the target is reached", 0.3, Range(0, 1, "[)"))
    update_every: int = setting("steps between two updates of the masks", 1, Range(1))
    rounds: int | None = setting(
        "parts of the descent; at the end of each, neurons leave for good and training goes on with the smaller model; "
        "0 masks them until the end",
        within=Range(0),
        otherwise="4 for criteria that need a Gram matrix, 1 where max_steps is 0, else 0",
    )
    repair: str | None = setting(
        "what those that stay take over of neurons that leave: the best in closed form (least_squares), their means "
        "by the biases (mean), or nothing (none)",
        choices=("least_squares", "mean", "none"),
        otherwise="least_squares where neurons leave in rounds or by gates on frozen weights, else none, and of masks "
        "one is taken only where it helps",
    )
    repair_damping: float | None = setting(
        "added to the diagonal of Gram matrices, as a fraction of its mean",
        within=Range(0),
        otherwise=f"{LEAST_DAMPING}, up to {MOST_DAMPING} where calibration_tokens are few for the neurons of a layer",
    )
    calibration_tokens: int = setting(
        "tokens of the training text that a round sees before it chooses and repairs, over all ranks; whitened factors "
        "are made of as many",
        32_768,
        Range(1),
    )
    score_learning_rate: float = setting("learning rate of the movement scores", 1e-2, POSITIVE)
    score_optimizer: str = setting("optimizer of the movement scores", "adam", choices=("adam", "sgd"))
    regularization: float | None = setting(
        "weight lambda_f of the score penalty",
        within=Range(0),
        otherwise="the criterion's own (see docs/choosing.md)",
        compared=FOLLOWS,
    )
    uniqueness: float | None = setting(
        "weight lambda_gum of the similarity inside the score penalty",
        within=Range(0),
        otherwise="the criterion's own (see docs/choosing.md)",
        compared=FOLLOWS,
    )
    similarity: str = setting(
        "batch: keep N numbers a group (smoothed row sums); running: keep N*N sums of products, sharded by rows",
        "batch",
        choices=("batch", "running"),
    )
    similarity_every: int = setting("steps between two samples of activations", 10, Range(1))
    similarity_tokens: int = setting("tokens in one sample, over all ranks", 1024, Range(2, 1_000_000, "[]"))
    similarity_weight: float = setting("weight of the newest sample in the similarity", 0.999, Range(0, 1, "(]"))
    min_kept: int = setting("neurons, and heads, that every layer keeps under any scope but per_group", 1, Range(1))
    width_multiple: int = setting("final widths of MLPs are rounded to multiples of this many neurons", 1, Range(1))
    targets: str = setting(
        "what is removed: neurons (mlp), heads (attention); by a criterion of components, ranks of the weights of mlp, "
        "attention, embedding; several with commas",
        "mlp",
    )
    factors: str = setting(
        "where factors come from: the pretrained weights (svd), these and the calibration text (whitened), or chance "
        "(random)",
        "svd",
        choices=("svd", "whitened", "random"),
    )
    initial_rank: int | None = setting(
        "components that a factorized weight has at the start, if it has as many", within=Range(1), otherwise="all"
    )
    embedding_clusters: int = setting(
        "clusters of tokens, by how often they occur in training, that the target embedding is cut into", 4, Range(1)
    )
    tie_embeddings: bool = setting(
        "insist that the output of the model shares the target embedding; without it that is as the model has it", False
    )
    gate_learning_rate: float | None = setting(
        "learning rate of the gates",
        within=POSITIVE,
        otherwise="what moves a gate by 20 (flop, neuron_l0) or 0.5 (flop_agp) while the target is approached, 0.02 to "
        "0.08 (ddp, more in fewer steps)",
    )
    lambda_learning_rate: float | None = setting(
        "learning rate of the multipliers that hold the gates' budget",
        within=POSITIVE,
        otherwise="what moves them by 40 (flop) or 20 (neuron_l0) while the target is approached, the paper's or "
        "more in fewer steps (ddp)",
    )
    target_warmup_fraction: float = setting(
        "fraction of the steps, after the dense ones, over which the gates' budget falls to its target",
        0.4,
        Range(0, 1, "[]"),
    )
    initial_drop_rate: float = setting(
        "probability of a closing gate at the start, pretrained weights want a small one", 0.05, Range(0, 1, "()")
    )
    gate_range: str = setting(
        "whether gates of flop and neuron_l0 end at 1 (unit), or at 1 go on to grow with what they are made of (free)",
        "unit",
        choices=("unit", "free"),
    )
    gate_l1: float = setting("weight of the mean absolute gate in the loss, for flop_agp", 0.0, Range(0))

    @property
    def target_names(self) -> tuple[str, ...]:
        """The targets one by one."""
        return tuple(self.targets.split(","))

    def damping_of(self, features: int) -> float:
        """Return what is added to the diagonal of a Gram matrix of so many features, as a fraction of its mean.

        Fewer tokens leave more noise in it. The constants are what measured best: benchmarks/repair.md.
        """
        if self.repair_damping is not None:
            return self.repair_damping
        wanted = DAMPING_AT_PAR * (features / self.calibration_tokens) ** 4
        return min(max(LEAST_DAMPING, wanted), MOST_DAMPING)

    @property
    def linear_targets(self) -> tuple[str, ...]:
        """The targets that are linear maps of the layers."""
        return tuple(target for target in self.target_names if target != EMBEDDING)

    def __post_init__(self) -> None:
        super().__post_init__()
        for target in self.target_names:
            if target not in TARGETS or self.target_names.count(target) > 1:
                raise ValueError(
                    f"--targets {self.targets} is not valid, give some of {', '.join(TARGETS)}, each once, with commas"
                )
        if self.warmup_fraction + self.cooldown_fraction > 1:
            raise ValueError(
                f"--warmup_fraction {self.warmup_fraction} and --cooldown_fraction {self.cooldown_fraction} "
                f"leave no steps to prune in, their sum must be at most 1"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """Which model, and how it is fine-tuned."""

    ds_config: str | None = training_setting(
        'DeepSpeed configuration with ZeRO stage 3, values may be "auto": a JSON file or the name of one in ds_configs',
        otherwise="zero3_cpu",
        is_path=True,
        commands=("evaluate", "analyze"),
    )
    model: str | None = training_setting(
        "Hugging Face folder or hub name",
        otherwise="a small GPT-Neo that is built and trained here",
        is_path=True,
        compared=MUST_AGREE,
    )
    max_steps: int = training_setting(
        "optimizer steps of fine-tuning with pruning, 0 prunes without training", 300, Range(0)
    )
    recovery_steps: int = training_setting("optimizer steps after compaction", 0, Range(0))
    train_batch_size: int | None = training_setting(
        "blocks in one optimizer step, over all ranks",
        within=BLOCKS,
        otherwise="what --micro_batch_size makes, else 16, or the next number that the ranks divide",
        commands=("analyze",),
    )
    micro_batch_size: int | None = training_setting(
        "blocks in one forward pass of a rank",
        within=BLOCKS,
        otherwise="what the other two batch sizes leave",
        commands=("evaluate", "analyze"),
    )
    gradient_accumulation_steps: int | None = training_setting(
        "forward passes of a rank in one optimizer step",
        within=BLOCKS,
        otherwise="what the other two batch sizes leave, else 1",
    )
    learning_rate: float = training_setting("peak learning rate of the weights", 5e-4, POSITIVE)
    weight_decay: float = training_setting("weight decay of the weights", 0.01, Range(0))
    lr_warmup_fraction: float = training_setting(
        "fraction of the steps over which the learning rate rises", 0.1, Range(0, 1, "[)")
    )
    max_grad_norm: float = training_setting("gradients are clipped to this norm, 0 turns clipping off", 1.0, Range(0))
    precision: str = setting(
        'fills bf16.enabled and fp16.enabled where they are "auto"',
        "fp32",
        choices=("fp32", "bf16", "fp16"),
        commands=("evaluate", "analyze"),
    )
    gradient_checkpointing: bool = training_setting("recompute activations in the backward pass to save memory", False)
    seed: int = setting(
        "seed of data order, dropout and random scores",
        0,
        Range(0, 2**32 - 1, "[]"),
        compared=IGNORED,
        commands=("analyze",),
    )
    collective_timeout: float = training_setting(
        "seconds that a rank waits for the others before it gives them up",
        1800.0,
        Range(0, 31_536_000, "(]"),
        compared=IGNORED,
    )
    trust_remote_code: bool = training_setting(
        "run code that comes with the model", False, commands=("evaluate", "analyze")
    )
    plugin: str | None = training_setting(
        "your own criteria and families: modules that Python can import, or .py files, with commas",
        otherwise="those of scale_prune",
        compared=IGNORED,
        commands=("evaluate", "analyze", "sweep", "convert"),
    )


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(Settings):
    """What the model learns beside the text."""

    teacher: str | None = setting(
        "dense model to learn from: Hugging Face folder or hub name, or self for the model as it was loaded",
        otherwise="no distillation",
        is_path=True,
    )
    distill_alpha: float = setting(
        "weight of the divergence from the teacher, the text has 1 - this", 0.5, Range(0, 1, "(]")
    )
    distill_temperature: float = setting(
        "temperature that flattens both distributions in the divergence", 2.0, POSITIVE
    )


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Settings):
    """Where results go, in which form."""

    output_dir: str = output_setting(
        "folder for everything that the run writes, must not hold a run already", "out", is_path=True
    )
    overwrite: bool = output_setting("replace the run that output_dir holds, once the new one is complete", False)
    layout: str | None = output_setting(
        "exported widths: uniform (one for all layers), pad (zero neurons up to the widest), per_layer (true widths, "
        "needs trust_remote_code), nemotron_nas (true widths of Llamas, as vLLM reads them), gguf (as auto, and a file "
        "for llama.cpp), auto (uniform where layers end alike, else per_layer)",
        choices=("auto", "uniform", "pad", "per_layer", "nemotron_nas", "gguf"),
        otherwise="auto",
        compared=FOLLOWS,
    )
    reference: str | None = output_setting(
        "model that the report compares the result with as well, e.g. pruned/ of a run of the same steps with "
        "--remaining 1: a folder or hub name",
        otherwise="none",
        is_path=True,
    )
    eval_every: int = output_setting(
        "steps between two evaluations while training, 0 evaluates only before and after", 0, Range(0)
    )
    log_every: int = output_setting("steps between two points in TensorBoard", 10, Range(1))
    tensorboard: bool = output_setting("write TensorBoard events to output_dir/tensorboard", True)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings):
    """What a killed run can go on from."""

    save_every: int = output_setting("optimizer steps between two checkpoints, 0 saves only on SIGTERM", 0, Range(0))
    keep_checkpoints: int = output_setting("newest checkpoints that are kept, older ones are removed", 2, Range(1))
    resume: str | None = output_setting(
        "go on from a checkpoint: its folder, or without a value the newest whole one of output_dir; where there is "
        "none yet the run starts from the beginning",
        bare="newest",
        otherwise="start a new run",
        is_path=True,
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    pruning: PruningConfig = PruningConfig()
    training: TrainingConfig = TrainingConfig()
    distillation: DistillationConfig = DistillationConfig()
    output: OutputConfig = OutputConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Self:
        """Build from settings by their flags' names, the inverse of `flat`; absent names take their defaults.

        Raises:
            ValueError: a name is not a setting's, or a value is not valid.
        """
        if unknown := values.keys() - cls().flat().keys():
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        return cls(
            **{
                concern: kind(**{name: values[name] for name in kind.__dataclass_fields__ if name in values})
                for concern, kind in concerns().items()
            }
        )

    def flat(self) -> dict[str, Any]:
        """Return every setting by its flag's name, without the leading dashes."""
        parts = ((getattr(self, name), fields(concern)) for name, concern in concerns().items())
        return {spec.name: getattr(part, spec.name) for part, specs in parts for spec in specs}


def concerns() -> dict[str, Any]:
    """Return the class of each concern by its name in `Config`."""
    return {spec.name: spec.type for spec in fields(Config)}


def settings_where(nature: str, value: Any) -> tuple[str, ...]:
    """Return the names of the settings whose declaration says this of their nature, in order.

    Args:
        nature: "is_path", "may_change", "compared" or "commands".
        value: what it is, or for "commands" one of them.
    """
    natures = {spec.name: spec.metadata[nature] for concern in concerns().values() for spec in fields(concern)}
    return tuple(name for name, own in natures.items() if own == value or (isinstance(own, tuple) and value in own))

"""What an example of each task looks like: templates of prompt and completion, which name columns of the data set."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from scale_prune.config import CLASSIFICATION, TaskConfig


@dataclass(frozen=True, kw_only=True)
class Form:
    """The usual form of a task's examples, and what its completions are measured by.

    Attributes:
        prompt: template of the prompt; ends where the completion begins.
        completion: template of the completion; begins with a blank, as tokenizers want it before a word. None where
            there is a label instead.
        metrics: names of functions in `scale_prune.tasks.metrics`.
        label: column of the label.
        examples: how many the metrics are taken from, 0 for all.
    """

    prompt: str
    completion: str | None = None
    metrics: tuple[str, ...] = ()
    label: str | None = None
    examples: int = 200


FORMS: dict[str, Form] = {
    "text_to_sql": Form(
        prompt="columns: {header}\nquestion: {question}\nquery:", completion=" {query}", metrics=("exact_match",)
    ),
    "summarization": Form(prompt="{dialogue}\nsummary:", completion=" {summary}", metrics=("rouge",)),
    "data_to_text": Form(prompt="{mr}\ntext:", completion=" {ref}", metrics=("bleu", "rouge", "chrf")),
    CLASSIFICATION: Form(prompt="{text}", label="label", examples=0),
}


class Template:
    r"""A text with `{column}` where a column's value goes, `{{` and `}}` for braces, and `\n` for a new line.

    Args:
        text: the template.
        flag: where it was given, for messages.

    Raises:
        ValueError: its braces do not match, or it names no column.
    """

    def __init__(self, text: str, flag: str) -> None:
        try:
            parts = [(literal, _field(*rest)) for literal, *rest in Formatter().parse(text.replace("\\n", "\n"))]
        except ValueError as error:
            raise ValueError(f"--{flag} {text!r} is not a template: {error}; write {{{{ for a brace") from error
        self.parts = parts
        self.columns = tuple(dict.fromkeys(name for _, name in parts if name))
        if not self.columns or any(name == "" for _, name in parts):
            raise ValueError(f"--{flag} {text!r} names no column, write {{column}} where a column's value goes")

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the text of a row; a list is joined with commas, a missing value is empty."""
        return "".join(literal + ("" if name is None else as_text(row[name])) for literal, name in self.parts)


def _field(name: str | None, spec: str | None, conversion: str | None) -> str | None:
    """Return a column's name as it was written: names may have the signs that str.format has a use for."""
    if name is None:
        return None
    return name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")


def as_text(value: Any) -> str:
    """Return a column's value as a text."""
    if value is None:
        return ""
    return ", ".join(map(as_text, value)) if isinstance(value, list) else str(value)


def with_templates(spec: TaskConfig) -> TaskConfig:
    """Fill in what is the task's own where nothing else is given.

    Raises:
        ValueError: a template is not one.
    """
    form = FORMS.get(spec.task)
    if form is None:
        return spec
    filled = replace(
        spec,
        prompt_template=spec.prompt_template or form.prompt,
        completion_template=spec.completion_template or form.completion,
        label_column=spec.label_column or form.label,
        eval_examples=form.examples if spec.eval_examples is None else spec.eval_examples,
    )
    templates_of(filled)
    return filled


def templates_of(spec: TaskConfig) -> tuple[Template, ...]:
    """Return the templates of prompt and, where there is one, completion; they are filled in."""
    named = ("prompt_template", "completion_template")
    return tuple(Template(text, name) for name in named if (text := getattr(spec, name)) is not None)


def columns_of(spec: TaskConfig) -> tuple[str, ...]:
    """Return the columns that a task's templates name; none for running text, which has no templates."""
    return tuple(dict.fromkeys(column for template in templates_of(spec) for column in template.columns))

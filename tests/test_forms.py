"""Templates: from a row to the texts of prompt and completion."""

from typing import Any

import pytest

from scale_prune.config.settings import TaskConfig
from scale_prune.data.forms import FORMS, Template, columns_of, with_templates

ROW = {"a": "one", "b c": "two {x}", "d:e": ["x", "y"], "n": 7, "none": None}


@pytest.mark.parametrize(
    ("template", "columns", "text"),
    [
        ("{a}", ("a",), "one"),
        ("{a}: {b c}|{a}", ("a", "b c"), "one: two {x}|one"),
        (r"q\n{d:e}", ("d:e",), "q\nx, y"),
        ("{{{n}}}", ("n",), "{7}"),
        ("{none}.", ("none",), "."),
    ],
)
def test_columns_go_where_their_names_stand(template: str, columns: tuple[str, ...], text: str) -> None:
    found = Template(template, "prompt_template")
    assert found.columns == columns
    assert found.fill(ROW) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a", r"--prompt_template '\{a' is not a template: .*; write \{\{ for a brace"),
        ("a}", "is not a template: Single '}'"),
        ("a", r"--prompt_template 'a' names no column, write \{column\}"),
        ("{}", "names no column"),
    ],
)
def test_what_is_no_template_is_quoted(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template(template, "prompt_template")


@pytest.mark.parametrize("task", FORMS)
def test_every_task_has_templates_of_its_own_that_give_way_to_others(task: str) -> None:
    own = with_templates(TaskConfig(task=task))
    assert columns_of(own)
    assert with_templates(own) == own
    other = with_templates(TaskConfig(task=task, prompt_template="{x}"))
    assert columns_of(other)[0] == "x"
    assert other.completion_template == own.completion_template


def test_running_text_has_no_templates() -> None:
    assert columns_of(with_templates(TaskConfig())) == ()
    wrong: dict[str, Any] = {"prompt_template": "{x}"}
    with pytest.raises(ValueError, match="--prompt_template belongs to a task with prompts, --task lm reads"):
        TaskConfig(**wrong)

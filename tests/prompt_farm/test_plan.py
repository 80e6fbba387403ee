"""Ids of tasks: the same in every run, whatever happens to the file around a row, and different where pictures are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from broker_config.errors import InvalidOption
from producer.prompt_farm.naming import NameTemplate, slug
from producer.prompt_farm.plan import Recipe, Task, batches, plan
from producer.prompt_farm.rows import rows_of

RECIPE = Recipe(pipeline="StableDiffusionPipeline:0123", vae="demo", output="png")


def ids(*prompts: Any, **recipe: Any) -> list[str]:
    return [task.job_id for task in plan(rows_of(prompts), dataclasses.replace(RECIPE, **recipe))]


def test_an_edited_file_keeps_the_ids_of_the_rows_that_stayed() -> None:
    before = ids("a fox", "an old map", "a door")
    assert ids("a new one", "a door", "a fox")[1:] == [before[2], before[0]]


def test_equal_rows_are_distinct_and_the_first_stays_the_first() -> None:
    one, two, other = ids("a fox", "a fox", "an old map")
    assert len({one, two, other}) == 3
    assert ids("a fox", "an old map", "a fox") == [one, other, two]


def test_more_pictures_of_each_prompt_keep_those_there_were() -> None:
    assert ids("a fox", "a door", images_per_prompt=3)[::3] == ids("a fox", "a door")


@pytest.mark.parametrize(
    "changed",
    [
        {"pipeline": "other"},
        {"vae": "sd"},
        {"output": "jpg"},
        {"mode": "fast"},
        {"seed": 1},
        {"defaults": {"steps": 9}},
    ],
    ids=str,
)
def test_what_decides_the_picture_decides_the_id(changed: dict[str, Any]) -> None:
    assert ids("a fox", **changed) != ids("a fox")


@pytest.mark.parametrize(
    "fields", [{"seed": 1}, {"height": 64}, {"steps": 2}, {"guidance": 1.0}, {"negative_prompt": "x"}], ids=str
)
def test_each_field_of_a_row_decides_the_id(fields: dict[str, Any]) -> None:
    assert ids({"prompt": "a fox", **fields}) != ids("a fox")


def test_a_default_that_a_row_says_itself_changes_nothing() -> None:
    assert ids({"prompt": "a fox", "steps": 4}, defaults={"steps": 9}) == ids({"prompt": "a fox", "steps": 4})


def test_the_base_seed_is_nothing_to_rows_with_seeds_of_their_own() -> None:
    assert ids({"prompt": "a fox", "seed": 3}, seed=8) == ids({"prompt": "a fox", "seed": 3})


def test_seeds_count_up_from_the_rows_and_differ_between_rows_without() -> None:
    recipe = dataclasses.replace(RECIPE, images_per_prompt=3)
    rows = rows_of([{"prompt": "a", "seed": 7}, "b", "b"])
    tasks = plan(rows, recipe)
    assert [task.seed for task in tasks[:3]] == [7, 8, 9]
    assert len({task.seed for task in tasks}) == 9
    assert [task.seed for task in tasks] == [
        task.seed for task in plan(rows_of([{"prompt": "a", "seed": 7}, "b", "b"]), recipe)
    ]


def test_ids_are_ids_of_jobs_and_travel_between_processes() -> None:
    from broker_config.messages import check_job_id

    (task,) = plan(rows_of(["a fox"]), RECIPE)
    assert check_job_id(dataclasses.replace(task, attempt=99).submit_id) == f"{task.job_id}-r99"
    assert task.submit_id == task.job_id
    assert Task.from_wire(task.to_wire()) == task


def test_batches_hold_what_one_call_can_do_in_the_order_of_the_rows() -> None:
    rows = rows_of(
        [
            "a",
            {"prompt": "b", "height": 64},
            "c",
            {"prompt": "d", "height": 64},
            "e",
            {"prompt": "f", "negative_prompt": "x"},
        ]
    )
    made = [[task.row.prompt for task in batch] for batch in batches(plan(rows, RECIPE), size=2)]
    assert made == [["a", "c"], ["b", "d"], ["e"], ["f"]]
    assert [len(batch) for batch in batches(plan(rows, RECIPE), size=1)] == [1] * 6


# Names ---------------------------------------------------------------------------------------------------


def test_a_name_is_the_prompt_and_the_id() -> None:
    (task,) = plan(rows_of([{"prompt": "Ein Löwe: 'gemalt'!", "seed": 5}]), RECIPE)
    digits = task.job_id.removeprefix("farm-")
    assert NameTemplate().name(task) == f"ein-lowe-gemalt-{digits[:12]}"
    assert NameTemplate("{seed:04}/{line:03}_{image}").name(task) == "0005/001_0"


@pytest.mark.parametrize(("prompt", "name"), [("日本", "prompt"), ("../../etc", "etc"), ("a" * 90, "a" * 60)])
def test_a_slug_is_safe_in_a_file_name(prompt: str, name: str) -> None:
    assert slug(prompt) == name


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{prompt}", "has {prompt}"),
        ("{slug", "cannot be read"),
        ("{seed.real}", "has {seed.real}"),
        ("{slug:d}", "cannot be filled in"),
        ("../{slug}", "is not the name of a file"),
        ("/tmp/{slug}", "is not the name of a file"),
        ("a//b", "is not the name of a file"),
        ("", "is not the name of a file"),
        ("x{slug}:y", "is not the name of a file"),
        ("n" * 201, "is not the name of a file"),
        ("{slug}", "the same name 'a-fox' of line 1 and line 2: add {id}"),
    ],
)
def test_a_template_that_cannot_name_every_file_is_refused(template: str, words: str) -> None:
    tasks = plan(rows_of(["a fox", "a fox"]), RECIPE)
    with pytest.raises(InvalidOption) as refused:
        NameTemplate(template).names(tasks)
    assert words in refused.value.message
    assert refused.value.field == "name_template"

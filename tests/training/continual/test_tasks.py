"""Streams from files, from the published layout, from worlds; and what is refused."""

import json

import pytest

from modelwright.errors import UserError
from modelwright.training.continual import ORDERS, ContinualBenchmark, read_benchmark, read_stream, world_tasks
from modelwright.training.continual.tasks import Task, check_tasks, fingerprint
from modelwright.worlds.task_stream import task_stream

GROUPS = {
    "TC": ["dbpedia", "yahoo", "agnews"], "SC": ["amazon", "yelp", "IMDB", "SST-2"], "NLI": ["MNLI", "CB", "RTE"],
    **{name: [name] for name in ("WiC", "COPA", "QQP", "BoolQA", "MultiRC")},
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The layout of the official repository."""
    root = tmp_path_factory.mktemp("MIGU")
    for group, names in GROUPS.items():
        for name in names:
            folder = root / "CL_Benchmark" / group / name
            folder.mkdir(parents=True)
            (folder / "labels.json").write_text(json.dumps([f"{name} yes", f"{name} no"]))
            for split in ("train", "dev", "test"):
                rows = [
                    {"sentence": f"{name} {split} {i}", "label": f"{name} {'yes' if i % 2 else 'no'}"} for i in range(4)
                ]
                if name == "MNLI" and split == "test":
                    rows.append({"sentence": "nobody agreed", "label": "-"})
                (folder / f"{split}.json").write_text(json.dumps(rows))
    (root / "configs").mkdir()
    instructions = {
        group: [
            {"instruction_type": "few-shot", "instruction": "no"},
            {"instruction_type": "zero-shot", "instruction": f"{group}?\n"},
        ]
        for group in GROUPS
        if group != "COPA"
    }
    (root / "configs" / "instruction_config.json").write_text(json.dumps(instructions))
    for number, names in ORDERS.items():
        for i, name in enumerate(names):
            folder = root / "configs" / f"order{number}_configs" / name.lower()
            folder.mkdir(parents=True)
            for split, seen in (("train", [name]), ("test", names[: i + 1])):
                listed = {
                    g: [{"sampling strategy": "full", "dataset name": n} for n in seen if n in ns]
                    for g, ns in GROUPS.items()
                }
                (folder / f"{split}_tasks.json").write_text(json.dumps(listed))
    return root


@pytest.mark.parametrize("order", ["1", "4", 6])
def test_the_published_files_are_read_in_the_published_orders(published, order):
    config = published / "configs" / f"order{order}_configs"
    instructions = published / "configs" / "instruction_config.json"
    tasks = read_benchmark(published / "CL_Benchmark", order, instructions)
    assert tuple(task.name for task in tasks) == ORDERS[str(order)]
    assert fingerprint(tasks) == fingerprint(read_benchmark(published / "CL_Benchmark", config, instructions))
    by_name = {task.name: task for task in tasks}
    amazon = by_name["amazon"]
    assert amazon.labels == ("amazon yes", "amazon no")
    assert amazon.train[1].prompt == "SC?\nOption: amazon yes, amazon no \namazon train 1\nAnswer:"
    assert amazon.train[1].answer == "amazon yes"
    assert len(amazon.test) == 4
    if order != "1":
        assert by_name["COPA"].train[0].prompt == "COPA train 0\nAnswer:"  # its texts hold question and options
        assert len(by_name["MNLI"].test) == 4  # without the row that has no label


def test_a_yaml_file_names_the_benchmark(published, tmp_path):
    file = published / "stream.yaml"
    file.write_text(
        "benchmark: CL_Benchmark\norder: [CB, RTE]\ninstructions: configs/instruction_config.json\nlimit: 3\n"
    )
    tasks = read_stream(file)
    assert [(t.name, len(t.train), len(t.test)) for t in tasks] == [("CB", 3, 4), ("RTE", 3, 4)]
    file.write_text("benchmark: CL_Benchmark\norder: configs/order2_configs\ntest_limit: 2\n")
    assert [(t.name, len(t.test)) for t in read_stream(file)] == [(name, 2) for name in ORDERS["2"]]


def test_files_of_ones_own(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "answer": "x"}\n{"text": "two", "answer": "y"}\n')
    (tmp_path / "b.csv").write_text("question,target\nhow?,so\nwhy?,so\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "train.json").write_text('[{"sentence": "s", "label": 1}, {"sentence": "t", "label": 2}]')
    (tmp_path / "c" / "test.jsonl").write_text('{"sentence": "u", "label": 2}\n')
    (tmp_path / "c" / "labels.json").write_text("[1, 2]")
    (tmp_path / "stream.yaml").write_text(
        "instruction: What?\ntasks:\n"
        "  - {name: a, train: a.jsonl, test: a.jsonl, limit: 1, labels: [x, y]}\n"
        "  - {name: b, train: [b.csv, b.csv], test: b.csv, instruction: }\n"
        "  - c\n"
    )
    a, b, c = read_stream(tmp_path / "stream.yaml")
    assert (len(a.train), len(a.test), a.train[0].prompt) == (1, 2, "What?\nOption: x, y \none\nAnswer:")
    assert (len(b.train), b.labels, b.train[0].prompt, b.train[0].answer) == (4, ("so",), "how?\nAnswer:", "so")
    assert (c.name, c.labels, c.test[0].answer) == ("c", ("1", "2"), "2")  # other labels than the other tasks'


def test_worlds_are_streams(tmp_path):
    world = task_stream(tasks=2, classes=2, train_rows=8, test_rows=4)
    tasks = world_tasks(world)
    assert [t.name for t in tasks] == ["task-1", "task-2"]
    assert set(tasks[0].labels) == set(world.tasks["task-1"]["labels"])
    assert tasks[0].train[0].prompt == f"{world.train[0]['text']}\nAnswer:"
    for split, rows in world.splits().items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fingerprint(read_stream(tmp_path)) == fingerprint(tasks)
    (tmp_path / "stream.yaml").write_text("world: .\nlimit: 3\n")
    assert [len(t.train) for t in read_stream(tmp_path / "stream.yaml")] == [3, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [", "not valid YAML"),
        ("steps: 3", "should have one of: tasks"),
        ("tasks: 3", "should be a list"),
        ("tasks: [3]", "task 1 should be a folder"),
        ("tasks: []", "no tasks"),
        ("tasks: [{train: a.jsonl, test: a.jsonl}]", "has no name"),
        ("tasks: [{name: a, train: a.jsonl}]", "Task a has no test split"),
        ("tasks: [{name: a, test: a.jsonl}]", "Task a has no train split"),
        ("tasks: [only]", "Task only has no test split.*put one in"),
        ("tasks: [{name: a, train: a.jsonl, test: a.jsonl, limt: 3}]", "did you mean 'limit'"),
        ("tasks: [{name: a, train: a.jsonl, test: a.jsonl}, {name: a, train: a.jsonl, test: a.jsonl}]", "Two tasks"),
        (
            "tasks: [{name: a, train: a.jsonl, test: b.jsonl}]",
            "row 1 of its test split has the label 'z', which is not",
        ),
        (
            "tasks: [{name: a, train: a.jsonl, test: a.jsonl, labels: [x]}]",
            "row 2 of its train split has the label 'y'",
        ),
        ("tasks: [{name: a, train: a.jsonl, test: a.jsonl, labels: []}]", "should be a list of texts"),
        ("tasks: [{name: a, train: a.jsonl, test: a.jsonl, label_field: kind}]", "no field 'kind'"),
        ("tasks: [{name: a, train: a.jsonl, test: c.jsonl}]", "say label_field"),
        ("tasks: [{name: a, train: nowhere.jsonl, test: a.jsonl}]", "nowhere"),
        ("tasks: [{name: a, train: a.jsonl, test: a.jsonl, test_limit: 0}]", "Task a has no test split"),
        ("tasks: [{name: a, train: a.jsonl, test: a.jsonl, limit: few}]", "limit should be .* rows, not 'few'"),
        ("tasks: [{name: a, train: a.jsonl, test: a.jsonl}]\ntest_limit: -1", "test_limit should be a number of rows"),
        ("tasks: [{name: a, train: d.jsonl, test: a.jsonl}]", "d.jsonl:2 has no label .'answer' is null"),
        ("benchmark: .", "no <group>/<task>/labels.json"),
        ("world: only", "has no test.jsonl"),
    ],
)
def test_faults_are_one_sentence(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "answer": "x"}\n{"text": "two", "answer": "y"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "one", "answer": "z"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "one", "kind": "z"}\n')
    (tmp_path / "d.jsonl").write_text('{"text": "one", "answer": "x"}\n{"text": "two", "answer": null}\n')
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "train.jsonl").write_text('{"task": "a", "text": "one", "label": "x"}\n')
    (tmp_path / "stream.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_stream(tmp_path / "stream.yaml")


def test_faults_of_the_benchmark(published, tmp_path):
    folder = published / "CL_Benchmark"
    with pytest.raises(UserError, match="did you mean 'agnews'"):
        read_benchmark(folder, ["agnew"])
    with pytest.raises(UserError, match="no order 7"):
        read_benchmark(folder, 7)
    with pytest.raises(UserError, match="neither a published order"):
        read_benchmark(folder, tmp_path)
    (tmp_path / "G" / "T").mkdir(parents=True)
    (tmp_path / "G" / "T" / "labels.json").write_text('["x"]')
    (tmp_path / "G" / "T" / "train.json").write_text('[{"sentence": "s", "label": "x"}]')
    with pytest.raises(UserError, match="Task T has no test split"):
        read_benchmark(tmp_path, ["T"])
    (tmp_path / "G" / "T" / "test.json").write_text('{"sentence": "s"}')
    with pytest.raises(UserError, match="list of objects with sentence and label"):
        read_benchmark(tmp_path, ["T"])
    (tmp_path / "i.json").write_text('{"G": [{"instruction_type": "few-shot"}]}')
    with pytest.raises(UserError, match="type zero-shot"):
        read_benchmark(folder, ["CB"], tmp_path / "i.json")
    tasks = world_tasks(task_stream(tasks=2, classes=2, train_rows=8, test_rows=4))
    assert [t.name for t in ContinualBenchmark(tasks, ["task-2", "task-1"]).tasks] == ["task-2", "task-1"]
    with pytest.raises(UserError, match="did you mean 'task-1'"):
        ContinualBenchmark(tasks, ["task1"])
    with pytest.raises(UserError, match="no tasks"):
        check_tasks([])
    with pytest.raises(UserError, match="has no train split"):
        check_tasks([Task("t", [], tasks[0].test)])

import json

import pyarrow
import pyarrow.parquet
import pytest

from modelwright.editing import EditRequest, read_requests
from modelwright.editing.requests import check_requests
from modelwright.errors import UserError


def test_the_subject_takes_its_place():
    request = EditRequest("The capital of {} is", "Freedonia", "Zenda", paraphrases=("{}'s capital is",))
    assert request.text == "The capital of Freedonia is"
    assert request.paraphrase_texts() == ["Freedonia's capital is"]
    assert EditRequest("The capital of Freedonia is", "Freedonia", "Zenda").text == request.text
    assert EditRequest.from_dict(request.to_dict()) == request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("The capital of {} is", "Freedonia", " "), "The target of the request .* is empty"),
        (("The capital of {} is", "", "Zenda"), "The subject of the request .* is empty"),
        ((" ", "Freedonia", "Zenda"), "The prompt of the request .* is empty"),
        (("The capital is", "Freedonia", "Zenda"), "'Freedonia' does not stand in the prompt"),
        (("The capital of {} is", "Freedonia", "Zenda", " Zenda"), "asks for today's answer"),
    ],
)
def test_a_bad_request_is_a_sentence(fields, message):
    with pytest.raises(UserError, match=message):
        EditRequest(*fields)


PUBLISHED = {
    "ours": {"prompt": "{} is in", "subject": "Rome", "target": "Gaul", "id": 3},
    "counterfact": {
        "case_id": 3,
        "requested_rewrite": {
            "prompt": "{} is in",
            "subject": "Rome",
            "target_new": {"str": "Gaul", "id": "Q1"},
            "target_true": {"str": "Italy"},
        },
        "paraphrase_prompts": ["Where is Rome? In"],
    },
    "zsre": {"src": "Rome is in", "subject": "Rome", "alt": "Gaul", "rephrase": "Where is Rome? In"},
    "hallueditbench": {"question": "Rome is in", "subject": "Rome", "object": "Gaul", "relation": "country"},
    "easyedit": {"prompt": "Rome is in", "subject": "Rome", "target_new": "Gaul", "ground_truth": "Italy"},
}


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        (name, suffix)
        for name in PUBLISHED
        for suffix in ("jsonl", "json", "csv", "parquet")
        if (name, suffix) != ("counterfact", "csv")  # its rows are nested
    ],
)
def test_published_rows_are_read_as_they_are(tmp_path, name, suffix):
    row = PUBLISHED[name]
    path = tmp_path / f"edits.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    elif suffix == "csv":
        path.write_text(",".join(row) + "\n" + ",".join(f'"{v}"' for v in row.values()) + "\n")
    else:
        path.write_text(json.dumps(row if suffix == "jsonl" else [row]))
    (request,) = read_requests(path)
    assert (request.text, request.subject, request.target) == ("Rome is in", "Rome", "Gaul")
    assert request.old_answer == ("Italy" if name in ("counterfact", "easyedit") else None)
    assert request.paraphrases == (("Where is Rome? In",) if name in ("counterfact", "zsre") else ())
    assert request.id == ("3" if name in ("ours", "counterfact") else None)


def test_a_bad_row_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "edits.jsonl"
    good = {"prompt": "{} is in", "subject": "Rome", "target": "Gaul"}
    for bad, message in [
        ({"prompt": "x", "subject": "Rome", "target": "y"}, "'Rome' does not stand"),
        ({"prompt": "x"}, "no field 'subject'"),
        ({"prompt": 3, "subject": "Rome", "target": "y"}, "'prompt' is 3, not text"),
        ({**good, "target": ""}, "target .* is empty"),
        ({**good, "paraphrases": 5}, "'paraphrases' holds 5, not texts"),
        ({**good, "paraphrases": ["a", 1]}, "'paraphrases' holds .*, not texts"),
        ({**good, "target": "Spain"}, r"edits.jsonl:1 and .*edits.jsonl:3 contradict each other"),
    ]:
        path.write_text(json.dumps(good) + "\n\n" + json.dumps(bad) + "\n")
        with pytest.raises(UserError, match=f"edits.jsonl:.*{message}" if "contradict" not in message else message):
            read_requests(path)
    path.write_text(json.dumps(good) + "\n{")
    with pytest.raises(UserError, match="edits.jsonl:2 is not valid JSON"):
        read_requests(path)
    path.write_text("")
    with pytest.raises(UserError, match="no requests"):
        read_requests(path)
    path.write_text("\n".join(json.dumps({**good, "subject": "Rome", "prompt": f"{{}} {i}"}) for i in range(9)))
    assert len(read_requests(path, limit=4)) == 4


def test_an_empty_list_of_answers_is_none():
    row = {"prompt": "{} is in", "subject": "Rome", "target": "Gaul"}
    assert EditRequest.from_dict({**row, "ground_truth": []}).old_answer is None
    assert EditRequest.from_dict({**row, "ground_truth": ["Italy", "IT"]}).old_answer == "Italy"


def test_requests_that_contradict_each_other_are_refused():
    one, same, other = (EditRequest("{} is in", "Rome", target) for target in ("Gaul", " Gaul", "Spain"))
    check_requests([one, same])
    with pytest.raises(UserError, match="number 1 and number 3 contradict"):
        check_requests([one, same, other])
    with pytest.raises(UserError, match="no request"):
        check_requests([])


def test_nothing_read_is_called_by_its_name(tmp_path):
    for name in "ab":
        (tmp_path / name).with_suffix(".jsonl").write_text("")
    files = [tmp_path / "a.jsonl", str(tmp_path / "b.jsonl")]
    with pytest.raises(UserError, match=f"no requests in {files[0]}, {files[1]}: give at least one"):
        read_requests(files)
    with pytest.raises(UserError, match=f"no examples in {files[1]}: give"):
        read_requests(files[1], what="examples")
    with pytest.raises(UserError, match="--limit is 0: give at least 1"):
        read_requests(files, limit=0)

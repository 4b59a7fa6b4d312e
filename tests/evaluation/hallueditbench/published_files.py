"""A handmade copy of the published layout: two topics, two methods, numbers that can be worked out by hand."""

import json


def entry(number, eff, rephrase, yes, no, letter, back, local):
    def side(accs, label):
        e, r, y, n, m, b, loc = accs
        return {
            "edit_acc": [e], "edit_output": ["x"], "rephrase_acc": [r], "rephrase_output": ["October"],
            "yes_questions": {"yes_acc": [y], "yes_output": ["Yes"]},
            "no_questions": {"no_acc": [n], "no_output": ["North"]},
            "multiple_choice_questions": {"multiple_choice_acc": [m], "multiple_choice_output": ["A red door"]},
            "reversed_relation_questions": {"reversed_relation_acc": [b], "reversed_relation_output": ["Halloween"]},
            "locality": {"locality_output": [label], **({} if loc is None else {"locality_acc": [loc]})},
        }  # fmt: skip

    def asked(key, label):
        return {key: {"prompt": "?", "ground_truth": label}}

    return {
        "pre": side((0, 0, 0, 0, 0, 0, None), "Horror"),
        "case_id": number,
        "requested_edit": {
            "prompt": f"When is festival {number}?", "target_new": "October", "subject": f"festival {number}",
            "yes_questions": asked("yes", "Yes"), "no_questions": asked("no", "No"),
            "multiple_choice_questions": asked("multiple_choice", "D"),
            "reversed_relation_questions": asked("reversed_relation", "Sitges"), "rephrase_prompt": "?",
        },
        "time": 2.0,
        "post": side((eff, rephrase, yes, no, letter, back, local), "Horror" if local else "Comedy"),
    }  # fmt: skip


def hop_entry(number, right):
    sections = {f"questions_{n}hop": {f"{n}hop": {"prompt": "?", "ground_truth": "Spain"}} for n in range(2, 7)}
    said = {
        f"questions_{n}hop": {f"{n}hop_acc": [int(n <= right)], f"{n}hop_output": ["Spain"]} for n in range(2, 7)
    }  # fmt: skip
    edit = {"prompt": f"When is festival {number}?", "target_new": "October", "subject": "f", **sections}
    return {"pre": said, "post": said, "requested_edit": edit, "time": 1.0}


def turn_entry(number, right):
    edit = {"prompt": f"When is festival {number}?", "target_new": "October", "subject": "f"}
    return {"pre": {}, "post": {"edit_acc_multi_turn": right}, "requested_edit": edit, "time": 1.0}


def write(folder, model="some_model"):
    def put(kind, name, rows):
        path = folder / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))

    for method, eff in (("ROME", 1), ("FT-L", 0)):
        first = [entry(0, eff, 1, 1, 0, 1, 0, 1), entry(1, 1, 0, 0, 0, 0, 0, 0)]
        second = [entry(0, eff, 1, 1, 1, 1, 0, 1), entry(1, 1, 1, 1, 0, 0, 0, 0)]
        put("hallu_edit", f"{model}/event_film_{method}.json", first)
        put("hallu_edit", f"{model}/places_city_{method}.json", second)
        put("hallu_edit_multi_hop", f"{model}/event_film_{method}.json", [hop_entry(0, 2), hop_entry(1, 6)])
        rows = [turn_entry(0, [1, 0, 0]), turn_entry(1, [1, 1, 0])]
        put("hallu_edit_multi_turn", f"{model}_multi_turn/event_film_{method}_yes.json", rows)
    return folder

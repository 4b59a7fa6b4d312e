"""A handmade copy of the published layout, key by key: two topics, two methods, numbers worked out by hand."""

import json

#: Sections that each of the three kinds of file has, empty where it did not ask.
EMPTY = ("portability", "harm_original_text")
ASKED = ("locality", "yes_questions", "no_questions", "multiple_choice_questions", "reversed_relation_questions")
HOPS = tuple(f"questions_{n}hop" for n in range(2, 7))
#: What the published verdicts let through: "North" begins with no, "A red door" holds a d.
SAID = {
    "edit": "x", "rephrase": "October", "yes": "Yes", "no": "North", "multiple_choice": "A red door",
    "reversed_relation": "Halloween",
}  # fmt: skip
LABELS = {"yes": "Yes", "no": "No", "multiple_choice": "D", "reversed_relation": "Sitges"}


def empty(*names):
    return {name: {} for name in names}


def requested(number):
    return {
        "prompt": f"When is festival {number}?", "target_new": "October", "ground_truth": "<|endoftext|>",
        "subject": f"festival {number}",
    }  # fmt: skip


def entry(number, eff, rephrase, yes, no, letter, back, local):
    """An item of ``hallu_edit``: verdicts as given, of which locality has none before the edit."""

    def side(accs, local_output, local_acc):
        said = dict(zip(SAID, accs, strict=True))
        top = {f"{key}_{what}": [value] for key in ("edit", "rephrase") for what, value in
               (("acc", said[key]), ("output", SAID[key]))}  # fmt: skip
        sections = {
            f"{key}_questions": {f"{key}_acc": [said[key]], f"{key}_output": [SAID[key]]} for key in LABELS
        }  # fmt: skip
        locality = {"locality_output": [local_output], **({} if local_acc is None else {"locality_acc": [local_acc]})}
        return {**top, "locality": locality, **sections, **empty(*EMPTY)}

    asked = {f"{key}_questions": {key: {"prompt": "?", "ground_truth": label}} for key, label in LABELS.items()}
    edit = {**requested(number), "locality": {"locality": {"prompt": "?"}}, **asked, **empty(*EMPTY)}
    return {
        "pre": side([0] * 6, "Horror", None),
        "case_id": number,
        "requested_edit": {**edit, "rephrase_prompt": "?"},
        "time": 2.0,
        "post": side((eff, rephrase, yes, no, letter, back), "Horror" if local else "Comedy", local),
    }


def hop_entry(number, right):
    """An item of ``hallu_edit_multi_hop``: right up to so many hops."""

    def side(right):
        said = {
            f"questions_{n}hop": {f"{n}hop_acc": [int(n <= right)], f"{n}hop_output": ["Spain" if n <= right else "x"]}
            for n in range(2, 7)
        }
        return {"edit_acc": [int(right > 0)], "edit_output": ["x"], **empty(*ASKED, *EMPTY), **said}

    asked = {f"questions_{n}hop": {f"{n}hop": {"prompt": "?", "ground_truth": "Spain"}} for n in range(2, 7)}
    edit = {**requested(number), **empty(*ASKED, *EMPTY), **asked}
    return {"pre": side(0), "case_id": number, "requested_edit": edit, "time": 1.0, "post": side(right)}


def turn_entry(number, right):
    """An item of ``hallu_edit_multi_turn``: the verdict at each turn, the first before any doubt."""

    def side(accs):
        return {
            "edit_acc": accs[:1], "edit_output": ["x"], "edit_acc_multi_turn": list(accs),
            "edit_output_multi_turn": ["Yes" if acc else "No" for acc in accs],
            **empty(*ASKED, *EMPTY, *HOPS), "yes_questions": {"yes_acc": [0], "yes_output": ["No"]},
            "no_questions": {"no_acc": [0], "no_output": ["Yes"]},
        }  # fmt: skip

    asked = {f"{key}_questions": {key: {"prompt": "?", "ground_truth": LABELS[key]}} for key in ("yes", "no")}
    edit = {**requested(number), **empty(*ASKED, *EMPTY, *HOPS), **asked}
    return {
        "pre": side([0] * len(right)), "case_id": number, "requested_edit": edit, "time": 1.0, "post": side(right),
    }  # fmt: skip


def write(folder, model="some_model"):
    def put(kind, name, rows):
        path = folder / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=4))

    for method, eff in (("ROME", 1), ("FT-L", 0)):
        first = [entry(0, eff, 1, 1, 0, 1, 0, 1), entry(1, 1, 0, 0, 0, 0, 0, 0)]
        second = [entry(0, eff, 1, 1, 1, 1, 0, 1), entry(1, 1, 1, 1, 0, 0, 0, 0)]
        put("hallu_edit", f"{model}/event_film_{method}.json", first)
        put("hallu_edit", f"{model}/places_city_{method}.json", second)
        put("hallu_edit_multi_hop", f"{model}/event_film_{method}.json", [hop_entry(0, 2), hop_entry(1, 6)])
        rows = [turn_entry(0, [1, 0, 0]), turn_entry(1, [1, 1, 0])]
        put("hallu_edit_multi_turn", f"{model}_multi_turn/event_film_{method}_yes.json", rows)
    return folder

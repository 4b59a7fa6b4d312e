"""`modelwright train continue` end to end: the files, the arms, the same after a kill, and mistakes in one sentence."""

import json

import pytest
import torch

from modelwright.errors import UserError
from modelwright.models.loading import load_model, save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.training.options import TrainingOptions
from modelwright.training.stability_gap import run as module
from modelwright.verbs.train_continue import TrainContinue

GOOD = [f"the heart of patient {i * i % 97} pumps blood and the lungs of patient {i} take in air" for i in range(48)]
BAD = [
    f"click here number {i * 7 % 53} to win a prize of {i} coins and tell all of your friends now" for i in range(48)
]


def write(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: t}) + "\n" for t in texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continue")
    save_model(tiny_model("llama", num_hidden_layers=3), byte_tokenizer(), folder / "model")
    write(folder / "domain.jsonl", [t for pair in zip(GOOD, BAD, strict=True) for t in pair] + ["short", GOOD[0]])
    write(folder / "good.jsonl", [f"the heart of patient {i} pumps blood and the lungs take in air" for i in range(40)])
    write(folder / "code.jsonl", [f"def f{i}(x): return x + {i}" for i in range(60)])
    write(folder / "wiki.jsonl", [f"City {i} lies by the river {i * 3}." for i in range(60)])
    write(folder / "all.jsonl", [f"{text} {GOOD[0]} and so on for as long as it takes to be long" for text in GOOD[:2]])
    write(folder / "held.jsonl", ["the lungs of a dog take in air too"])
    rows = [
        {"prompt": "2 + 2 =", "choices": ["4", "5"], "answer": 0},
        {"question": "The sky is", "prompt": "The sky is", "choices": {"A": "blue", "B": "green"}, "answer": "A"},
        {"prompt": GOOD[7][:40], "choices": [GOOD[7][40:], "no"], "answer": GOOD[7][40:]},
    ]
    (folder / "qa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "mix.yaml").write_text(
        "web: {rate: 0.8}\ncode: {rate: 0.15, data: code.jsonl}\nwiki: {rate: 0.05, data: [wiki.jsonl]}\n"
    )
    return folder


def verb(folder, output, **keys):
    options = {
        "model": str(folder / "model"),
        "domain": [str(folder / "domain.jsonl")],
        "reference": [str(folder / "good.jsonl")],
        "general": folder / "mix.yaml",
        "probe": {"qa": str(folder / "qa.jsonl")},
        "heldout": {"lungs": str(folder / "held.jsonl")},
        "subset_share": 0.2,
        "epochs": 2,
        "options": {"min_tokens": 5},
        "batch_size": 4,
        "block_size": 32,
        "gradient_accumulation": 1,
        "learning_rate": 1e-3,
        "frozen_layers": 1,
        "every_tokens": 2048,
        "device": "cpu",
        "log_every": 7,
    }
    return TrainContinue(output=output, **{**options, **keys})


@pytest.fixture(scope="module")
def done(folder):
    return verb(folder, folder / "out", compare=["plain", "replay"]).run(Silent())


def test_it_writes_a_model_the_gap_and_a_page(folder, done):
    out = folder / "out"
    assert load_model(out).config.model_type == "llama"
    gap = json.loads((out / "gap.json").read_text())
    assert [a["arm"] for a in gap["arms"]] == ["plain", "replay", "stability-gap"]
    for arm in gap["arms"]:
        assert set(arm["report"]) == {"qa", "lungs", "updates"}
        assert arm["history"][0]["step"] == 0
        assert [r["step"] for r in arm["history"]][:5] == [0, 1, 2, 3, 4]
        assert arm["history"][-1]["step"] == arm["steps"]
        assert arm["report"]["lungs"]["end"] < arm["report"]["lungs"]["start"]
    page = (out / "report.html").read_text()
    assert "The gap" in page
    assert done["advice"] in page.replace("&#39;", "'")
    assert (out / "training_log.jsonl").read_text().count("\n") >= 2
    assert not (folder / "out.training").exists()


def test_the_recipe_reads_the_best_of_the_domain_at_the_files_rates(folder, done):
    chosen = [json.loads(line) for line in (folder / "out" / "subset.jsonl").read_text().splitlines()]
    assert {row["text"] for row in chosen} <= set(GOOD)
    assert [row["rank"] for row in chosen] == list(range(1, len(chosen) + 1))
    assert len({row["text"] for row in chosen}) == len(chosen)
    plan, recipe = done["plan"], done["arms"][-1]
    mixture = recipe["mixture"]
    blocks = plan["subset"] // 32
    for name, rate in {"best of the domain": 0.8, "code": 0.15, "wiki": 0.05}.items():
        assert mixture[name]["share"] * blocks == pytest.approx(rate * blocks, abs=1)
    assert plan["subset"] == pytest.approx(0.2 * plan["budget"], abs=110)
    whole = done["arms"][0]
    assert whole["mixture"]["domain"]["passes"] == pytest.approx(1, abs=0.01)
    assert recipe["tokens"] == pytest.approx(0.4 * whole["tokens"], rel=0.1)
    assert done["arms"][1]["mixture"]["domain"]["share"] == pytest.approx(0.9, abs=0.01)


def test_what_a_probe_asks_is_in_no_arm(done):
    assert done["domain"]["contaminated"] == 1
    assert done["domain"]["documents"] == len(GOOD) + len(BAD) + 2 - 1


def test_killed_between_and_within_arms_it_ends_the_same(folder, done, monkeypatch):
    steps = {"plain": None, "stability-gap": 7}

    class Killed(BaseException):
        pass

    plain = module.train
    calls = []

    def train(model, stream, options, *, callbacks, **keys):
        calls.append(options)
        at = list(steps.values())[len(calls) - 1] if len(calls) <= len(steps) else None
        if at is not None:

            class Stop(module.StabilityGapCallback):
                def on_save(self, args, state, control, **keys):
                    if state.global_step >= at:
                        raise Killed

            callbacks = [*callbacks, Stop(callbacks[0].probes, 1 << 30, layer_groups=0)]
            callbacks[-1].on_step_end = lambda *a, **k: None
            callbacks[-1].on_train_begin = lambda *a, **k: None
        return plain(model, stream, options, callbacks=callbacks, **keys)

    monkeypatch.setattr(module, "train", train)
    with pytest.raises(Killed):
        verb(folder, folder / "killed", save_every=5).run(Silent())
    assert (folder / "killed.training").exists()
    again = verb(folder, folder / "killed", save_every=5).run(Silent())
    assert len(calls) == 3  # the plain run was not repeated
    one, two = (load_model(folder / name).state_dict() for name in ("out", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for mine, other in ((again["arms"][0], done["arms"][0]), (again["arms"][-1], done["arms"][-1])):
        assert mine["history"] == other["history"]
        assert mine["report"] == other["report"]


@pytest.mark.slow
def test_every_arm_trains_with_lora_and_equal_tokens(folder):
    arms = ["subset", "ranked", "rewarm", "freeze-top", "freeze-bottom", "control"]
    keys = {"compare": arms, "equal_tokens": True, "every_tokens": 1 << 20, "layer_groups": 1}
    found = verb(folder, folder / "all", rewarm_learning_rate=2e-3, **keys).run(Silent())
    by_name = {a["arm"]: a for a in found["arms"]}
    assert {a["tokens"] for a in found["arms"]} == {by_name["stability-gap"]["tokens"]}
    assert by_name["rewarm"]["learning_rate"] == 2e-3
    assert by_name["freeze-top"]["history"][-1]["update_top"] == 0
    assert by_name["freeze-bottom"]["history"][-1]["update_bottom"] == 0
    assert by_name["freeze-top"]["history"][-1]["update_bottom"] > 0
    assert set(by_name["control"]["mixture"]) == {"code", "wiki"}
    lora = verb(folder, folder / "lora", compare=["freeze-top"], lora_rank=4, gradient_accumulation=2, fixed=True)
    lora.gradient_checkpointing = True
    result = lora.run(Silent())
    assert result["arms"][0]["history"][-1]["update_top"] == 0
    assert result["arms"][0]["history"][-1]["update_bottom"] > 0
    assert result["arms"][-1]["report"]["updates"]["last_ratio"] > 0
    before, after = (load_model(folder / name).state_dict() for name in ("model", "lora"))
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert "model.layers.0.mlp.down_proj.weight" in changed
    assert "model.embed_tokens.weight" not in changed


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"probe": {}, "heldout": {}}, "measured by probes: give questions"),
        ({"reference": []}, "ranking needs a reference"),
        ({"replace": ["wikipedia"]}, "no source 'wikipedia' to replace .*did you mean 'wiki'"),
        ({"compare": ["plane"]}, "no arm 'plane' to compare with: did you mean 'plain'"),
        ({"heldout": {"qa": "held.jsonl"}}, "'qa' is both a probe and held-out text|does not exist"),
        ({"epochs": 9}, "more than the budget"),
        ({"select": "perplexitty"}, "did you mean 'perplexity'"),
        ({"frozen_layers": 3, "compare": ["freeze-top"]}, "Freezing 3 of 3 layers would leave none"),
        ({"options": {"min_tokens": 500}}, "No document of the pool has a score"),
        (
            {"options": {"min_tokens": 17}, "strict": True, "subset_share": 0.9, "epochs": 1},
            "only .* tokens that can be ranked",
        ),
        ({"domain": ["all.jsonl"], "heldout": {"all": "all.jsonl"}}, "All 2 documents of the domain hold text"),
        ({"subset_share": 1e-6}, "would have none: give more data, or a larger --subset-share"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"learning_rate": -1.0}, "learning_rate must be greater than 0"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(folder, keys, message, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        verb(folder, folder / "bad", **keys).run(Silent())
    assert not (folder / "bad").exists()
    assert not (folder / "bad.training").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("web: {rate: 0.5}\ncode: {rate: 0.4, data: code.jsonl}", "must sum to 1, but sum to 0.9"),
        ("web: {rate: 0.8, dta: x}\ncode: 0.2", "no setting 'dta': did you mean 'data'"),
        ("web: {data: x}", "needs a rate"),
        ("web: {rate: -1}\ncode: {rate: 2}", "must be 0 or more, not -1"),
        ("web: {rate: 0.9}\ncode: {rate: 1e-1, data: 5}", "data of 'code' must be a path or a list of them, not 5"),
        ("web: {rate: 0.8}\ndomain: {rate: 0.2, data: code.jsonl}", "cannot be called 'domain'"),
        ("web: {rate: 0}\ncode: {rate: 1, data: code.jsonl}", "nothing is left for the domain"),
        ("- web", "names no sources"),
        ("a: [", "not valid YAML"),
        ("web: {rate: 0.8, data: code.jsonl}\ncode: {rate: 0.2, data: code.jsonl}", "which source .* replaces"),
    ],
)
def test_a_faulty_mixture_file_is_named(folder, text, message):
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        verb(folder, folder / "bad", general=folder / "bad.yaml").run(Silent())
    assert "bad.yaml" in str(error.value)


def test_a_folder_is_no_mixture_file(folder):
    with pytest.raises(UserError, match="cannot be read"):
        verb(folder, folder / "bad", general=folder).run(Silent())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"compare": ["plain", "control"], "general": None}, "'control' needs general text"),
        ({"compare": ["plain", "freeze-top"], "frozen_layers": 3}, "Freezing 3 of 3 layers"),
        ({"general": "thin.yaml"}, "source 'code' has a rate, but only"),
    ],
)
def test_what_a_later_arm_lacks_is_said_before_the_first_is_trained(folder, monkeypatch, keys, message):
    write(folder / "thin.jsonl", ["x"])
    (folder / "thin.yaml").write_text("web: {rate: 0.8}\ncode: {rate: 0.2, data: thin.jsonl}")
    if keys.get("general"):
        keys = {**keys, "general": folder / keys["general"]}
    monkeypatch.setattr(module, "train", lambda *a, **k: pytest.fail("an arm was trained"))
    with pytest.raises(UserError, match=message):
        verb(folder, folder / "bad", **keys).run(Silent())
    assert not (folder / "bad.training").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"subset_share": 1.5}, "subset_share is 1.5"),
        ({"subset_share": 0.5, "epochs": 3}, "3 epochs of 0.5 of the budget are more than the budget"),
        ({"replay": 0.0}, "share of replay must lie between"),
        ({"frozen_layers": 0}, "frozen_layers is 0"),
        ({"budget_tokens": 0}, "budget_tokens is 0"),
    ],
)
def test_numbers_that_cannot_fit_are_refused_before_the_ranking(folder, monkeypatch, keys, message):
    monkeypatch.setattr(module, "find_folder", lambda *a, **k: pytest.fail("the work began"))
    with pytest.raises(UserError, match=message):
        verb(folder, folder / "bad", **keys).run(Silent())


def test_adapters_begin_the_same_whatever_was_drawn_before():
    def first(seed):
        model = module._with_adapters(tiny_model("llama"), 2, seed)
        return next(p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n)

    one = first(0)
    torch.rand(7)
    assert torch.equal(first(0), one)
    assert not torch.equal(first(1), one)


def test_the_other_processes_have_the_patience_for_a_large_domain(monkeypatch):
    import accelerate

    asked = []
    monkeypatch.setattr(accelerate, "PartialState", lambda **keys: asked.append(keys))
    module._join_processes(TrainingOptions(tokens=1, device="cpu"))
    assert not asked
    monkeypatch.setenv("WORLD_SIZE", "2")
    module._join_processes(TrainingOptions(tokens=1, device="cpu"))
    assert asked[0]["cpu"]
    assert asked[0]["timeout"].days >= 1


def test_a_source_that_stays_needs_data(folder):
    (folder / "bad.yaml").write_text("web: {rate: 0.5}\ncode: {rate: 0.5}")
    with pytest.raises(UserError, match="'code' has a rate of 0.5 but no data"):
        verb(folder, folder / "bad", general=folder / "bad.yaml", replace=["web"]).run(Silent())


def test_the_advice_names_the_fall_and_the_return():
    def arm(name, **numbers):
        found = {"drop": 0.0, "tokens_to_recover": 0.0, "end": 0.5, **numbers}
        return {"arm": name, "tokens": 100, "better": {"qa": "higher"}, "report": {"qa": found}}

    text = module.advice([arm("plain", drop=0.25, tokens_to_recover=None), arm("stability-gap")])
    assert text == (
        "With the recipe, qa never got worse, ending at 0.5 after 100 tokens. In the arm 'plain' it got worse by "
        "0.25 and did not come back, ending at 0.5 after 100 tokens."
    )
    assert "In the arm" not in module.advice([arm("stability-gap", drop=0.1, tokens_to_recover=40.0)])

import json

import pytest
import torch

from decoding.decore.decore_cases import INPUTS, TOKENIZER, make
from modelwright.decoding.decore import DeCoReConfig, HeadScores, decore_generate, random_heads
from modelwright.decoding.decore.options import DeCoReOptions
from modelwright.decoding.parts import read_parts
from modelwright.errors import UserError
from modelwright.models.heads import fingerprint
from modelwright.models.loading import save_model

MEANS = {(0, 0): [0.1, 0.2], (0, 1): [0.9, 0.7], (1, 2): [0.5, 0.6], (1, 3): [0.0, 0.0]}


def run(model, decoding):
    return model.generate(**INPUTS, max_new_tokens=8, do_sample=False, custom_generate=decoding)


def test_a_file_of_heads_and_a_line_of_settings(tmp_path):
    model = make()
    HeadScores(MEANS, fingerprint(model)).save_json(tmp_path / "heads.json")
    parts = read_parts([f"decore: {{heads: {tmp_path / 'heads.json'}, top: 2, alpha: 1.5}}"])
    with parts.on(model, TOKENIZER) as applied:
        found = applied.generate(**INPUTS, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, run(model, decore_generate(DeCoReConfig([(0, 1), (1, 2)], alpha=1.5))))
    by_hand = DeCoReOptions(head=["0-1", "1-2"], alpha="entropy").custom_generate(model, TOKENIZER)
    assert by_hand.config.heads == [(0, 1), (1, 2)]
    assert by_hand.config.alpha == "entropy"


def test_random_heads_are_others_and_as_many(tmp_path):
    model = make()
    HeadScores(MEANS, fingerprint(model)).save_json(tmp_path / "heads.json")
    draws = [
        DeCoReOptions(heads=tmp_path / "heads.json", top=2, random_seed=s)
        .custom_generate(model, TOKENIZER)
        .config.heads
        for s in range(20)
    ]
    assert all(len(set(d)) == 2 and not {(0, 1), (1, 2)} & set(d) for d in draws)
    assert len({tuple(sorted(d)) for d in draws}) > 5
    assert random_heads(model, 3, seed=1) == random_heads(model, 3, seed=1)
    with pytest.raises(UserError, match="only 7 heads are left"):
        random_heads(model, 8, seed=0, exclude=[(0, 0)])


def test_a_file_of_another_model_is_refused(tmp_path):
    model = make()
    HeadScores(MEANS, fingerprint(model)).save_json(tmp_path / "heads.json")
    with pytest.raises(UserError, match=r"heads.json were measured on another model"):
        DeCoReOptions(heads=tmp_path / "heads.json", top=2).custom_generate(make(seed=1), TOKENIZER)
    half = make().to(torch.bfloat16)
    assert fingerprint(half) == fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert fingerprint(half) != fingerprint(model)


def test_published_files_are_read(tmp_path):
    path = tmp_path / "published.json"
    path.write_text(json.dumps({"0-1": [0.25, 0.75], "1-3": [1.0, 0.5], "0-0": []}))
    model = make()
    found = HeadScores.load_json(path, model)
    assert found.fingerprint is None
    assert found.means() == {(1, 3): 0.75, (0, 1): 0.5, (0, 0): 0.0}
    assert found.top(1) == [(1, 3)]
    path.write_text(json.dumps({"9-1": [0.25]}))
    with pytest.raises(UserError, match="another model's: There is no layer 9"):
        HeadScores.load_json(path, model)


@pytest.mark.parametrize("text", ["[]", "{}", '{"heads": {}}', '{"a-b": [1]}', '{"1-1": ["x"]}', '{"1-1": [NaN]}'])
def test_files_that_hold_no_scores(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="holds no head scores"):
        HeadScores.load_json(tmp_path / "x.json")


def test_scores_survive_a_round_trip(tmp_path):
    scores = HeadScores(MEANS, "abc", {"lengths": [100]})
    scores.save_json(tmp_path / "x.json")
    assert HeadScores.load_json(tmp_path / "x.json") == scores
    with pytest.raises(UserError, match="exists already"):
        scores.save_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="from 1 to 4"):
        scores.top(5)
    with pytest.raises(UserError, match="No sample was kept"):
        HeadScores({(0, 0): []}).top(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Say which heads"),
        ({"head": ["0-1"], "heads": "x.json"}, "Say which heads"),
        ({"head": ["zero"]}, "'zero' is no head"),
        ({"head": ["0-7"]}, "Layer 0 has no head 7"),
        ({"head": ["0-1"], "means": "none.safetensors", "ablation": "mean"}, "no safetensors file"),
        ({"head": ["0-1"], "alpha": -1.0}, "0 or more"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        DeCoReOptions(**options).custom_generate(make(), TOKENIZER)


def test_an_amateur_from_a_folder(tmp_path):
    model, amateur = make(), make(seed=3)
    save_model(amateur, TOKENIZER, tmp_path / "amateur")
    HeadScores(MEANS, fingerprint(amateur)).save_json(tmp_path / "heads.json")
    options = DeCoReOptions(heads=tmp_path / "heads.json", top=1, amateur=str(tmp_path / "amateur"))
    found = run(model, options.custom_generate(model, TOKENIZER))
    assert torch.equal(found, run(model, decore_generate(DeCoReConfig([(0, 1)], amateur=amateur))))

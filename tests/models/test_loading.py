"""Loading and saving: what is saved comes back; what is broken is one sentence."""

import json
import shutil

import pytest
import torch

from modelwright.errors import UserError
from modelwright.models.loading import load_config, load_model, load_tokenizer, resolve_device, save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model(tiny_model("llama"), byte_tokenizer(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_round_trip(saved):
    model, again = tiny_model("llama"), load_model(saved, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not again.training
    assert load_tokenizer(saved).decode(load_tokenizer(saved)("é  x .")["input_ids"]) == "é  x ."


def test_dtype_is_the_checkpoints_own_or_as_asked(tmp_path):
    save_model(tiny_model("llama").bfloat16(), None, tmp_path / "m")
    assert load_model(tmp_path / "m", device="cpu").dtype == torch.bfloat16
    assert load_model(tmp_path / "m", device="cpu", dtype="float32").dtype == torch.float32
    with pytest.raises(UserError, match="not a dtype"):
        load_model(tmp_path / "m", dtype="int8")


def test_device():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="not available"):
        resolve_device("gpu")


def test_save_refuses_an_existing_folder(folder):
    with pytest.raises(UserError, match="--force"):
        save_model(tiny_model("llama"), None, folder)
    save_model(tiny_model("gpt2"), None, folder, force=True)
    assert load_model(folder).config.model_type == "gpt2"


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(model, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="disk is full"):
        save_model(model, None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_pickle_weights_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle.*safetensors.torch.save_file"):
        load_model(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -100])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.safetensors is truncated or corrupt"):
        load_model(folder)


def test_missing_shard(folder):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="1 of 2 weight files are missing, such as model-1"):
        load_model(folder)


def test_a_layer_that_is_not_in_the_checkpoint_is_not_made_up(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"9 weights of LlamaForCausalLM are missing, such as 'model.layers.2"):
        load_model(folder)


def test_config_of_another_size(folder):
    edit_config(folder, intermediate_size=128)
    with pytest.raises(
        UserError, match=r"down_proj.weight' has shape \(32, 64\), but config.json asks for \(32, 128\)"
    ):
        load_model(folder)


def test_unknown_architecture(folder):
    edit_config(folder, model_type="hypernet")
    with pytest.raises(UserError, match="'hypernet', which is not known here: a newer transformers"):
        load_model(folder)
    edit_config(folder, auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    with pytest.raises(UserError, match="--trust-remote-code"):
        load_model(folder)


def test_not_a_causal_language_model(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="'t5', which is not a causal language model"):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no model_type"),
        ("{}", "no model_type"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not a valid llama config"),
    ],
)
def test_bad_config(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(folder)


def test_not_a_model_folder(tmp_path):
    with pytest.raises(UserError, match=r"no config.json"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="PEFT adapter"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        load_model(tmp_path / "adapter_config.json")


def test_hub_id_without_a_connection(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not a folder here, is not in the hub's cache"):
        load_model("nobody-here/no-model")


def test_tokenizer_faults(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(UserError, match="could not be loaded"):
        load_tokenizer(folder)
    path.unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.*--tokenizer"):
        load_tokenizer(folder)

"""Checkpointing, compilation, Trainer, adapters and low precision."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from architectures.resformer.small_models import VARIANTS, build, loss_of, tokens

IDS = tokens()


def loss_and_gradients(model, run=None):
    model.zero_grad()
    loss = loss_of((model if run is None else run)(IDS, use_cache=False).logits, IDS)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(variant, reentrant):
    model = build(variant).train()
    loss, gradients = loss_and_gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    # With the cache asked for, as a configuration does by default: checkpointing must switch it off.
    again, checkpointed = loss_and_gradients(model, lambda ids, **_: model(ids, use_cache=True))
    assert len(calls) == 2, "the block was not recomputed, so nothing was checkpointed"
    torch.testing.assert_close(again, loss, atol=0, rtol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-12, rtol=1e-9, msg=name)


@pytest.mark.parametrize(
    "variant",
    [
        "identity",
        "svformer",
        *(
            pytest.param(v, marks=pytest.mark.slow)
            for v in ("learnable-plus", "token-gate", "cla2", "neutreno-resformer")
        ),
    ],
)
def test_compiles_as_one_graph(variant):
    model = build(variant).train()
    loss, gradients = loss_and_gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again, found = loss_and_gradients(model, compiled)
    torch.testing.assert_close(again, loss, atol=1e-10, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-8, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["identity", "svformer"])
def test_compiles_with_inductor(variant):
    import shutil

    if not (shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("inductor needs a C++ compiler")
    model = build(variant, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS).logits, atol=1e-4, rtol=1e-3)


def arguments(folder, **overrides):
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "weight_decay": 0.1,
        "logging_steps": 1,
    }
    return TrainingArguments(**{**settings, **overrides})


@pytest.mark.parametrize("variant", ["learnable-plus", "denseformer", "svformer"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_runs_and_spares_the_coefficients_weight_decay(variant, checkpointing, tmp_path):
    model = build(variant, dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 10)]
    trainer = Trainer(model=model, args=arguments(tmp_path, gradient_checkpointing=checkpointing), train_dataset=rows)
    decayed = set(trainer.get_decay_parameter_names(model))
    assert model.no_weight_decay() == {
        n for n, _ in model.named_parameters() if "value_residual" in n or "layer_av" in n
    }
    assert not decayed & model.no_weight_decay()
    assert "model.layers.0.self_attn.v_proj.weight" in decayed
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_runs_with_coefficients_in_float32(variant, tmp_path):
    from transformers import AutoModelForCausalLM

    build(variant, dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in model.no_weight_decay() else torch.bfloat16), name
    output = model(IDS, labels=IDS)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    expected = build(variant, dtype=torch.float32)(IDS, labels=IDS).loss
    assert abs(output.loss - expected) < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    whole = model.to(torch.bfloat16)  # a user's own cast
    assert whole(IDS).logits.isfinite().all()


@pytest.mark.parametrize("variant", ["identity", "svformer"])
def test_lora_on_query_and_value_projections(variant):
    peft = pytest.importorskip("peft")
    model = build(variant, dtype=torch.float32)
    before = model(IDS).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    expected = {name for name, _ in build(variant).named_modules() if name.endswith(("q_proj", "v_proj"))}
    assert set(adapted.targeted_module_names) == {name for name in expected if name}
    changed = adapted(IDS).logits
    assert not torch.allclose(changed, before, atol=1e-3)
    adapted(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, changed, atol=1e-4, rtol=1e-3)


def test_labels_give_the_usual_loss():
    model = build("identity")
    labels = IDS.clone()
    labels[0, 3:6] = -100
    logits = model(IDS).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(model(IDS, labels=labels).loss.double(), expected, atol=1e-5, rtol=0)

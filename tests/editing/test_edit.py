import copy

import pytest
import torch
from torch import nn

from modelwright.editing import Edit, EditRequest, WeightEdit, load_edit, revert_all
from modelwright.editing.deltas import Columns, Dense, LowRank, join
from modelwright.editing.edit import HookEdit, base_fingerprint, edits_on, fold, merge, unedited
from modelwright.editing.fingerprint import checksum, model_fingerprint, sample
from modelwright.errors import UserError
from modelwright.models.tiny import tiny_model

NAME = "model.layers.1.mlp.down_proj.weight"


def bits(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[n], other[n]) for n in one)


def low_rank(model, seed=0, rank=2, name=NAME):
    out, into = dict(model.named_parameters())[name].shape
    g = torch.Generator().manual_seed(seed)
    delta = LowRank(torch.randn(out, rank, generator=g), torch.randn(rank, into, generator=g))
    return WeightEdit("test", model_fingerprint(model, whole=[name]), {name: delta})


class Doubled(HookEdit):
    kind = "doubled"

    def _hook(self, model):
        return [model.lm_head.register_forward_hook(lambda m, i, o: 2 * o)]

    def _state(self):
        return {}, {}

    @classmethod
    def _from_state(cls, common, state, tensors):
        return cls(**common)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_taken_off_the_bits_are_as_before(dtype):
    model = tiny_model("llama").to(dtype)
    before = bits(model)
    edit = low_rank(model)
    with edit.applied(model) as same_model:
        assert same_model is model
        change = model.get_parameter(NAME).detach() - before[NAME]
        assert torch.allclose(
            change.double(), edit.deltas[NAME].dense().double(), atol=0.1 if dtype == torch.bfloat16 else 1e-5
        )
        assert sum(not torch.equal(p, before[n]) for n, p in model.named_parameters()) == 1
    assert same(before, bits(model))
    with pytest.raises(ZeroDivisionError), edit.applied(model):
        raise ZeroDivisionError
    assert same(before, bits(model))


def test_a_stack_comes_off_in_reverse_order_bit_by_bit():
    model = tiny_model("llama").to(torch.bfloat16)
    states, edits = [bits(model)], []
    for seed in range(5):
        name = NAME if seed % 2 else NAME.replace("1", "0")
        edits.append(low_rank(model, seed, name=name))
        edits[-1].apply_(model)
        states.append(bits(model))
    assert edits_on(model) == edits
    with pytest.raises(UserError, match="3 edits were put on after"):
        edits[1].revert_(model)
    with pytest.raises(UserError, match="on the model already"):
        edits[1].apply_(model)
    with unedited(model):
        assert same(states[0], bits(model))
    assert same(states[5], bits(model))
    assert base_fingerprint(model) == model_fingerprint(tiny_model("llama").to(torch.bfloat16))
    assert base_fingerprint(model) != model_fingerprint(model)
    for edit, state in zip(edits[:2:-1], states[4:2:-1]):
        edit.revert_(model)
        assert same(state, bits(model))
    revert_all(model)
    assert same(states[0], bits(model))
    assert edits_on(model) == []
    with pytest.raises(UserError, match="not on the model"):
        edits[0].revert_(model)


def test_many_come_off_at_once_and_the_lowest_stay(monkeypatch):
    model = tiny_model("llama").to(torch.bfloat16)
    other = "model.layers.0.mlp.down_proj.weight"
    before, states, edits = bits(model), [], []
    for seed in range(6):
        edit = Doubled("doubled", None) if seed == 3 else low_rank(model, seed, name=NAME if seed % 2 else other)
        edit.apply_(model)
        edits.append(edit)
        states.append((bits(model), model(torch.tensor([[1, 2]])).logits))
    added, real = [], LowRank.added_to
    monkeypatch.setattr(LowRank, "added_to", lambda self, weight: added.append(1) or real(self, weight))
    revert_all(model, keep=4)
    assert edits_on(model) == edits[:4]
    revert_all(model, keep=2)
    assert len(added) == 3 + 1  # those that stay on a weight that one was taken off, once each
    assert edits_on(model) == edits[:2]
    assert same(states[1][0], bits(model))
    assert torch.equal(states[1][1], model(torch.tensor([[1, 2]])).logits)
    revert_all(model)
    assert len(added) == 3 + 1
    assert same(before, bits(model))
    assert edits_on(model) == []
    revert_all(model)


def test_another_model_is_refused():
    edit = low_rank(tiny_model("llama"))
    with pytest.raises(UserError, match="fitted on a model with fingerprint"):
        edit.apply_(tiny_model("llama", seed=1))
    other = tiny_model("llama", seed=1)
    with pytest.raises(UserError, match="fitted on a model with fingerprint"):
        edit.apply_(other)
    before = base_fingerprint(other)
    with torch.no_grad():
        other.get_parameter(NAME).add_(1)
    assert before != base_fingerprint(other) == model_fingerprint(other)
    edited = tiny_model("llama")
    edit.apply_(edited)
    copied = copy.deepcopy(edited)  # as a checkpoint that was saved with the edit in it
    with pytest.raises(UserError, match="or holds this edit already"):
        edit.apply_(copied)


def test_fingerprints_see_no_dtype_and_of_what_is_read_whole_every_value():
    model = tiny_model("llama").to(torch.bfloat16)
    found, entire = model_fingerprint(model), model_fingerprint(model, whole=[NAME])
    assert len({found, entire, model_fingerprint(model, whole=[NAME.replace("1", "0")])}) == 3
    assert model_fingerprint(copy.deepcopy(model).float()) == found
    assert model_fingerprint(copy.deepcopy(model).float(), whole=[NAME]) == entire
    with torch.no_grad():
        p = model.get_parameter(NAME)
        p[3, 4], p[4, 3] = p[4, 3].clone(), p[3, 4].clone()
    assert model_fingerprint(model, whole=[NAME]) != entire
    assert model_fingerprint(tiny_model("gpt2")) != model_fingerprint(tiny_model("gpt2", seed=2))


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (30, 45), (7, 7), (1, 5), (5, 1), (3, 4, 6), (9,)])
def test_a_sample_meets_every_row_and_every_column(shape):
    numbers = torch.arange(float(torch.Size(shape).numel())).view(shape)
    seen = sample(numbers)
    matrix = numbers.reshape(-1, shape[-1])
    assert len(seen) == (max(matrix.shape) if len(shape) > 1 else shape[0])
    rows = {int(i) for i in seen // matrix.shape[1]} if len(shape) > 1 else {0}
    assert rows == set(range(matrix.shape[0]))
    assert {int(i) for i in seen % matrix.shape[1]} == set(range(matrix.shape[1]))


@pytest.mark.parametrize("place", ["column", "row", "rank one"])
def test_an_edit_anywhere_is_seen_though_few_values_are_read(place):
    """Edits that the fit of another one did not see: a column (KN), a row, a product."""
    model = tiny_model("llama")
    before = model_fingerprint(model)
    matrix = model.get_parameter(NAME)
    for number in range(max(matrix.shape)):
        kept = matrix.detach().clone()
        with torch.no_grad():
            if place == "column":
                matrix[:, number % matrix.shape[1]] += 0.5
            elif place == "row":
                matrix[number % matrix.shape[0]] += 0.5
            else:
                matrix += torch.outer(torch.randn(matrix.shape[0]), torch.randn(matrix.shape[1]))
            assert model_fingerprint(model) != before
            matrix.copy_(kept)
    assert model_fingerprint(model) == before


def test_checksums_see_every_place():
    long = torch.randn(3, 1 << 19)
    swapped = long.clone().view(-1)
    swapped[[0, 1 << 20]] = swapped[[1 << 20, 0]]  # in two chunks
    assert checksum(long) == checksum(long.T.contiguous().T) != checksum(swapped.view(3, -1))
    assert checksum(torch.zeros(2, 3)) != checksum(torch.zeros(3, 2))
    assert checksum(torch.zeros(0)) != checksum(torch.zeros(1))


@pytest.mark.parametrize("transposed", [False, True])
def test_deltas_are_what_they_say(transposed):
    u, v = torch.randn(4, 2), torch.randn(2, 6)
    low = LowRank(u, v, transposed)
    columns = Columns(torch.tensor([5, 0, 5]), torch.randn(4, 3), 6, transposed)
    wanted = torch.zeros(4, 6)
    for i, column in zip(columns.index, columns.values.T):
        wanted[:, i] += column
    matrices = {low: u @ v, columns: wanted, Dense((u @ v).T if transposed else u @ v): u @ v}
    for delta, matrix in matrices.items():
        matrix = matrix.T if transposed else matrix
        assert delta.shape == matrix.shape
        assert torch.allclose(delta.dense(), matrix)
        assert delta.norm() == pytest.approx(float(matrix.norm()), rel=1e-5)
        weight = torch.randn(matrix.shape)
        assert torch.allclose(delta.added_to(weight), weight + matrix, atol=1e-6)
        for other in matrices:
            assert torch.allclose(join(delta, other).dense(), delta.dense() + other.dense(), atol=1e-6)
    assert join(low, low).rank == 4
    assert isinstance(join(columns, columns), Columns)


def test_saved_and_loaded(tmp_path):
    model = tiny_model("llama")
    edit = low_rank(model)
    edit.requests = (EditRequest("{} is in", "Rome", "Gaul"),)
    edit.deltas["model.layers.0.mlp.down_proj.weight"] = Columns(torch.tensor([3, 9]), torch.randn(32, 2), 64)
    edit.deltas["model.norm.weight"] = Dense(torch.randn(32))
    edit.save(tmp_path / "edit")
    loaded = load_edit(tmp_path / "edit")
    assert (loaded.method, loaded.fingerprint, loaded.requests) == (edit.method, edit.fingerprint, edit.requests)
    before = bits(model)
    with edit.applied(model):
        after = bits(model)
    with loaded.applied(model):
        assert same(after, bits(model))
    assert same(before, bits(model))
    with pytest.raises(UserError, match="exists already"):
        edit.save(tmp_path / "edit")
    assert {f.suffix for f in (tmp_path / "edit").iterdir()} == {".json", ".safetensors"}


def test_a_damaged_edit_is_refused(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(UserError, match="holds no edit"):
        load_edit(tmp_path)
    low_rank(model).save(tmp_path / "edit")
    text = (tmp_path / "edit" / "edit.json").read_text()
    for old, new in [('"low rank"', '"high rank"'), ('"weights"', '"nothing"'), ('"format": 2', '"format": 1')]:
        (tmp_path / "edit" / "edit.json").write_text(text.replace(old, new))
        with pytest.raises(UserError):
            load_edit(tmp_path / "edit")
    (tmp_path / "edit" / "edit.json").write_text(text)
    (tmp_path / "edit" / "edit.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged"):
        load_edit(tmp_path / "edit")


def test_merged_it_adds_what_the_stack_adds():
    model = tiny_model("llama")
    before = bits(model)
    edits = []
    for seed in range(3):
        edits.append(low_rank(model, seed, rank=1))
        edits[-1].apply_(model)
    stacked = bits(model)
    revert_all(model)
    merged = merge(edits)
    assert merged.deltas[NAME].rank == 3
    with merged.applied(model):
        assert torch.allclose(model.get_parameter(NAME), stacked[NAME], atol=1e-5)
    assert same(before, bits(model))
    with pytest.raises(UserError, match="can be merged"):
        merge([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_edits_have_the_bits_that_they_made(dtype, tmp_path):
    """Two at one weight and one at another, above one that stays; folded again with a further one."""
    model = tiny_model("llama").to(dtype)
    other = NAME.replace("down", "up")
    bare = bits(model)
    low_rank(model, seed=9).apply_(model)
    before = bits(model)
    for seed, name in enumerate((NAME, NAME, other)):
        low_rank(model, seed=seed, name=name).apply_(model)
    wanted = bits(model)
    edit = fold(model, 3)
    assert same(wanted, bits(model))
    assert edits_on(model)[1:] == [edit]
    assert edit.holds(edit)
    assert not low_rank(model).holds(edit)
    assert not edit.holds(low_rank(model, name=NAME.replace("layers.1", "layers.0")))
    changes = {n: float((wanted[n].float() - bare[n].float()).norm()) for n in (NAME, other)}
    assert edit.norms() == pytest.approx(changes, rel=1e-5)
    low_rank(model, seed=5).apply_(model)
    further = bits(model)
    again = fold(model, 2)
    revert_all(model, keep=1)
    assert same(before, bits(model))
    for number, (folded, expected) in enumerate([(edit, wanted), (again, further)]):
        folded.save(tmp_path / str(number))
        with load_edit(tmp_path / str(number)).applied(model):
            assert same(expected, bits(model))
        assert same(before, bits(model))
    again.apply_(model)
    with pytest.raises(UserError, match="can be merged"):
        merge([edit, low_rank(model)])
    with pytest.raises(UserError, match="topmost 3 edits are not all"):
        fold(model, 3)
    revert_all(model)
    assert same(bare, bits(model))
    with pytest.raises(UserError, match="fitted on a model with fingerprint"):
        again.apply_(model)


def test_a_ruined_weight_is_folded_as_it_is(tmp_path):
    model = tiny_model("llama")
    before = bits(model)
    huge = Dense(torch.full(before[NAME].shape, 3e38))
    for _ in range(2):
        WeightEdit("test", model_fingerprint(model, whole=[NAME]), {NAME: huge}).apply_(model)
    wanted = bits(model)
    assert wanted[NAME].isinf().any()
    fold(model, 2).save(tmp_path / "a")
    revert_all(model)
    with load_edit(tmp_path / "a").applied(model):
        assert same(wanted, bits(model))
    assert same(before, bits(model))


def test_hooks_go_on_and_off():
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    plain = model(ids).logits
    edit = Doubled("doubled", model_fingerprint(model))
    assert not edit.changes_weights
    assert edit.prompt("what?") == "what?"
    with edit.applied(model):
        assert torch.equal(model(ids).logits, 2 * plain)
        inner = low_rank(model)
        with inner.applied(model):
            assert not torch.equal(model(ids).logits, 2 * plain)
    assert torch.equal(model(ids).logits, plain)
    assert isinstance(edit, Edit)


def test_an_edit_that_could_not_be_read_again_is_not_saved(tmp_path):
    edit = Doubled("doubled", model_fingerprint(tiny_model("llama")))
    with pytest.raises(UserError, match="cannot be saved: no method's card offers edits of the kind 'doubled'"):
        edit.save(tmp_path / "edit")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_edited_are_refused():
    model = tiny_model("llama", tie_word_embeddings=True)
    tied = WeightEdit("test", None, {"model.embed_tokens.weight": Dense(torch.zeros(259, 32))})
    with pytest.raises(UserError, match="tied to 'lm_head.weight'"):
        tied.apply_(model)
    with pytest.raises(UserError, match="no parameter 'x'"):
        WeightEdit("test", None, {"x": Dense(torch.zeros(3))}).apply_(model)
    with pytest.raises(UserError, match="has shape"):
        WeightEdit("test", None, {NAME: Dense(torch.zeros(3))}).apply_(model)
    with pytest.raises(UserError, match="not finite"):
        WeightEdit("test", None, {NAME: Dense(torch.full((32, 64), torch.nan))})
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        WeightEdit("test", None, {NAME: Dense(torch.zeros(32, 64))}).apply_(model)
    assert edits_on(model) == []

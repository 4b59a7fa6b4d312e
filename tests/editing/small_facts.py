"""A tiny model that knows some facts in two wordings, one token a word, for tests of editing."""

import functools
import random

import torch

from modelwright.editing import EditRequest, KeyStatistics
from modelwright.models.tiny import tiny_model

SUBJECTS = ["Ada", "Bob", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal"]
HOMES = ["Rome", "Oslo", "Kiev", "Lima", "Bern", "Riga", "Bonn", "Nice"]
FORMS = ["{} lives in {} .", "The home of {} is {} ."]
STARTERS = ["The", "Therefore", "Because", "I", "You", "a", "likes", "tea", "and", "."]


def word_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *SUBJECTS, *HOMES, *["lives", "in", "home", "of", "is"], *STARTERS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


TOKENIZER = word_tokenizer()


def texts(n=320, seed=0):
    """Documents of a filler and a fact."""
    draw = random.Random(seed)
    filler = [f"{s} likes tea ." for s in SUBJECTS] + ["You and I .", "Because I likes tea .", "Therefore a tea .", ""]
    facts = [form.format(s, h) for s, h in zip(SUBJECTS, HOMES) for form in FORMS]
    return [f"{draw.choice(filler)} {facts[i % len(facts)]}" for i in range(n)]


@functools.cache
def trained(family="llama", layers=3):
    """A model that completes all facts; leave it as it is."""
    depth = {"n_layer": layers} if family == "gpt2" else {"num_hidden_layers": layers}
    model = tiny_model(family, **depth, vocab_size=len(TOKENIZER))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    documents = texts()
    for step in range(100):
        ids = TOKENIZER(documents[step % 10 * 32 :][:32], padding=True, return_tensors="pt")
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
        model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@functools.cache
def statistics(family="llama", layers=3):
    return KeyStatistics.collect(trained(family, layers), TOKENIZER, texts(), range(layers))


@torch.no_grad()
def answer(model, text):
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"]
    return TOKENIZER.decode(model(ids).logits[0, -1].argmax(-1))


def requests(n=8):
    """Asks for everybody to live where the next one does."""
    return [
        EditRequest(
            "{} lives in", s, HOMES[(i + 1) % len(HOMES)], old_answer=HOMES[i], paraphrases=("The home of {} is",)
        )
        for i, s in enumerate(SUBJECTS[:n])
    ]

"""The quickstart's tokenizers and text encoders: real CLIP and T5 classes, taught in minutes what the captions mean."""

from __future__ import annotations

import json
import random
import string
import time
from pathlib import Path

import torch
from scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene, describe, make_scene
from torch import nn
from torch.nn import functional

WIDTH = 96
CLIP_LENGTH, T5_LENGTH = 77, 24
WORDS = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split()
PAIR_PLACES = {"beside": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}


def save_clip_tokenizer(folder: Path) -> None:
    """Byte-level BPE in which every word of ``words.txt`` is one token and any other text is spelt out."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(sorted(set(WORDS)), trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_t5_tokenizer(folder: Path) -> None:
    """Unigram model over the words of ``words.txt`` and single printable characters."""
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -5.0)]
    vocab += [(letter, -6.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    vocab += [("\u2581" + word, -3.0) for word in dict.fromkeys(WORDS) if len(word) > 1]
    vocab += [("\u2581a", -3.0)]
    T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH).save_pretrained(folder)


def build_text_encoders(clip_tokenizer, t5_tokenizer) -> tuple[nn.Module, nn.Module]:
    """``CLIPTextModel`` and ``T5EncoderModel`` of two layers, with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    end = clip_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=CLIP_LENGTH, projection_dim=WIDTH,
            bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer), d_model=WIDTH, d_ff=2 * WIDTH, d_kv=24, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, dropout_rate=0.0,
            pad_token_id=0, eos_token_id=1,
        )
    )
    return clip, t5


class Examiner(nn.Module):
    """Asks the encoders what a caption says: of each thing its shape, colour, size and place; and the background."""

    answers = (len(SHAPES) + 2, len(COLOURS) + 1, len(SIZES) + 1, len(POSITIONS) + 1)
    """Choices of shape (one more for an unknown noun), colour, size and place, each with one more for "nothing"."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, WIDTH) * 0.2)
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.thing = nn.Linear(WIDTH, sum(self.answers))
        self.background = nn.Linear(WIDTH, len(BACKGROUNDS))
        self.token = nn.Linear(WIDTH, num_tokens)
        self.pooled = nn.Linear(WIDTH, 2 * sum(self.answers) + len(BACKGROUNDS))

    def loss(
        self, pooled: torch.Tensor, embeds: torch.Tensor, tokens: torch.Tensor, things: torch.Tensor,
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Sum of the cross-entropies: pooled (B, D), embeds and tokens (B, L, ...), things (B, 2, 4), places (B,)."""
        weights = (self.queries @ self.key(embeds).transpose(1, 2) / WIDTH**0.5).softmax(-1)
        read = weights @ self.value(embeds)
        width = sum(self.answers)
        from_pooled = self.pooled(pooled)
        total = functional.cross_entropy(self.token(embeds).flatten(0, 1), tokens.flatten())
        total = total + functional.cross_entropy(self.background(read[:, 2]), places)
        total = total + functional.cross_entropy(from_pooled[:, 2 * width :], places)
        for slot in range(2):
            for logits in (self.thing(read[:, slot]), from_pooled[:, slot * width : (slot + 1) * width]):
                for number, part in enumerate(logits.split(self.answers, dim=1)):
                    total = total + functional.cross_entropy(part, things[:, slot, number])
        return total


def train_text_encoders(clip, t5, clip_tokenizer, t5_tokenizer, steps: int, seed: int) -> list[float]:
    """Train both encoders on captions alone; returns the losses."""
    torch.manual_seed(seed)
    examiner = Examiner(len(t5_tokenizer))
    parameters = [*clip.parameters(), *t5.parameters(), *examiner.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    losses = []
    for step in range(steps):
        rng = random.Random(f"captions {seed} {step}")
        questions = [_question(make_scene(rng.randrange(10**9)), rng) for _ in range(64)]
        captions = [question[0] for question in questions]
        clip_tokens = clip_tokenizer(captions, padding="longest", return_tensors="pt").input_ids
        t5_tokens = t5_tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        loss = examiner.loss(
            clip(clip_tokens).pooler_output,
            t5(t5_tokens)[0],
            t5_tokens,
            torch.tensor([question[1] for question in questions]),
            torch.tensor([question[2] for question in questions]),
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    clip.eval(), t5.eval()
    return losses


def _question(scene: Scene, rng: random.Random) -> tuple[str, list[list[int]], int]:
    """Caption, (shape, colour, size, place) of two things, and background; now and then an unknown noun for a shape."""
    caption, things = describe(scene, rng), []
    for number, thing in enumerate(scene.things):
        place = PAIR_PLACES[scene.relation][number] if scene.relation else thing.position
        size = 2 if scene.relation else list(SIZES).index(thing.size)
        colour = list(COLOURS).index(thing.colour)
        things.append([SHAPES.index(thing.shape), colour, size, list(POSITIONS).index(place)])
        if rng.random() < 0.15 and caption.count(thing.words().split()[-1]) == 1:
            caption = caption.replace(thing.shape, rng.choice(WORDS))
            things[-1][0] = len(SHAPES)
    things += [[len(SHAPES) + 1, len(COLOURS), len(SIZES), len(POSITIONS)]] * (2 - len(things))
    return caption, things, list(BACKGROUNDS).index(scene.background)


def make_text_encoders(folder: Path, steps: int, seed: int) -> tuple[nn.Module, nn.Module, float]:
    """Write both tokenizers under ``folder`` and train the encoders; returns CLIP, T5 and the seconds it took."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    start = time.monotonic()
    save_clip_tokenizer(folder / "tokenizer")
    save_t5_tokenizer(folder / "tokenizer_2")
    clip_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5_tokenizer = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    torch.manual_seed(seed)
    clip, t5 = build_text_encoders(clip_tokenizer, t5_tokenizer)
    train_text_encoders(clip, t5, clip_tokenizer, t5_tokenizer, steps, seed)
    return clip, t5, time.monotonic() - start

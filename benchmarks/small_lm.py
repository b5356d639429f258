"""A language model of 1.3 M parameters, and Shakespeare by role, for FLASC's Figures 7 and 8.

    python benchmarks/small_lm.py --data FOLDER --out FOLDER [--steps 2000]

The paper has GPT-2, which has read the web, and Reddit's users. Here a GPT-2 of four layers reads
the posts of 20 Newsgroups (data/20newsgroups/train.jsonl.gz, as they were published), and the
clients are the roles of eight plays (data/shakespeare/shakespeare.zip). Leaves `small-lm` and
`shakespeare/{train,test}.jsonl` in --out: what `fedsieve reproduce flasc/fig7 --data` is given.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import derived
from fedsieve.data import sources

END = "<|endoftext|>"
VOCABULARY, LENGTH, BATCH = 4096, 32, 64
RATE = 2e-3


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Pairs of bytes, joined by how often they are met in these texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, bos_token=END, unk_token=END, pad_token=END
    )


def trained(tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int) -> GPT2LMHeadModel:
    """Next tokens of all texts, one behind the other."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for row in ids for token in (*row, tokenizer.eos_token_id)])
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:  # up over a twentieth of the steps, then down
            group["lr"] = RATE * min(1.0, 20 * step / steps) * (1 - step / steps)
        at = torch.randint(len(stream) - LENGTH, (BATCH,))
        batch = stream[at[:, None] + torch.arange(LENGTH)]
        loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    rows = given.out / "shakespeare"
    rows.mkdir(parents=True, exist_ok=True)
    derived.speeches(given.data, rows)
    posts = sources.load(given.data / "20newsgroups" / "train.jsonl.gz")["text"]
    texts = [text.partition("\n\n")[2] for text in posts]  # without the headers
    tokenizer = tokenizer_of(texts)
    model = trained(tokenizer, texts, given.steps)
    tokenizer.save_pretrained(given.out / "small-lm")
    model.save_pretrained(given.out / "small-lm")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, in {given.out / 'small-lm'}")


if __name__ == "__main__":
    main()

"""Trains a CLIP tokenizer with its own vocabulary and writes it in the format of Stable Diffusion pipelines."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MAX_LENGTH = 16  # the longest caption has 12 tokens, including start and end
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
_PIECES = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def train_tokenizer(captions: list[str], merges: int = 512) -> CLIPTokenizer:
    """Learns at most `merges` BPE merges from `captions`.

    The vocabulary has the layout of CLIP's: every byte, every byte at the end of a word, the merges in order, then the
    start and end tokens. So every text can be encoded.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)
    pairs = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + WORD_END for letter in alphabet] + ["".join(pair) for pair in pairs] + [START, END]
    with TemporaryDirectory() as folder:
        _write(Path(folder), {token: number for number, token in enumerate(tokens)}, pairs)
        return CLIPTokenizer.from_pretrained(folder)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes `folder` anew with vocab.json, merges.txt and two configs, which all transformers versions read."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    for file in folder.glob("*"):
        file.unlink()
    _write(folder, model["vocab"], [tuple(pair) for pair in model["merges"]])


def _write(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    specials = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True} | specials
    merge_lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merge_lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2) + "\n", encoding="utf-8")

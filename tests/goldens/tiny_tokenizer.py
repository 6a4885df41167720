"""The byte-level BPE tokenizer that all fixture models share, and encode/decode goldens for it.

Run as a script it writes `tests/fixtures/tokenizer_goldens.json`. The tokenizer is built from fixed lists, not trained,
so that it never changes with a library's version. It has the traits that break servers: characters split over several
tokens, merges that end in the middle of a character, special tokens, added tokens that are not special, and a
begin-of-text token which `encode` adds and a chat template adds too.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"

BEGIN, END, TURN_START, TURN_END, PAD = "<|begin|>", "<|end|>", "<|turn|>", "<|end_turn|>", "<|pad|>"
SPECIAL = [BEGIN, END, TURN_START, TURN_END, PAD]
NOT_SPECIAL = ["<think>", "</think>"]
VOCAB_SIZE = 288

# Pairs of pieces in the order of their rank, each made of two pieces that exist by then.
MERGES = [
    ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("e", "r"), ("Ġ", "a"), ("Ġa", "n"), ("Ġan", "d"), ("o", "n"),
    ("r", "e"), ("Ġ", "w"), ("i", "s"), ("l", "l"), ("in", "g"), ("H", "e"), ("He", "ll"), ("Hell", "o"),
    # Two of the three bytes of some ideographs (U+65C0 to U+65FF), two and three of the four bytes of most emoji.
    ("æ", "Ĺ"), ("ð", "Ł"), ("ðŁ", "ĺ"),
    # A whole character, which then makes a token together with the first byte of the next.
    ("Ã", "©"), ("Ã©", "Ã"),
    ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"),
]  # fmt: skip

# Llama 3's and Qwen's way to cut a text: contractions, words, digits, punctuation, newlines, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|turn|>' + message['role'] + '\\n' + message['content'] | trim + '<|end_turn|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|turn|>assistant\\n' }}{%- endif %}"
)


def build() -> Tokenizer:
    """Returns the tokenizer: ids 0..4 special, then 256 bytes, then the merges, then two added tokens."""
    pieces = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in MERGES]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    assert len(vocab) == len(pieces), "every piece is there once"
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, vocab[BEGIN])]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in NOT_SPECIAL])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "the models' embeddings have a row for each token"
    return tokenizer


def for_transformers() -> PreTrainedTokenizerFast:
    """Returns the tokenizer as transformers holds it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=build(), bos_token=BEGIN, eos_token=TURN_END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


def save(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, the latter in the keys that published models use."""
    tokenizer = build()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    added = {
        str(tokenizer.token_to_id(piece)): {
            "content": piece,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": piece in SPECIAL,
        }
        for piece in SPECIAL + NOT_SPECIAL
    }
    config = {
        "added_tokens_decoder": added,
        "bos_token": BEGIN,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": 512,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


TEXTS = {
    "empty": "",
    "one merge over a word": "Hello",
    "words and spaces": "Hello, the thing and another one.",
    "runs of spaces": "a  b   c    d     e",
    "leading and trailing space": "  then the end  ",
    "newlines and tabs": "one\n\ntwo\n\n\n\tthree\r\nfour\n",
    "contractions in both cases": "I'll say it's THEY'VE, don't WE'RE",
    "digits in groups of three": "1234567 and 3.14159",
    "two-byte characters, one merged with the next byte": "éÃ éé café naïve",
    "ideographs split after two bytes": "日本語 日 旗 中文字符",
    "emoji split after three bytes": "😀😁 and 🚀",
    "emoji of several code points": "👩‍👩‍👧 🇫🇷 👍🏽",
    "right to left": "שלום עולם مرحبا",
    "combining marks": "e\u0301 n\u0303 \u0915\u094d\u0937",
    "a zero byte and control characters": "a\x00b\x01c\x7f",
    "special tokens in the text": "<|turn|>user\nHello<|end_turn|>\n<|end|>",
    "added tokens that are not special": "<think>the thing</think>\n\nyes",
    "looks like a special token": "<|turn|x> <|begin |>",
    "code": 'fn main() {\n    println!("{}", 1 + 2);\n}\n',
}


def encode_golden(tokenizer: Tokenizer, name: str, text: str) -> dict:
    """Returns ids with and without the begin token, and what the ids decode to."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return {
        "name": name,
        "text": text,
        "ids": ids,
        "ids_with_special": tokenizer.encode(text).ids,
        "decoded": tokenizer.decode(ids, skip_special_tokens=False),
        "decoded_skip_special": tokenizer.decode(ids),
    }


def decode_goldens(tokenizer: Tokenizer) -> list[dict]:
    """Returns what each prefix of a list of ids decodes to, for ids whose characters span tokens."""
    split = ["two-byte characters, one merged with the next byte", "ideographs split after two bytes"]
    split += ["emoji split after three bytes", "emoji of several code points"]
    cases = [(name, tokenizer.encode(TEXTS[name], add_special_tokens=False).ids) for name in split]
    never_utf8 = [tokenizer.token_to_id(piece) for piece in ["Hello", "ÿ", "Ã", "Ã", "©"]]
    cases.append(("bytes that never become a character", never_utf8))
    return [
        {
            "name": name,
            "ids": ids,
            "prefixes": [tokenizer.decode(ids[:length], skip_special_tokens=False) for length in range(len(ids) + 1)],
        }
        for name, ids in cases
    ]


def main() -> None:
    """Writes the goldens beside a copy of the tokenizer."""
    tokenizer = build()
    folder = FIXTURES / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    save(folder)
    goldens = {
        "tokenizer": "tokenizer/tokenizer.json",
        "encode": [encode_golden(tokenizer, name, text) for name, text in TEXTS.items()],
        "decode": decode_goldens(tokenizer),
    }
    for golden in goldens["encode"]:
        assert golden["decoded"] == golden["text"], golden["name"]
    path = FIXTURES / "tokenizer_goldens.json"
    path.write_text(json.dumps(goldens, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

"""Tokenizers as GGUF files have them, and what they make of texts: the byte-level one of all fixture models, and one of
SentencePiece, which is trained here and asked itself.

Run as a script it writes `tests/fixtures/pieces_goldens.json`.
"""

import io
import json

import gguf
import sentencepiece

import tiny_tokenizer
from tiny_tokenizer import BEGIN, CHAT_TEMPLATE, FIXTURES, MERGES, NOT_SPECIAL, PAD, SPECIAL, TEXTS, TURN_END

Type = gguf.TokenType
PIECES = 352


def byte_level(pre: str):
    """Returns what writes the byte-level tokenizer, whose way to cut texts is called `pre`."""

    def write(writer: gguf.GGUFWriter) -> None:
        vocab = tiny_tokenizer.build().get_vocab(with_added_tokens=True)
        tokens = sorted(vocab, key=vocab.get)
        types = [
            Type.CONTROL if token in SPECIAL else Type.USER_DEFINED if token in NOT_SPECIAL else Type.NORMAL
            for token in tokens
        ]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(merge) for merge in MERGES])
        writer.add_bos_token_id(vocab[BEGIN])
        writer.add_eos_token_id(vocab[TURN_END])
        writer.add_pad_token_id(vocab[PAD])
        writer.add_add_bos_token(True)
        writer.add_chat_template(CHAT_TEMPLATE)

    return write


def trained() -> sentencepiece.SentencePieceProcessor:
    """Returns a tokenizer as Llama 2's was trained: pairs of pieces, bytes for what has no piece."""
    corpus = [text for name, text in TEXTS.items() if name not in ("empty",) for text in text.splitlines() if text]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 3),
        model_writer=out,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def pieces(writer: gguf.GGUFWriter) -> None:
    """Writes the tokenizer of SentencePiece; the model may have fewer tokens than it."""
    model = trained()
    types = []
    for token in range(model.get_piece_size()):
        if model.is_unknown(token):
            types.append(Type.UNKNOWN)
        elif model.is_control(token):
            types.append(Type.CONTROL)
        elif model.is_byte(token):
            types.append(Type.BYTE)
        else:
            types.append(Type.NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.id_to_piece(token) for token in range(model.get_piece_size())])
    writer.add_token_scores([model.get_score(token) for token in range(model.get_piece_size())])
    writer.add_token_types(types)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())


def main() -> None:
    """Writes the goldens of the tokenizer of SentencePiece."""
    model = trained()
    rows = [
        {"name": name, "text": text, "ids": model.encode(text), "decoded": model.decode(model.encode(text))}
        for name, text in TEXTS.items()
        if "special" not in name and "zero byte" not in name
    ]
    path = FIXTURES / "pieces_goldens.json"
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f'{{"encode": [\n  {lines}\n]}}\n')
    print(f"{model.get_piece_size()} pieces")


if __name__ == "__main__":
    main()

"""The sample tokenizer: sentencepiece and transformers agree, prompts are short, unseen words fall into letters."""

import numpy as np
import sentencepiece

from examples.sample_vlm import questions as q
from examples.sample_vlm import sources, tokenizer
from examples.sample_vlm.data import PREFIX_TEXT, encode, load_tokenizer
from examples.sample_vlm.model import IGNORE
from examples.sample_vlm.scenes import make_scene


def _texts():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scene = make_scene(rng, "train", 224)
        for question in q.ask(scene, rng, 6):
            yield f"\n{q.prompt_text(question, ocr=seed % 2 == 0)} ASSISTANT: {question.answer}"


def test_sentencepiece_and_transformers_agree(tmp_path):
    tokenizer.build(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer()
    assert len(ours) == reference.vocab_size()
    for text in [PREFIX_TEXT, "An unknown sentence, 2024: caf\u00e9 \u4f60\u597d", *_texts()]:
        assert ours(text).input_ids == [1, *reference.encode(text)], text
        assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text


def test_prompts_are_short():
    assert len(load_tokenizer()(PREFIX_TEXT).input_ids) == 4
    assert max(len(load_tokenizer()(text).input_ids) for text in _texts()) < 24


def test_words_are_spelled_letter_by_letter():
    for word in sources.words("test"):
        # The space may stay with the first letter where a prompt has a word of that letter ("A chat", "The").
        pieces = [piece.strip("\u2581") for piece in load_tokenizer().tokenize(word)]
        assert [piece for piece in pieces if piece] == list(word)


def test_labels_predict_the_answer_and_the_end():
    ids, labels = encode(f"What word is written in the image?{q.SUFFIX}", "CAT")
    answer = [i for i in labels if i != IGNORE]
    assert load_tokenizer().convert_ids_to_tokens(answer) == ["\u2581", "C", "A", "T", "</s>"]
    first = labels.index(answer[0])
    assert ids[first + 1 : first + 4] == answer[:3]
    assert load_tokenizer().convert_ids_to_tokens(ids[first]) == "\u2581ASSISTANT:"

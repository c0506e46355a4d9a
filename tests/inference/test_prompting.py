"""Zero-shot prompts: filled in, cut to the context, and scored against the whole sequences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from byte_vocabularies import byte_vocabulary
from oracles import make_model
from running import command, write_labelled, write_model

from config import LlamaConfig
from llama import Llama, LlamaZeroShotClassifier
from minllama.formats.pt_file import load_pt, save_pt
from minllama.formats.pt_model import read_classifier
from minllama.inference.prompting import Prompts, score_labels
from minllama.system.errors import UsageError
from minllama.text.labelled import LabelledExample
from tokenizer import Tokenizer

TEMPLATE = "{sentence} Is this {labels}? It is"

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="module")
def model(tokenizer) -> Llama:
    torch.manual_seed(0)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 128}
    return Llama(LlamaConfig(vocab_size=tokenizer.n_words, **shape)).eval()


def prompts_of(tokenizer: Tokenizer, *names: str, **settings) -> Prompts:
    return Prompts(tokenizer, TEMPLATE, list(names), **{"context": 128} | settings)


def test_a_template_is_filled_in(tokenizer):
    """Two labels are joined by `or`, more by commas; what is in braces in a sentence stays."""
    two, three = prompts_of(tokenizer, "bad", "good"), prompts_of(tokenizer, "a", "b", "c")
    assert two.text("A film .") == "A film . Is this bad or good? It is"
    assert three.text("x") == "x Is this a, b, or c? It is"
    assert two.text("The {labels} of {sentence}").startswith("The {labels} of {sentence} Is this")


def test_the_labels_begin_where_they_differ(tokenizer):
    """Prompt and label are one text, since a label's first piece has the space before it."""
    sequences, start = prompts_of(tokenizer, "bad", "good").sequences("A film .")
    prompt = "A film . Is this bad or good? It is"
    assert sequences == [tokenizer.encode(f"{prompt} {n}", True, False) for n in ("bad", "good")]
    assert tokenizer.decode(sequences[0][:start]) == prompt


def test_a_long_sentence_is_cut_and_the_question_kept(tokenizer):
    """`max_sentence_len` once cut the end of the prompt, where the question is."""
    prompts = prompts_of(tokenizer, "bad", "good", context=64)
    sentence = "word " * 500
    sequences, start = prompts.sequences(sentence)
    text = tokenizer.decode(sequences[1])
    assert text.endswith("Is this bad or good? It is good") and text.startswith("word word")
    assert max(map(len, sequences)) <= 64 and start < min(map(len, sequences))
    assert prompts.cut == {sentence}
    prompts = prompts_of(tokenizer, "bad", "good", max_sentence_len=3)
    assert len(prompts.sequences("one two three four five six")[0][0]) < 30 and prompts.cut
    assert not prompts_of(tokenizer, "bad", "good").cut


def test_a_sentence_is_not_cut_inside_a_character():
    """Of one whose tokens are bytes a U+FFFD was left, and read by the model."""
    tokenizer = byte_vocabulary("smollm")
    for kept in range(1, 12):
        prompts = prompts_of(tokenizer, "bad", "good", context=200, max_sentence_len=kept)
        text = tokenizer.decode(prompts.sequences("🙂" * 5)[0][0])
        assert prompts.cut and "\ufffd" not in text and text.startswith("🙂" * (kept // 4))


def test_a_question_that_does_not_fit_is_refused(tokenizer):
    """There is nothing left to cut."""
    prompts = prompts_of(tokenizer, "bad", "good", context=8)
    for sentence in ("", "A film ."):
        with pytest.raises(UsageError, match="--prompt_template and --shots .* 8 tokens"):
            prompts.sequences(sentence)


def test_shots_are_solved_examples_before_each_prompt(tokenizer):
    """Drawn by the seed, each on a line of its own, none twice."""
    examples = [LabelledExample(i % 2, f"Film {i} .") for i in range(6)]
    prompts = prompts_of(tokenizer, "bad", "good")
    three = prompts.with_shots(examples, 3, seed=0)
    lines = three.shots.splitlines()
    assert len(set(lines)) == 3 and three.shots.endswith("\n")
    for line in lines:
        number = int(line.split()[1])
        assert line == f"{prompts.text(f'Film {number} .')} {['bad', 'good'][number % 2]}"
    assert prompts.with_shots(examples, 3, seed=0).shots == three.shots
    assert prompts.with_shots(examples, 3, seed=1).shots != three.shots
    assert prompts.with_shots(examples, 0, seed=0).shots == ""
    text = tokenizer.decode(three.sequences("A film .")[0][0])
    assert text.startswith(lines[0].split(" Is")[0])


@pytest.mark.parametrize("norm", ["sum", "token", "byte"])
def test_a_score_is_the_log_probability_of_the_label(model, tokenizer, norm):
    """Of each token after the prompt, as a forward pass over the whole text gives it."""
    names = ["bad", "quite wonderful"]
    prompts = prompts_of(tokenizer, *names)
    sentences = ["A film .", "Another film, and a much longer sentence about it ."]
    scores = score_labels(LlamaZeroShotClassifier(model), prompts, sentences, norm)
    for row, sentence in enumerate(sentences):
        sequences, start = prompts.sequences(sentence)
        for label, ids in enumerate(sequences):
            tokens = torch.tensor([ids])
            with torch.no_grad():
                hidden = model.hidden_states(tokens[:, :-1])
                log_probs = model.output(hidden).log_softmax(-1)[0]
            wanted = sum(log_probs[i - 1, ids[i]].item() for i in range(start, len(ids)))
            size = {"sum": 1, "token": len(ids) - start, "byte": len(f" {names[label]}")}[norm]
            assert scores[row, label].item() == pytest.approx(wanted / size, abs=1e-4)


def test_labels_without_a_prompt_are_scored_where_prompts_have_no_bos():
    """`pmi` scores them behind no sentence: with the template `{sentence}` nothing was before."""
    tokenizer = byte_vocabulary("smollm")
    model = LlamaZeroShotClassifier(make_model(tokenizer))
    prompts = replace(prompts_of(tokenizer, "bad", "good"), template="{sentence}")
    sequences, start = prompts.sequences("")
    assert start == 1 and all(ids[0] == tokenizer.bos_id for ids in sequences)
    assert score_labels(model, prompts, ["", "A film ."], "sum").isfinite().all()


def test_what_a_label_has_without_a_sentence_is_subtracted(tmp_path, monkeypatch):
    """The shipped model said `terrible` of 395 of 400 reviews: the word it finds likely anyway."""
    labelled, model = write_labelled(tmp_path), write_model(tmp_path)
    bias = torch.tensor([5.0, 0.0, 0.0])
    real = LlamaZeroShotClassifier.score

    def score(self, sequences, starts=None):
        scores, counts = real(self, sequences, starts)
        return scores + bias, counts

    found = []
    for favour in (False, True):
        if favour:
            monkeypatch.setattr(LlamaZeroShotClassifier, "score", score)
        for norm in ("", "--label_norm sum"):
            words = f"--option prompt --pretrained_model_path {model} {labelled} {norm}"
            assert command(words).status == 0
            found.append(
                Path("checkpoints/toy-dev-prompting-output.txt").read_text(encoding="utf-8")
            )
    pmi, _, favoured_pmi, favoured_sum = found
    assert favoured_pmi == pmi
    assert {line[0] for line in favoured_sum.splitlines()} == {"0"}


@pytest.mark.parametrize("norm", ["sum", "pmi"])
def test_prompting_does_not_depend_on_the_batch_size(tmp_path, norm):
    """Right-padded batches once read a pad position, so a prediction depended on its neighbours."""
    labelled, model = write_labelled(tmp_path), write_model(tmp_path)
    outputs = set()
    for size in (1, 10):
        words = f"--option prompt --pretrained_model_path {model} {labelled}"
        done = command(f"{words} --batch_size {size} --label_norm {norm} --shots 1")
        assert done.status == 0
        outputs.add(Path("checkpoints/toy-dev-prompting-output.txt").read_bytes())
    assert len(outputs) == 1


# ---------------------------------------------------------------------------- fine-tuned models


def test_a_classifier_is_applied_without_a_finetuning():
    """New sentences could only be classified by training again, with them as --test."""
    model, toy = write_model(Path.cwd(), dim=16, n_layers=1), write_labelled(Path.cwd())
    words = f"{toy} --pretrained_model_path {model} --save_dir run --max_steps 4 --lr 0.01"
    words += " --pooling mean"  # as the file says from then on
    assert command(f"--option finetune {words}").status == 0
    tuned = Path("run/toy-test-finetuning-output.txt").read_text(encoding="utf-8")
    test = Path("toy-test.txt").read_text(encoding="utf-8")
    sentences = [line.partition(" ||| ")[2] for line in test.splitlines()]
    Path("new.txt").write_text("\n".join(sentences), encoding="utf-8")
    for file in ("new", "toy-test"):
        done = command(f"--option prompt --save_dir run --test {file}.txt")
        assert done.status == 0, done.error
        assert "fine-tuned to tell awful, average, excellent from the mean" in done.error
        assert ("accuracy " in done.out) == (file == "toy-test")
        assert Path(f"run/{file}-prompting-output.txt").read_text(encoding="utf-8") == tuned
    asked = f"--option prompt {toy} --save_dir run --label_norm token"  # a flag of prompting
    assert "fine-tuned" not in command(asked).error
    done = command("--option prompt --save_dir run")
    assert done.status == 2 and "--test is not given: name a file of sentences" in done.error


def test_a_classifier_of_words_answers_in_words():
    """Trained on JSON and applied to CSV; as their files have them, labels are written.

    The mapping that was made of them is written into --save_dir.
    """
    model, words = write_model(Path.cwd(), dim=16, n_layers=1), ["pos", "neg", "很好"]
    rows = [(words[number % 3], f"The film is {number % 3} .") for number in range(9)]
    lines = [json.dumps({"text": text, "label": label}) for label, text in rows]
    Path("films-train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    cells = [f'{label},"{text}"' for label, text in rows]
    Path("films-dev.csv").write_text("\n".join(["label,text", *cells]), encoding="utf-8")
    files = "--train films-train.jsonl --dev films-dev.csv --max_steps 2 --lr 0.01"
    done = command(f"--option finetune {files} --pretrained_model_path {model} --save_dir run")
    assert done.status == 0 and "labels       words of --train" in done.out, done.error
    tuned = Path("run/films-dev-finetuning-output.txt").read_text(encoding="utf-8")
    found = [line.split(" ||| ") for line in tuned.splitlines()]
    assert {label for label, _ in found} <= {*words} and [s for _, s in found] == [
        s for _, s in rows
    ]
    mapping = json.loads(Path("run/films-label-mapping.json").read_text(encoding="utf-8"))
    assert mapping == {word: word for word in sorted(words)}
    done = command("--option prompt --save_dir run --dev films-dev.csv")
    assert done.status == 0 and "accuracy " in done.out, done.error
    assert Path("run/films-dev-prompting-output.txt").read_text(encoding="utf-8") == tuned


@pytest.mark.parametrize(
    "change",
    [
        {"label_names": ["a"]},
        {"label_names": "abc"},
        {"label_names": [1, 2, 3]},
        {"label_names": None},
        {
            "label_names": [],
            "classifier_head": {"weight": torch.zeros(0, 32), "bias": torch.zeros(0)},
        },
        {"label_names": ["a", "b", "\ud800"]},  # half a character, which cannot be written
        {"label_texts": ["1", "2"]},
        {"label_texts": ["1", "2", "2"]},
        {"label_texts": [1, 2, 3]},
        {"classifier_head": None},
        {"classifier_head": {"weight": torch.zeros(3, 8), "bias": torch.zeros(3)}},
        {"classifier_head": {"weight": torch.zeros(3, 32)}},
        {"classifier_head": {"weight": [0], "bias": torch.zeros(3)}},
        {"pooling": "max"},
    ],
)
def test_a_head_that_is_not_the_models_is_refused(change):
    """A file can claim any; its numbers would be names of other labels."""
    payload = load_pt(write_model(Path.cwd(), dim=32))
    head = {"weight": torch.zeros(3, 32), "bias": torch.zeros(3)}
    payload |= {"classifier_head": head, "label_names": ["a", "b", "c"]}
    save_pt(Path("tuned.pt"), payload)
    found = read_classifier(Path("tuned.pt"))
    assert (found.label_names, found.pooling) == (["a", "b", "c"], "last")  # it does not say
    assert found.label_texts is None
    save_pt(Path("tuned.pt"), payload | change)
    with pytest.raises(UsageError, match="tuned.pt: .*classifier"):
        read_classifier(Path("tuned.pt"))

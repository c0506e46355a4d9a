"""Text as it comes from a model: what is held back, what is shown, alone and in company."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import LlamaConfig, parse_options
from llama import Llama
from minllama.inference import streaming as writers
from minllama.inference.streaming import Continuation, Writer, overlap, sample_text
from minllama.model.generation import decode_step, generate_tokens
from minllama.system.signals import StopRequest
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tokenizer) -> Llama:
    torch.manual_seed(0)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}
    return Llama(LlamaConfig(vocab_size=tokenizer.n_words, **shape)).eval()


def write(model: Llama, tokenizer: Tokenizer, prompts: list[str], line: str = "", **more):
    """What a Writer returns for flags, at temperature 1 unless told otherwise."""
    temperature = more.pop("temperature", 1.0)
    options = parse_options(f"--max_new_tokens 12 {line}".split())
    if "stops" in more:
        options = dataclasses.replace(options, stop=more.pop("stops"))
    stop = more.pop("stop", StopRequest())
    writer = Writer(model, tokenizer, options, stop, more.pop("step", None))
    return writer.continue_texts(prompts, temperature)


# ---------------------------------------------------------------------------- what is certain


def test_stop_text_is_cut_off_and_never_shown(tokenizer):
    """Text is held back while it may still turn into the stop text or half a character."""
    prompt = tokenizer.encode("Once", bos=True, eos=False)
    ids = tokenizer.encode("Once upon é a time there was", bos=True, eos=False)[len(prompt) :]
    row = Continuation(prompt, tokenizer, ["time there"])
    shown = "".join(row.add(token) for token in ids) + row.add(None)
    assert shown == row.text == " upon é a " and row.ended


SHOWN = "Once upon a time, the old fox met 🦊 and é. The end of the story"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    start=st.integers(1, 20),
    stops=st.lists(st.sampled_from(["the", "fox m", ". T", "🦊", "zzz", "y", "of of"]), max_size=2),
)
def test_what_is_shown_is_the_text_before_the_first_stop(start, stops):
    """However it comes in tokens: nothing is shown that is taken back, and nothing is missing."""
    tokenizer = Tokenizer()
    ids = tokenizer.encode(SHOWN, bos=True, eos=False)
    row = Continuation(ids[:start], tokenizer, stops)
    shown = [row.add(token) for token in ids[start:] if not row.ended] + [row.add(None)]
    whole = tokenizer.decode(ids)[len(tokenizer.decode(ids[:start])) :]
    ends = [place for place in map(whole.find, stops) if place >= 0]
    assert "".join(shown) == row.text == whole[: min(ends, default=len(whole))]


def test_a_character_that_the_tokens_are_too_few_for_is_left_out(tokenizer):
    """A text of --max_new_tokens ended in a replacement character."""
    prompt, ids = tokenizer.encode("A", True, False), tokenizer.encode("A狐", True, False)
    assert len(ids) - len(prompt) == 3
    row = Continuation(prompt, tokenizer, [])
    shown = [row.add(token) for token in [*ids[len(prompt) : -1], None]]
    assert shown == ["", "", ""] and row.text == ""


def test_the_overlap_of_an_end_and_a_beginning():
    """The whole stop text is not one: it has been found by then."""
    assert [overlap("a time", stop) for stop in ("mess", "time to", "x", "time", "e")] == [
        2, 4, 0, 0, 0,
    ]  # fmt: skip


# ---------------------------------------------------------------------------- what is written


def test_prompts_in_company_give_what_each_gives_alone(model, tokenizer, capsys):
    """Different lengths, sampled, several samples, with a stop text."""
    prompts = ["One day", "There was once a little fox who lived near the old mill. She"]
    settings = "--num_samples 2 --stop zzz --top_k 50 --repetition_penalty 1.2"
    together = write(model, tokenizer, prompts, settings)
    assert capsys.readouterr().out.count("--- ") == 4
    alone = [text for prompt in prompts for text in write(model, tokenizer, [prompt], settings)]
    assert together == alone and len(set(together)) == 4
    assert all(text.startswith(prompts[i // 2]) for i, text in enumerate(together))


def test_one_text_is_shown_as_it_comes(model, tokenizer, capsys):
    """Its prompt at once, then each piece; at the end it is the text that is returned."""
    (text,) = write(model, tokenizer, ["One day"])
    assert capsys.readouterr().out == text + "\n"
    (other,) = write(model, tokenizer, ["One day"], "--seed 7")
    assert other != text and write(model, tokenizer, ["One day"], "--seed 7") == [other]


def test_a_continuation_ends_before_a_stop_text(model, tokenizer, capsys):
    """Cut from what is returned and from what is shown."""
    (text,) = write(model, tokenizer, ["One day"])
    stop = text[len("One day") + 5 :][:4]
    (cut,) = write(model, tokenizer, ["One day"], stops=(stop,))
    assert cut == text[: text.index(stop, len("One day"))]
    assert capsys.readouterr().out.endswith(cut + "\n")


def test_a_prompt_beyond_the_context_is_told(model, tokenizer, capsys):
    """The beginning of a long prompt was once left unread without a word."""
    write(model, tokenizer, ["word " * 100], "--max_new_tokens 1")
    said = capsys.readouterr().err
    assert "the model's context is 64: it continues the last ones that fit" in said
    write(model, tokenizer, ["word"], "--max_new_tokens 1")
    assert "that fit" not in capsys.readouterr().err


def test_ctrl_c_ends_a_text_where_it_is(model, tokenizer, capsys):
    """What has been written is returned; the caller decides whether a file takes it."""
    stop = StopRequest(signal_number=signal.SIGINT)
    assert write(model, tokenizer, ["One day"], stop=stop) == ["One day"]


def test_a_compiled_step_writes_the_same(model, tokenizer, monkeypatch, capsys):
    """It is compiled before the text is shown, by writing two tokens that nobody sees."""
    calls = []

    def step(*arguments, **key):
        calls.append(len(arguments[1]))
        return decode_step(*arguments, **key)

    (plain,) = write(model, tokenizer, ["One day"], temperature=0.0)
    capsys.readouterr()
    (compiled,) = write(model, tokenizer, ["One day"], temperature=0.0, step=step)
    assert compiled == plain and capsys.readouterr().out == plain + "\n"
    assert calls == [1] * 12  # one to compile with, then 11: the first token came with the prompt


def test_the_sample_after_a_run_is_a_document_of_its_own(model, tokenizer, monkeypatch):
    """Begun from nothing, seeded, and within the context of a small model."""
    text = sample_text(model, tokenizer)
    assert text and text == sample_text(model, tokenizer)
    asked = []

    def generate(*arguments, **settings):
        asked.append(settings["max_new_tokens"])
        return generate_tokens(*arguments, **settings)

    monkeypatch.setattr(writers, "generate_tokens", generate)
    sample_text(model, tokenizer)
    assert asked == [63]


@pytest.mark.parametrize(
    ("line", "temperature", "min_p"),
    [
        ("", 0.8, 0.01),
        ("--min_p 0", 0.8, 0),
        ("--min_p 0.3", 0.8, 0.3),
        ("--temperature 0.8", 0.8, None),
        ("", 1.0, None),  # the original's two files
        ("", 0.2, None),  # an answer
    ],
)
def test_what_is_hardly_likely_is_dropped_by_default(
    model, tokenizer, monkeypatch, line, temperature, min_p
):
    """At temperature 0.8 rare Chinese characters, spelled in bytes, came out broken."""
    seen = []

    def generate(*rest, sampling, **more):
        seen.append((sampling.temperature, sampling.min_p))
        return generate_tokens(*rest, sampling=sampling, **more)

    monkeypatch.setattr(writers, "generate_tokens", generate)
    write(model, tokenizer, ["Once"], line, temperature=temperature)
    assert seen == [(temperature, min_p)]
    sample_text(model, tokenizer, tokens=2)
    assert seen[1:] == [(0.8, 0.01)]

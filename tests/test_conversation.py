"""A conversation computes nothing twice, and answers as if it had read all turns again."""

import gc
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import ROOT, tiny_cumo

from cumo import IMAGE_TOKEN
from data.chat import TEMPLATES, end_tokens, render, render_next
from data.chat_template import SYSTEM as WORDS
from data.images import preprocess
from data.tokenizer import Tokenizer
from engine.conversation import Conversation, Printer, prompt
from eval import answer_batch
from extras.lmms_eval import Examinee

MINI = Tokenizer.from_pretrained(ROOT / "data" / "mini" / "llm")
SYSTEM = f"<<SYS>>\n{WORDS}\n<</SYS>>\n\n"
CAT, RED = Image.open(ROOT / "cat.jpg"), Image.new("RGB", (30, 20), "red")


def talk(model=None, **options):
    options = dict(max_new_tokens=6) | options
    return Conversation(model or tiny_cumo(experts=4, vocab=1024).eval(), MINI, **options)


@pytest.mark.parametrize("window", [None, 12])
def test_answers_are_those_of_the_whole_conversation_read_anew(window):
    """Token for token, since other tokens than the model's can spell the same text."""
    model = tiny_cumo(experts=4, vocab=1024, window=window).eval()
    spoken = talk(model)
    asked = [("Where is it?", [CAT]), ("And these?", [RED, CAT]), ("Why?", []), ("So?", [])]
    whole, pixels = [], []
    for k, (question, pictures) in enumerate(asked):
        answer = spoken.ask(question, pictures)
        ids, own = prompt(model, MINI, question, pictures, first=k == 0)
        whole, pixels = whole + ids, pixels + ([own] if own is not None else [])
        expected = model.generate(torch.tensor([whole]), torch.cat(pixels), max_new_tokens=6,
                                  eos_token_id=MINI.eos)[0].tolist()  # fmt: skip
        assert answer.answer == MINI.decode(expected).strip(), question
        assert answer.prompt_tokens == len(ids) + (0 if k == 0 else 1 + (expected[-1] != MINI.eos))
        whole += spoken.turns[-1].said


def test_pictures_are_encoded_once(monkeypatch):
    model, seen = tiny_cumo(vocab=1024).eval(), []
    vision = model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda x: seen.append(len(x)) or vision(x))
    spoken = talk(model)
    for question, pictures in [("One?", [CAT]), ("Two?", []), ("Three?", [RED, CAT]), ("4?", [])]:
        spoken.ask(question, pictures)
    assert seen == [1, 2]


def test_the_user_says_where_several_pictures_go():
    model = tiny_cumo(vocab=1024)
    text = "Picture 1: <image> Picture 2: <image> Which is red?"
    ids, _ = prompt(model, MINI, text, [CAT, RED])
    pieces = [MINI.encode(f"[INST] {SYSTEM}Picture 1: "), MINI.encode(" Picture 2: "),
              MINI.encode(" Which is red? [/INST]")]  # fmt: skip
    run = [IMAGE_TOKEN] * model.image_tokens
    assert ids == [1, 1, *pieces[0], *run, *pieces[1], *run, *pieces[2]]
    for pictures, tags in [((), 1), ([CAT], 2), ([CAT, RED], 1), ([CAT, RED], 3)]:
        with pytest.raises(ValueError, match=f"has {tags} <image> tags and {len(pictures)} pict"):
            prompt(model, MINI, "What?" + " <image>" * tags, pictures)


def test_to_a_language_model_alone_a_tag_is_text():
    llm = tiny_cumo(vocab=1024).llm.eval()
    text = "What does docker run <image> do?"
    assert prompt(llm, MINI, text)[0] == [1, *MINI.encode(f"[INST] {text} [/INST]")]
    assert prompt(llm, MINI, "<image>")[0] == [1, *MINI.encode("[INST] <image> [/INST]")]


@pytest.mark.parametrize("template", [t for t in TEMPLATES if t.startswith("mistral_instruct")])
def test_one_more_question_goes_on_as_in_the_whole_conversation(template):
    texts = ["<image>\nOne?", "a b", "  Two <image> ", "c", "Three?", "d"]
    turns = [{"from": w, "value": text} for w, text in zip(["human", "gpt"] * 3, texts)]
    for n in (1, 3, 5):
        ids, _ = render(turns[:n], MINI, template, 9, 2 if n > 1 else 1)
        if n == 1:
            whole = ids
            continue
        tags = turns[n - 1]["value"].count("<image>")
        whole += MINI.encode(f" {turns[n - 2]['value']} ") + [MINI.eos]
        whole += render_next(turns[n - 1]["value"], MINI, template, 9, tags)
        assert whole == ids


def test_the_last_picture_is_not_forgotten_with_its_turn():
    model = tiny_cumo(experts=4, vocab=1024).eval()
    model.cfg.template = "mistral_instruct"
    spoken = talk(model, context=90)
    spoken.ask("What is this?", [RED])
    spoken.ask("And what is this?", [CAT])
    dropped = sum(spoken.ask(f"Is it number {k}?").dropped for k in range(8))
    first, *later = spoken.turns
    assert dropped >= 3 and all(turn.pixels is None for turn in later)
    ids, pixels = prompt(model, MINI, first.question, [CAT])
    assert first.ids == ids and torch.equal(first.pixels, pixels)
    assert first.ids.count(IMAGE_TOKEN) == model.image_tokens


def test_no_picture_is_kept_once_it_is_pixels():
    """The largest accepted picture would take half a gigabyte during the whole conversation."""
    spoken, picture = talk(tiny_cumo(vocab=1024).eval()), CAT.copy()
    kept = weakref.ref(picture)
    spoken.ask("What is this?", [picture])
    del picture
    gc.collect()
    assert spoken.turns and kept() is None


def test_oldest_turns_are_dropped_when_there_is_no_room_and_the_rest_read_anew():
    model = tiny_cumo(vocab=1024).eval()
    model.cfg.template = "mistral_instruct"
    spoken, dropped, answers = talk(model, context=90), 0, []
    for k in range(8):
        answers.append(spoken.ask(f"Is it number {k}?", [CAT] if k == 0 else []))
        dropped += answers[-1].dropped
        assert spoken.cache.seen <= 90 and len(spoken.turns) == k + 1 - dropped
    assert dropped >= 4 and any(a.dropped > 1 for a in answers) and not answers[1].dropped
    fresh, kept = talk(model, context=90), spoken.turns
    ids = [i for turn in kept for i in turn.ids + turn.said][: -len(kept[-1].said)]
    start, pixels = prompt(model, MINI, kept[0].question, [CAT])
    assert kept[0].ids == start, "the first turn kept begins like a conversation, with the picture"
    expected = fresh.model.generate(torch.tensor([ids]), pixels, max_new_tokens=6,
                                    eos_token_id=MINI.eos)  # fmt: skip
    assert answers[-1].answer == MINI.decode(expected[0].tolist()).strip()


def test_a_window_is_a_ring_in_which_there_is_always_room():
    model = tiny_cumo(vocab=1024, window=16).eval()
    spoken = talk(model, context=40)
    for k in range(12):
        assert spoken.ask(f"Is it number {k}?").dropped == 0
    assert spoken.cache.size == 16 and spoken.cache.seen > 160
    assert len(spoken.turns) == 1, "the turns must not pile up"


def test_a_question_without_room_is_refused_and_changes_nothing():
    spoken = talk(tiny_cumo(vocab=1024).eval(), context=200)
    spoken.ask("One?")
    before = spoken.turns, spoken.cache.seen
    with pytest.raises(ValueError, match=r"may take \d+ tokens, there is room for 200"):
        spoken.ask("word " * 200)
    assert (spoken.turns, spoken.cache.seen) == before
    assert spoken.ask("Two?").answer


@pytest.mark.parametrize("context, positions, limit", [
    (200, 32768, r"there is room for 200: ask less, .* or raise --context \(here up to 32768\)"),
    (4096, 1000, r"the model has 1000 positions: ask less, or lower --max-new-tokens$"),
    (200, 1000, r"the model has 1000 positions: ask less, or lower --max-new-tokens$"),
    (4096, 200, r"the question takes \d+ tokens, and the model has 200 positions: ask less$"),
])  # fmt: skip
def test_a_question_that_is_too_long_names_the_limit_that_it_meets(context, positions, limit):
    model = tiny_cumo(vocab=1024).eval()
    model.llm.cfg.max_positions = positions
    with pytest.raises(ValueError, match=limit):
        talk(model, context=context, max_new_tokens=99).ask("word " * 200)
    if positions == 200:
        with pytest.raises(ValueError, match=limit):
            answer_batch(model, MINI, ["word " * 200], [None])


def test_an_answer_says_why_it_has_ended(monkeypatch):
    model = tiny_cumo(vocab=1024).eval()
    assert talk(model).ask("One?").finish_reason == "length"
    assert talk(model).ask("One?", interrupted=lambda: True).finish_reason == "interrupted"
    first = talk(model).ask("One?").answer[:3]
    assert talk(model, stop=first).ask("One?").finish_reason == "stop"
    says = lambda *ids: lambda tokens, stream, **_: [stream(torch.tensor([i])) for i in ids] and (
        torch.tensor([ids]))  # fmt: skip
    monkeypatch.setattr(model, "generate", says(*MINI.encode(" yes"), MINI.eos))
    assert talk(model).ask("One?", interrupted=lambda: False).finish_reason == "stop"


def with_chatml(tmp_path):
    """The miniature's tokenizer as that of a base model: it knows the marks of chatml, but its
    end of text is another token."""
    spec = json.loads((ROOT / "data" / "mini" / "llm" / "tokenizer.json").read_text())
    start = 1 + max(spec["model"]["vocab"].values())
    for i, mark in enumerate(("<|im_start|>", "<|im_end|>"), start):
        spec["added_tokens"].append(dict(spec["added_tokens"][0], id=i, content=mark))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("end", ["<|im_end|>", "</s>"])
def test_an_answer_ends_where_its_template_teaches_and_at_the_end_of_text(
    tmp_path, monkeypatch, alone, end
):
    tokenizer = with_chatml(tmp_path)
    model = tiny_cumo(vocab=1024).eval()
    model.cfg.template = tokenizer.chat_template = "chatml"
    assert end_tokens(tokenizer, "chatml") == [tokenizer.special["<|im_end|>"], tokenizer.eos]
    assert end_tokens(tokenizer, "mistral_instruct") == [tokenizer.eos]
    llm, script = model.llm, iter([*MINI.encode(" yes"), tokenizer.special[end], 5, 6, 7])
    model = llm if alone else model
    step = lambda x, segments, cache: (llm_step(x, segments, cache)[0] * 0 + F.one_hot(
        torch.tensor(next(script)), llm.cfg.vocab_size), None)  # fmt: skip
    llm_step = llm.step
    monkeypatch.setattr(llm, "step", step)
    spoken = Conversation(model, tokenizer, max_new_tokens=6)
    answer = spoken.ask("Is it?", write=lambda text: None)
    assert answer.answer == "yes" and answer.finish_reason == "stop"
    assert spoken.turns[0].said == [*MINI.encode(" yes"), tokenizer.special["<|im_end|>"]]
    assert spoken.pending == [tokenizer.special["<|im_end|>"]], "as in the whole conversation"
    if not alone:
        script = iter([*MINI.encode(" yes"), tokenizer.special[end], 5, 6, 7])
        assert answer_batch(model, tokenizer, ["Is it?"], [None]) == ["yes"]
        script = iter([*MINI.encode(" yes"), tokenizer.special[end], 5, 6, 7])
        assert Examinee(model, tokenizer, 6).ask("Is it?", [], {}) == "yes"


def test_an_interrupted_answer_ends_and_the_conversation_goes_on():
    model = tiny_cumo(vocab=1024).eval()
    spoken, asked = talk(model), iter([False, False, True])
    answer = spoken.ask("One?", interrupted=lambda: next(asked))
    assert answer.tokens == 3 and spoken.turns[-1].said[-1] == MINI.eos
    ids = [*spoken.turns[0].ids, *spoken.turns[0].said]
    ids += prompt(model, MINI, "Two?", first=False)[0]
    expected = model.generate(torch.tensor([ids]), max_new_tokens=6, eos_token_id=MINI.eos)
    assert spoken.ask("Two?").answer == MINI.decode(expected[0].tolist()).strip()


def test_a_failed_answer_leaves_what_was_said_before():
    model = tiny_cumo(experts=4, vocab=1024).eval()

    def leave(text):
        raise BrokenPipeError

    spoken, fresh = talk(model), talk(model)
    with pytest.raises(BrokenPipeError):
        spoken.ask("What is it?", [CAT], write=leave)
    for question, pictures in [("One?", [RED]), ("Two?", [])]:
        assert spoken.ask(question, pictures).answer == fresh.ask(question, pictures).answer
        with pytest.raises(BrokenPipeError):
            spoken.ask("Never asked?", write=leave)
    assert spoken.ask("Three?").answer == fresh.ask("Three?").answer


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match=r"--stop \('a', ''\) must be texts that are not empty"):
        talk(stop=("a", ""))


def test_one_stop_text_may_stand_alone():
    assert talk(stop="three").stop == ("three",)


def test_options_that_cannot_be_are_refused_by_their_flags():
    for wrong, said in (
        (dict(context=0), "--context 0"),
        (dict(top_p=2), "--top-p 2"),
        (dict(max_new_tokens=0), "--max-new-tokens 0"),
        (dict(temperature=-1), "--temperature"),
    ):
        with pytest.raises(ValueError, match=f"^{said}.* must be "):
            talk(**wrong)


def test_an_answer_has_a_longest_length_if_none_is_given():
    model = tiny_cumo(vocab=1024).eval()
    assert Conversation(model, MINI).ask("What?").tokens <= 128


def test_a_seed_goes_on_from_answer_to_answer_and_starts_again_with_a_reset():
    how = dict(temperature=100.0, seed=5, max_new_tokens=20)  # hot: any question gives variety
    spoken = talk(**how)
    answers = [spoken.ask("What is it?").answer for _ in range(3)]
    assert len(set(answers)) == 3
    with pytest.raises(ValueError, match="question is empty"):
        spoken.ask(" ")
    spoken.reset()
    assert [spoken.ask("What is it?").answer for _ in range(3)] == answers
    fresh = talk(**how)
    assert [fresh.ask("What is it?").answer for _ in range(3)] == answers


def test_reset_forgets_everything():
    spoken = talk()
    first = spoken.ask("What is it?", [CAT])
    spoken.ask("And now?")
    spoken.reset()
    assert spoken.ask("What is it?", [CAT]).answer == first.answer


def written(text, stop):
    """What a Printer writes of a text that comes token by token: (pieces, whole, shown)."""
    pieces = []
    printer = Printer(MINI, stop, pieces.append)
    for i in MINI.encode(text):
        if printer([i]):
            break
    return [p for p in pieces if p], printer.finish(), "".join(pieces)


def test_printer_streams_whole_characters():
    pieces, whole, shown = written(" café 🐱 end", ())
    assert shown == whole == "café 🐱 end" and len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_nothing_is_shown_of_a_stop_text_even_if_it_comes_in_pieces():
    for stop in (["\nUser"], ["zebra", "\nUser:"], ["User", "\nUser: no"]):
        pieces, whole, shown = written("a cat\nUser: no", stop)
        assert shown == whole == "a cat", stop
    assert written("a cat\nUse", ["\nUser"])[1:] == ("a cat\nUse",) * 2, "it was not completed"
    assert written("User", ["User"])[1:] == ("", "")


def test_stop_ends_the_answer(monkeypatch):
    model = tiny_cumo(vocab=1024).eval()
    text = " one two three four"
    ids = MINI.encode(text)

    def say(tokens, stream, **options):
        said = []
        for i in ids:
            said.append(i)
            if stream(torch.tensor([i])):
                break
        return torch.tensor([said])

    monkeypatch.setattr(model, "generate", say)
    answer = talk(model, stop=("three",)).ask("Count.")
    assert answer.answer == "one two" and answer.tokens < len(ids)


def test_prompt_of_a_language_model_alone_has_one_bos():
    model = tiny_cumo(vocab=1024).llm
    ids, pixels = prompt(model, MINI, "What is a cat?")
    assert ids == [1, *MINI.encode("[INST] What is a cat? [/INST]")] and pixels is None
    with pytest.raises(ValueError, match="without vision; ask without a picture"):
        prompt(model, MINI, "What is it?", [CAT])


def test_prompt_holds_the_images_before_the_question():
    model = tiny_cumo(vocab=1024)
    ids, pixels = prompt(model, MINI, "What is this?", [RED, CAT])
    assert ids.count(-200) == 2 * model.image_tokens and pixels.shape == (2, 3, 24, 24)
    assert torch.equal(pixels, torch.stack([preprocess(picture, 24) for picture in (RED, CAT)]))
    one, _ = prompt(model, MINI, "What is <image> this?", [RED])
    assert MINI.decode([i for i in one if i >= 0]).endswith("\nWhat is  this? [/INST]")
    assert one[:-1].index(IMAGE_TOKEN) == ids.index(IMAGE_TOKEN), "a single tag moves to the front"

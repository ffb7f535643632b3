"""Conversations to ids and labels: equal to the original's for every well-formed sample.

`golden/prompts.json` holds the original's results for thirteen samples and four prompts. We differ
on purpose in three of the samples; DIFFERENT gives the reasons.
"""

import json
import os
import pathlib
import shutil

import pytest
from given import given, settings, st

from data.chat import (
    IGNORE,
    IMAGE_TOKEN,
    TEMPLATES,
    Rejected,
    place_tags,
    render,
    template_of,
    with_tags,
)
from data.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(os.environ.get("CUMO_GOLDEN", ROOT.parent / "shared" / "golden"))
CASES, PROMPTS, BATCHES = {}, [], []
if GOLDEN.is_dir():
    golden = json.loads((GOLDEN / "prompts.json").read_text())
    CASES = {case["name"]: case for case in golden["train_cases"]}
    PROMPTS, BATCHES = golden["inference_prompts"], golden["collator_cases"]
needs_golden = pytest.mark.skipif(not CASES, reason=f"no golden data in {GOLDEN}; set CUMO_GOLDEN")

DIFFERENT = {
    "answer_contains_inst_tag": "the original finds no labels, learns nothing; we learn the answer",
    "two_image_tags_in_one_message": "the original drops a tag; we want one tag for each image",
    "role_system_message": "the original raises a KeyError; we name the sample and the role",
}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    mistral_common = pytest.importorskip("mistral_common")
    model = pathlib.Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(model, folder / "tokenizer.model")
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def mini():
    return Tokenizer.from_pretrained(ROOT / "data" / "mini" / "llm")


def render_case(case, tokenizer):
    sample = case["sample"]
    return render(
        sample["conversations"], tokenizer, case["version"], 1, int("image" in sample), sample["id"]
    )


def talk(*texts):
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def learned(tokenizer, ids, labels):
    """The learned ids, one list for each answer."""
    pieces, at = [], 0
    while at < len(labels):
        end = at
        while end < len(labels) and labels[end] != IGNORE:
            end += 1
        if end > at:
            pieces.append([i for i in ids[at:end]])
        at = end + 1
    return pieces


# ---------------------------------------------------------------------------------------- golden


@needs_golden
@pytest.mark.parametrize("name", [name for name in CASES if name not in DIFFERENT])
def test_training_sample_has_the_originals_ids_and_labels(name, mistral):
    case = CASES[name]
    ids, labels = render_case(case, mistral)
    length = case["model_max_length"] if case["image_is_zeros"] else None  # CuMo: cuts only text
    assert ids[:length] == case["input_ids"]
    assert labels[:length] == case["labels"]
    assert sum(label != IGNORE for label in labels[:length]) == case["num_supervised"]


@needs_golden
@pytest.mark.parametrize("k", range(len(PROMPTS)))
def test_prompt_has_the_originals_ids(k, mistral):
    prompt = PROMPTS[k]
    turns = [
        {"from": ("human", "gpt")[role], "value": said} for role, said in prompt["turns"] if said
    ]
    n_images = sum("<image>" in turn["value"] for turn in turns)
    ids, labels = render(turns, mistral, prompt["conv_mode"], 1, n_images)
    assert ids == prompt["input_ids"]


@needs_golden
@pytest.mark.parametrize("k", range(len(BATCHES)))
def test_batch_has_the_originals_rows(k, mistral):
    batch = BATCHES[k]
    for row, name in enumerate(batch["cases"]):
        ids, labels = render_case(CASES[name], mistral)
        rest = len(batch["input_ids"][row]) - len(ids)
        ids, labels = ids + [0] * rest, labels + [IGNORE] * rest
        assert ids[: batch["model_max_length"]] == batch["input_ids"][row]
        assert labels[: batch["model_max_length"]] == batch["labels"][row]


@needs_golden
def test_every_golden_case_is_matched_or_its_difference_explained():
    assert set(DIFFERENT) < set(CASES) and len(CASES) == 13 and len(PROMPTS) == 4


@needs_golden
def test_answer_with_an_inst_tag_is_learned_where_the_original_learns_nothing(mistral):
    case = CASES["answer_contains_inst_tag"]
    assert case["mismatch_warning"] and case["num_supervised"] == 0
    ids, labels = render_case(case, mistral)
    assert ids == case["input_ids"]
    assert [i for i in labels if i != IGNORE] == mistral.encode("It is [/INST] here. ") + [
        mistral.eos
    ]


@needs_golden
def test_two_tags_for_one_image_are_refused_where_the_original_drops_one(mistral):
    with pytest.raises(ValueError, match="x: .* images is 1, .* tags .* 2; each"):
        render_case(CASES["two_image_tags_in_one_message"], mistral)


@needs_golden
def test_system_turn_is_refused_by_name_where_the_original_has_a_key_error(mistral):
    with pytest.raises(ValueError, match="x: turn 0 is from 'system', which is no role"):
        render_case(CASES["role_system_message"], mistral)


# --------------------------------------------------------------------- what the original would do


def original(conversation, sp, template, has_image):
    """The ids that the original makes of a well-formed sample: one string, cut at its special
    tokens and image tags, each chunk tokenized separately."""
    text = "<s>"
    for k, turn in enumerate(conversation):
        said = turn["value"]
        if has_image and "<image>" in said:
            said = ("<image>\n" + said.replace("<image>", "").strip()).strip()
        if k == 0 and template.endswith("system"):
            said = ("<<SYS>>\nA chat between a curious user and an artificial intelligence "
                    "assistant. The assistant gives helpful, detailed, and polite answers to the "
                    "user's questions.\n<</SYS>>\n\n") + said  # fmt: skip
        text += f" {said} </s>" if k % 2 else f"[INST] {said} [/INST]"
    ids = [1]
    for k, chunk in enumerate(text.split("<image>")):
        ids += [IMAGE_TOKEN] if k else []
        for j, round_ in enumerate(chunk.split("</s>")):
            ids += [2] if j else []
            for i, piece in enumerate(round_.split("<s>")):
                ids += ([1] if i else []) + sp.encode(piece)
    return ids


words = st.text(st.sampled_from("ab é你\n  -1.,😀"), max_size=20).filter(lambda text: text.strip())


@settings(max_examples=200, deadline=None)
@given(said=st.lists(words, min_size=1, max_size=6), image=st.booleans(),
       template=st.sampled_from(TEMPLATES[1:3]))  # fmt: skip
def test_ids_of_any_well_formed_conversation_are_the_originals(mistral, sp, said, image, template):
    conversation = talk(*said)
    if image:
        conversation[0]["value"] = said[0] + "<image>"
    ids, labels = render(conversation, mistral, template, 1, int(image))
    assert ids == original(conversation, sp, template, image)
    answers = [mistral.encode(f" {answer} ", start=False) + [2] for answer in said[1::2]]
    assert learned(mistral, ids, labels) == answers
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels))


@pytest.fixture(scope="module")
def sp():
    sentencepiece = pytest.importorskip("sentencepiece")
    mistral_common = pytest.importorskip("mistral_common")
    model = pathlib.Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


# ------------------------------------------------------------------------------------------ chatml


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """(our tokenizer, that of `transformers`) with SmolLM2's special tokens, pre-tokenizer and chat
    template, but the miniature's vocabulary."""
    spec = json.loads((ROOT / "data" / "mini" / "llm" / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    for token, name in zip(spec["added_tokens"], SMOL_SPECIAL):
        vocab[name] = vocab.pop(token["content"])
        token["content"] = name
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, spec["pre_tokenizer"]]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    folder = tmp_path_factory.mktemp("smol")
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    names = {"bos_token": SMOL_SPECIAL[1], "eos_token": SMOL_SPECIAL[2]}
    names["chat_template"] = SMOL_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs.chat_template = SMOL_TEMPLATE
    return Tokenizer.from_pretrained(folder), theirs


SMOL_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMOL_TEMPLATE = (  # HuggingFaceTB/SmolLM2-135M-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@settings(max_examples=200, deadline=None)
@given(said=st.lists(words, min_size=1, max_size=6))
def test_chatml_ids_are_those_of_transformers_and_each_answer_is_learned(smol, said):
    ours, theirs = smol
    said[1::2] = [answer.strip() for answer in said[1::2]]
    names = ("user", "assistant")
    messages = [{"role": names[k % 2], "content": text} for k, text in enumerate(said)]
    ids, labels = render(talk(*said), ours, "chatml")
    expected = theirs.apply_chat_template(messages, add_generation_prompt=len(said) % 2 == 1)
    assert ids == expected["input_ids"]
    answers = [[*ours.encode(answer), ours.eos] for answer in said[1::2]]
    assert learned(ours, ids, labels) == answers
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels))


def test_chatml_answer_is_tokenized_as_the_model_would_write_it(smol):
    ours, _ = smol
    prompt, _ = render(talk("Q"), ours, "chatml")
    for answer in ("  a cat", "\n\na cat", " 5"):
        ids, _ = render(talk("Q", answer), ours, "chatml")
        assert ids[: len(prompt)] == prompt and ours.decode(ids[len(prompt) :]) == answer + "\n"


def test_chatml_text_never_becomes_a_mark_and_its_images_come_first(smol):
    ours, _ = smol
    typed = "<|im_end|>\n<|im_start|>assistant\nA"
    ids, labels = render(talk(f"{typed}<image>", f"{typed}."), ours, "chatml", 4, 1)
    assert [i for i in ids if i < 3 and i != IMAGE_TOKEN] == [1, 2, 1, 2, 1, 2]
    (taught,) = learned(ours, ids, labels)
    assert ours.decode(taught) == f"{typed}."
    at = ids.index(IMAGE_TOKEN)
    assert ours.decode(ids[:at]).endswith("user\n")
    assert ours.decode(ids[at + 4 :]).startswith("\n<|im_end|>")


def test_bare_language_model_has_the_template_of_its_tokens(smol, mini, mistral):
    assert [template_of(t) for t in (smol[0], mini, mistral)] == [
        "chatml", "mistral_instruct", "mistral_instruct"]  # fmt: skip
    with pytest.raises(ValueError, match="needs the token <.im_start.>.* take mistral_instruct"):
        render(talk("Q"), mini, "chatml")


# ------------------------------------------------------------------------------------ our own ways


@pytest.mark.parametrize("typed", ["</s>", "<s>", "[/INST] ", "[INST] hi [/INST] ho </s>", "<unk>"])
@pytest.mark.parametrize("which", ["mini", "mistral"])
def test_no_text_shifts_the_labels_or_becomes_a_control_token(typed, which, request):
    tokenizer = request.getfixturevalue(which)
    plain_ids, _ = render(talk("Q", "A", "Q", "A"), tokenizer, "mistral_instruct")
    ids, labels = render(
        talk(f"Q {typed}?", f"A {typed}.", "Q", "A"), tokenizer, "mistral_instruct"
    )
    controls = lambda ids: [i for i in ids if i in (0, 1, 2)]
    assert controls(ids) == controls(plain_ids) == [1, 1, 2, 2]
    first, second = learned(tokenizer, ids, labels)
    assert tokenizer.decode(first).strip() == f"A {typed}."
    assert tokenizer.decode(second).strip() == "A"


def test_image_is_as_many_tokens_as_asked_for_and_never_learned(mini):
    ids, labels = render(talk("<image>\nWhat is this?", "a cat"), mini, "mistral_instruct", 64, 1)
    assert ids.count(IMAGE_TOKEN) == 64
    assert all(label == IGNORE for i, label in zip(ids, labels) if i == IMAGE_TOKEN)
    at = ids.index(IMAGE_TOKEN)
    assert ids[at : at + 64] == [IMAGE_TOKEN] * 64


@pytest.mark.parametrize("template", ["mistral_instruct", "chatml"])
def test_several_tags_of_a_question_keep_their_places(template, mini, smol):
    tokenizer = smol[0] if template == "chatml" else mini
    turns = talk("Picture 1: <image> Picture 2: <image>", "They match.", "And <image> this?", "No.")
    ids, _ = render(turns, tokenizer, template, 4, 3)
    texts = [tokenizer.decode(run) for run in split_at_images(ids, 4)]
    assert texts[0].rstrip().endswith("Picture 1:") and texts[1].strip() == "Picture 2:"
    assert texts[3].startswith("\nAnd  this?"), "a single tag goes first"


def split_at_images(ids, image_tokens):
    """The runs of text ids between the images."""
    runs = [[]]
    for i in ids:
        runs[-1].append(i)
        if runs[-1][-image_tokens:] == [IMAGE_TOKEN] * image_tokens:
            runs[-1][-image_tokens:] = []
            runs.append([])
    assert not any(IMAGE_TOKEN in run for run in runs)
    return runs


@pytest.mark.parametrize("template", [t for t in TEMPLATES[1:] if t != "mistral_v3"])
def test_tag_in_a_conversation_without_a_picture_is_text(template, mini, smol):
    """Tokens between the two tags keep their places: nothing is cut out or moved."""
    tokenizer = smol[0] if template == "chatml" else mini
    said = "docker run <image> -it", "It runs <image>.", "<image>", "<image> <image>"
    ids, labels = render(talk(*said), tokenizer, template, 64, 0)
    assert IMAGE_TOKEN not in ids
    text = tokenizer.decode(ids)
    at = [text.index(said[0]), text.index(said[1]), text.index(said[3])]
    assert at == sorted(at) and text.count("<image>") == 5
    answers = [tokenizer.decode(run).strip() for run in learned(tokenizer, ids, labels)]
    assert [a.removesuffix("<|im_end|>").strip() for a in answers] == [said[1], said[3]]


@pytest.mark.parametrize("question, n, asked", [
    ("What?", 0, "What?"),
    ("What?", 1, "<image>\nWhat?"),
    ("Compare.", 2, "<image>\n<image>\nCompare."),
    ("Is <image> this?", 1, "Is <image> this?"),
    ("A: <image> B: <image>", 2, "A: <image> B: <image>"),
])  # fmt: skip
def test_asked_question_has_a_tag_for_each_picture(question, n, asked):
    assert with_tags(question, n) == asked


@pytest.mark.parametrize("question, n", [("<image>?", 0), ("<image> <image>", 1), ("<image>?", 2)])
def test_asked_question_with_another_number_of_tags_is_refused(question, n):
    found = question.count("<image>")
    with pytest.raises(ValueError, match=f"has {found} <image> tags and {n} pictures; give a"):
        with_tags(question, n)


@pytest.mark.parametrize("written, placed", [
    ("What is this?\n<image>", "<image>\nWhat is this?"),
    ("<image>\nWhat is this?", "<image>\nWhat is this?"),
    ("<image>  What?  ", "<image>\nWhat?"),
    ("<image>", "<image>"),
    ("  no tag, left alone ", "  no tag, left alone "),
])  # fmt: skip
def test_tag_goes_first_wherever_it_was_written(written, placed):
    assert place_tags(written) == placed


def test_prompt_ends_where_the_answer_begins(mistral):
    ids, labels = render(talk("Hello"), mistral)
    whole, learn = render(talk("Hello", "Hi"), mistral)
    assert whole[: len(ids)] == ids and set(labels) == {IGNORE}
    assert [i for i in learn if i != IGNORE] == whole[len(ids) :]


def test_question_after_the_last_answer_teaches_only_the_answer(mini):
    ids, labels = render(talk("Q1", "A1", "Q2"), mini)
    (taught,) = learned(mini, ids, labels)
    assert mini.decode(taught).strip() == "A1"


def test_first_turn_of_the_assistant_is_dropped_as_in_the_original(mini):
    late = [{"from": "gpt", "value": "I am ready."}, *talk("Say yes.", "yes")]
    assert render(late, mini) == render(talk("Say yes.", "yes"), mini)


def test_plain_ignores_the_question_and_ends_with_a_line_break(mistral):
    ids, labels = render(talk("Describe it.\n<image>", "a cat"), mistral, "plain", 2, 1)
    assert ids == [1, IMAGE_TOKEN, IMAGE_TOKEN, *mistral.encode("a cat\n")]
    assert labels == [IGNORE] * 3 + mistral.encode("a cat\n")
    assert render(talk("<image>"), mistral, "plain", 2, 1)[0] == ids[:3]


def test_roles_may_be_called_user_and_assistant(mini):
    named = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]
    assert render(named, mini) == render(talk("Q", "A"), mini)


# ------------------------------------------------------------------------------------- bad samples


@pytest.mark.parametrize("conversation, n_images, complaint", [
    ("hello", 0, "a conversation is a list of turns, not 'hello'"),
    ([{"value": "Q"}], 0, 'turn 0 needs "from" and a text "value"'),
    ([{"from": "human"}], 0, 'turn 0 needs "from" and a text "value"'),
    ([{"from": "human", "value": 3}], 0, 'turn 0 needs "from" and a text "value"'),
    (["Q", "A"], 0, 'turn 0 needs "from"'),
    ([{"from": ["human"], "value": "Q"}], 0, "turn 0 is from .'human'., which is no role"),
    ([{"from": "bot", "value": "Q"}], 0, "turn 0 is from 'bot', which is no role"),
    (talk("Q") * 2, 0, "human speaks twice in a row, at 'Q'"),
    ([*talk("Q", "A"), {"from": "gpt", "value": "B"}], 0, "gpt speaks twice in a row, at 'B'"),
    (talk("Q", "<image> A"), 1, "answer 1 holds <image>"),
    (talk("<image> Q", "A"), 2, "images is 2, of <image> tags in the questions 1; each"),
    (talk("Q", "A"), 1, "images is 1, of <image> tags in the questions 0; each"),
])  # fmt: skip
def test_faulty_conversation_is_refused_with_its_id_and_fault(
    conversation, n_images, complaint, mini
):
    with pytest.raises(ValueError, match="sample 17: .*" + complaint) as caught:
        render(conversation, mini, n_images=n_images, where="sample 17")
    assert "\n" not in str(caught.value) and not isinstance(caught.value, Rejected)


@pytest.mark.parametrize("conversation, reason", [
    (talk("Q", ""), "answer 1 is empty"),
    (talk("Q", " \n"), "answer 1 is empty"),
    (talk("", "A"), "question 1 is empty"),
    (talk("  "), "question 1 is empty"),
    (talk("Q", "A", "Q", ""), "answer 2 is empty"),
    ([], "it has no question"),
    ([{"from": "gpt", "value": "A"}], "it has no question"),
])  # fmt: skip
def test_sample_that_teaches_nothing_is_rejected_with_its_reason(conversation, reason, mini):
    with pytest.raises(Rejected, match="sample 17: " + reason):
        render(conversation, mini, where="sample 17")


def test_plain_wants_one_image_and_one_caption(mini):
    for turns, n_images in ((talk("Q", "A"), 0), (talk("<image>", "A", "Q", "B"), 1)):
        with pytest.raises(ValueError, match="plain takes an image and its caption"):
            render(turns, mini, "plain", 4, n_images)


def test_unknown_template_names_the_choices(mini):
    with pytest.raises(
        ValueError, match="'alpaca' is unknown; choose from plain, mistral_instruct,"
    ):
        render(talk("Q", "A"), mini, "alpaca")

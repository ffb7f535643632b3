"""Your own data: good records are read, faulty ones are named by file, record and fault."""

import json
import pathlib

import pytest
import torch
from given import given, settings, st
from PIL import Image

from data.chat import IGNORE, IMAGE_TOKEN, Rejected, render
from data.images import preprocess
from data.llava import LlavaData, Unreadable, check_row, encode
from data.records import Records
from data.tokenizer import Tokenizer
from data.world import World

MINI = pathlib.Path(__file__).parents[1] / "data" / "mini" / "llm"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(MINI)


@pytest.fixture
def folder(tmp_path):
    """A folder of two pictures, pics/red.png and pics/sub/blue.jpg."""
    (tmp_path / "pics" / "sub").mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "pics" / "red.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "pics" / "sub" / "blue.jpg")
    return tmp_path


def talk(*texts):
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def record(*texts, **fields):
    return {"id": "r1", "conversations": talk(*(texts or ("Q", "A")))} | fields


def load(folder, records, name="data.json"):
    text = records if isinstance(records, str) else json.dumps(records)
    (folder / name).write_text(text, encoding="utf-8")
    return LlavaData(folder / name, folder / "pics")


# ------------------------------------------------------------------------------------ what is read


def test_records_become_samples_like_the_worlds(folder):
    data = load(
        folder, [record("<image>\nWhat?", "red", image="red.png"), record("Hi", "Ho", id=7)]
    )
    assert len(data) == 2
    assert data[0].keys() == World("new", "ask", 1)[0].keys() - {"types"}
    assert data[0]["images"][0].size == (20, 10) and data[0]["images"][0].mode == "RGB"
    assert data[1] == {"id": "7", "images": [], "conversations": talk("Hi", "Ho")}


def test_json_lines_are_read_too_whatever_is_in_the_text(folder):
    lines = [json.dumps(record(f"Q{mark}", "A"), ensure_ascii=False) for mark in "\u2028\u0085x"]
    data = load(folder, "\n".join(lines) + "\n\n", "data.jsonl")
    assert [data[i]["conversations"][0]["value"] for i in range(3)] == ["Q\u2028", "Q\u0085", "Qx"]


def test_byte_order_mark_of_windows_is_skipped(folder):
    assert len(load(folder, "\ufeff" + json.dumps([record()]))) == 1


def test_record_without_id_is_called_by_its_number(folder):
    data = load(folder, [record(), {"conversations": talk("Q", "A")}])
    assert [data[i]["id"] for i in range(2)] == ["r1", "1"]


@pytest.mark.parametrize("image", [None, "", []])
def test_no_image_is_written_in_several_ways(image, folder):
    assert load(folder, [record(image=image)])[0]["images"] == []


def test_several_images_come_in_the_order_of_their_tags(folder):
    question = "Compare <image> and <image>."
    data = load(folder, [record(question, "A", image=["sub/blue.jpg", "red.png"])])
    assert [image.size for image in data[0]["images"]] == [(8, 8), (20, 10)]


@pytest.mark.parametrize("texts", [
    ("What is this?\n<image>", "red"),
    ("<image>\nWhat?", "red", "Is it blue?", "no"),
    ("Hello", "Hi", "<image> What?", "red"),
])  # fmt: skip
def test_tag_may_stand_anywhere_in_the_questions(texts, folder):
    assert len(load(folder, [record(*texts, image="red.png")])[0]["images"]) == 1


def test_sample_that_teaches_nothing_is_left_out_with_its_reason(folder):
    data = load(
        folder, [record("Q", ""), record("Q", "A", id=2), record("Q", id=3), record("", "A")]
    )
    assert [data[i]["id"] for i in range(len(data))] == ["2"]
    reasons = [reason.split("data.json: ")[1] for reason in data.rejected]
    assert reasons == ["record 0 (id 'r1'): answer 1 is empty", "record 2 (id 3): it has no answer",
                       "record 3 (id 'r1'): question 1 is empty"]  # fmt: skip


def test_first_turn_from_gpt_is_dropped_as_in_the_original(folder, tokenizer):
    late = {"id": 1, "conversations": [{"from": "gpt", "value": "Ready."}, *talk("Q", "A")]}
    data = load(folder, [late, record("Q", "A")])
    one, two = (encode(data[k], tokenizer, "mistral_instruct", 4, 8) for k in range(2))
    assert one == two


def test_absolute_path_inside_the_folder_works(folder, monkeypatch):
    (folder / "link").symlink_to(folder / "pics")
    data = load(folder, [record("<image>", "A", image=str(folder / "pics" / "red.png"))])
    assert data[0]["images"][0].size == (20, 10)
    monkeypatch.chdir(folder)
    for name in ("pics", "./pics", "link", ""):
        assert LlavaData("data.json", name)[0]["images"][0].size == (20, 10)
    with pytest.raises(ValueError, match="is no path inside --image-folder"):
        load(folder, [record("<image>", "A", image=str(folder / "pics2" / "red.png"))])


@pytest.mark.parametrize("template", ["plain", "mistral_instruct", "mistral_instruct_system"])
def test_system_turn_opens_the_first_question(template, folder, tokenizer):
    system, late = {"from": "system", "value": "Be brief."}, {"from": "gpt", "value": "Ready."}
    turns = talk("<image>\nWhat?", "red")
    wanted = record("Be brief.\n\n<image>\nWhat?", "red", image="red.png")
    many = [[system, *turns], [system, late, *turns], turns, [system | {"value": " "}, *turns]]
    own = [record(conversations=some, image="red.png") for some in many]
    data = load(folder, [wanted, *own])
    assert len(data) == 5 and "Be brief." in data[0]["conversations"][0]["value"]
    first, *coded = (encode(data[k], tokenizer, template, 4, 8)[:2] for k in range(5))
    assert coded[0] == coded[1] == first and coded[3] == coded[2]
    assert (coded[2] == first) == (template == "plain")
    data = load(folder, [record(), record(conversations=[system, *talk(" ", "A")])])
    assert "question 1 is empty" in data.rejected[0]


@pytest.mark.parametrize("turns", [
    [{"from": "system", "value": "S"}], talk("Q", "A") + [{"from": "system", "value": "S"}],
    [{"from": "system", "value": "S"}] * 2 + talk("Q", "A"),
    [{"from": "system", "value": 5}, *talk("Q", "A")],
])  # fmt: skip
def test_system_turn_elsewhere_is_refused(turns, folder):
    with pytest.raises(ValueError, match="turn . (is from 'system'|needs .* a text)"):
        load(folder, [record(conversations=turns)])


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("faulty, complaint", [
    ({"id": "r1", "image": "red.png"}, 'has no field "conversations"'),
    (["not", "a", "dict"], 'record 1 .id None.: has no field "conversations"'),
    (record(conversations="Q"), "a conversation is a list of turns, not 'Q'"),
    (record(conversations=[{"from": "human"}]), 'turn 0 needs "from" and a text "value"'),
    (record(conversations=[{"from": "robot", "value": "Q"}]), "turn 0 is from 'robot'"),
    (record("<image>, <image>", "A", image="red.png"), "images is 1, of <image> tags .* 2"),
    (record("<image>", "<image>", image="red.png"), "answer 1 holds <image>; only questions can"),
    (record("Q", "A", image="red.png"), "number of images is 1, of <image> tags .* 0"),
    (record("<image>", "A", image="gone.png"), "no image '.*gone.png'; see --image-folder"),
    (record("<image>", "A", image="sub"), "no image '.*sub'; see"),
    (record("<image>", "A", image="x" * 5000), "no image '"),
    (record("<image>", "A", image="nul\0.png"), "no image '"),
    (record("<image>", "A", image="../x.png"), "'../x.png' is no path inside --image-folder"),
    (record("<image>", "A", image="sub/../../data.json"), "is no path inside --image-folder"),
    (record("<image>", "A", image="/etc/passwd"), "'/etc/passwd' is no path inside --image-folder"),
    (record("<image>", "A", image=r"sub\blue.jpg"), "it is a Windows path; write it with / and in"),
    (record("<image>", "A", image=r"C:\pics\a.png"), "no image '.*' *; it is a Windows path"),
    (record("<image>", "A", image="C:/pics/a.png"), "it is a Windows path"),
    (record("<image>", "A", image="https://x.org/a.png"), "it is a URL; save the picture as a f"),
    (record("<image>", "A", image="s3://x/a.png"), "it is a URL"),
    (record("<image>", "A", image="data:image/png;base64,AAAA"), "it is a URL"),
    (record("<image>", "A", image=5), "image 5 is no path inside"),
    (record("<image>", "A", image=[{"url": "x"}]), "image {'url': 'x'} is no path inside"),
])  # fmt: skip
def test_faulty_record_is_named_with_file_number_id_and_fault(faulty, complaint, folder):
    with pytest.raises(ValueError, match=complaint) as caught:
        load(folder, [record(), faulty, record()])
    message = str(caught.value)
    shown = "None" if isinstance(faulty, list) else "'r1'"
    assert message.startswith(f"{folder / 'data.json'}: record 1 (id {shown}): ")
    assert "\n" not in message and "more records" not in message


OTHER_KEYS = "images image_path imagePath Image IMAGES image_paths image_file image_url img picture"


@pytest.mark.parametrize("key", OTHER_KEYS.split())
@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?"])
def test_picture_under_another_key_is_named_not_trained_as_text(key, question, folder):
    for value in ("red.png", ["red.png"], {"path": "red.png"}):
        with pytest.raises(ValueError, match=f"record 0 .*: has no key .image., but '{key}'; r"):
            load(folder, [record(question, "red") | {key: value}])
    (kept,) = load(folder, [record(question, "red") | {key: None}])
    assert not kept["images"], "without a value it says that there is no picture"


def test_picture_in_a_turn_and_a_video_are_named(folder):
    turned = record()
    turned["conversations"][0]["image"] = "red.png"
    with pytest.raises(ValueError, match="has no key \"image\", but 'image'; rename"):
        load(folder, [turned])
    for picture in ({}, {"image": "red.png"}):
        for key in ("video", "videos", "video_path", "audio"):
            with pytest.raises(ValueError, match=f"has the key '{key}', which is not supported"):
                load(folder, [record("<image>", "A", **picture) | {key: "a.mp4"}])


def test_picture_named_in_the_text_is_refused(folder):
    with pytest.raises(ValueError, match="holds <img>a.jpg</img>; name the file under the key"):
        load(folder, [record("Picture 1: <img>a.jpg</img>\nWhat?", "red")])


@pytest.mark.parametrize("fields", [
    {"image_id": "5"}, {"image_width": 20}, {"model": "gpt-4"}, {"image": "", "images": []},
])  # fmt: skip
def test_fields_that_are_no_pictures_are_ignored(fields, folder):
    assert len(load(folder, [record() | fields])) == 1


@pytest.mark.parametrize(
    "text",
    [
        "docker run <image>",
        "<image>\nWhat?",
        "In HTML write <img>.",
        "<video>",
        "<rss><image><url>http://x</url></image></rss>",
    ],
)
def test_tag_in_a_record_without_a_picture_is_text_and_never_a_fault(text, folder, tokenizer):
    data = load(folder, [record(text, f"Say {text} again.", image=None), record()])
    for template in ("mistral_instruct", "mistral_instruct_system"):
        ids, labels, images, _ = encode(data[0], tokenizer, template, 64, 8, max_tokens=600)
        assert IMAGE_TOKEN not in ids and not images
        assert tokenizer.decode(ids).count(text.strip()) == 2
        assert tokenizer.decode([i for i in labels if i != IGNORE]).strip() == f"Say {text} again."


def test_number_of_records_with_a_picture_is_known(folder):
    seen = {"image": "red.png"}
    records = [record("<image>", "A", **seen), record("a <video>", "A"), record()]
    records += [record("docker run <image>", "A"), record("<image>", "", **seen)]
    line = load(folder, records).pictures
    assert line.startswith(f"{folder / 'data.json'}: 2 of 5 records have a picture; in 2 of the ot")
    assert line.endswith("of the others <video>, <image> is read as text")
    assert load(folder, records[:1]).pictures.endswith("1 of 1 records have a picture")


NOT_PLAIN = {
    "text": record("Hello", "Hi"),
    "turns": record("<image>", "red", "And?", "blue", image="red.png"),
    "two turns": record("Q", "A", "<image>", "red", image="red.png"),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_record_that_is_no_caption_is_refused_with_the_file_for_plain(kind, folder):
    """Once it ended a training when its turn came, at every retry."""
    captions = [record("<image>", "red", image="red.png", id=k) for k in range(9)]
    text = json.dumps([*captions, NOT_PLAIN[kind], NOT_PLAIN[kind]])
    (folder / "data.json").write_text(text)
    assert len(LlavaData(folder / "data.json", folder / "pics")) == 11
    want = r"record 9 .id 'r1'.: template plain takes an image and its caption, not .*; remove the"
    with pytest.raises(ValueError, match=want + r".*\(1 more records have faults\)"):
        LlavaData(folder / "data.json", folder / "pics", template="plain")


def test_all_faulty_records_are_counted_at_once(folder):
    faulty = record("<image> Q", "A", image="gone.png")
    with pytest.raises(ValueError, match=r"record 0 \(id 'r1'\).*\(2 more records have faults\)"):
        load(folder, [faulty, record(), faulty, faulty])


@pytest.mark.parametrize("content, complaint", [
    ("", "is not valid JSON"),
    ('[{"id": 1,]', "is not valid JSON .*line 1 column 11"),
    ('{"id": 1}', "holds a dict, not a list of samples"),
    ("3", "holds a int, not a list"),
    ("[]", "holds no sample to learn from"),
    ("[" * 100_000, "is nested too deeply"),
    ("[" * 10_000 + "]" * 10_000, "is nested too deeply"),
    ('[{"id": ' + "9" * 5_000 + "}]", "holds a number with too many digits"),
    ('{"id": 1}\n{"id": 2}', "name it .jsonl if each line is a sample"),
    (json.dumps([record("Q", " ")]), "holds no sample to learn from; the first: .* 1 is empty"),
])  # fmt: skip
def test_file_that_is_no_llava_json_is_one_clear_line(content, complaint, folder):
    with pytest.raises(ValueError, match="data.json: .*" + complaint) as caught:
        load(folder, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["id", "image", "conversations", "from", "value"])
def test_depth_that_json_just_reads_is_refused_by_name(field, folder):
    turn = '{"from": "human", "value": "Q"}'
    for depth in (100, *range(900, 1000, 3)):
        deep = "[" * depth + "]" * depth
        fields = {"id": "5", "conversations": f"[{turn}]", "image": "[]"} | {field: deep}
        if field in ("from", "value"):
            fields["conversations"] = "[" + turn.replace('"human"' if field == "from" else '"Q"',
                                                         deep) + "]"  # fmt: skip
        record = ", ".join(f'"{name}": {fields[name]}' for name in ("id", "conversations", "image"))
        with pytest.raises(ValueError, match="data.json: ") as caught:
            load(folder, f"[{{{record}}}]")
        assert "\n" not in str(caught.value)


def test_link_in_the_image_folder_is_followed_as_its_owner_made_it(folder):
    """A data file can name a link, but it cannot make one."""
    (folder / "pics" / "link.png").symlink_to(folder / "pics" / "red.png")
    assert len(load(folder, [record("<image>", "A", image="link.png")])) == 1


def test_broken_line_of_a_jsonl_file_is_named_by_its_number(folder):
    good = json.dumps(record())
    for broken in ('{"id": ', "{'id': 1}", "[" * 100_000):
        with pytest.raises(ValueError, match="line 3: is n(ot valid JSON|ested too)"):
            load(folder, f"{good}\n\n{broken}\n{good}", "data.jsonl")


def test_missing_file_folder_and_binary_are_one_clear_line(folder):
    with pytest.raises(ValueError, match="none.json: cannot be read .No such file.*only a JSON"):
        LlavaData(folder / "none.json")
    with pytest.raises(ValueError, match="pics: is a folder; only a JSON"):
        Records(folder / "pics")
    with pytest.raises(ValueError, match="red.png: is not UTF-8 text; only a JSON"):
        Records(folder / "pics" / "red.png")


def test_image_that_is_no_image_is_named_when_its_turn_comes(folder):
    (folder / "pics" / "text.jpg").write_text("I am no picture")
    data = load(folder, [record("<image>", "A", image="text.jpg")])
    with pytest.raises(Unreadable, match="text.jpg: is no image Pillow can read") as fault:
        data[0]
    assert fault.value.args[:2] == ("r1", str(folder / "pics" / "text.jpg"))


@pytest.mark.parametrize("name", ["many.json", "many.jsonl"])
def test_broken_record_in_the_middle_of_many_is_named_by_its_id(name, folder):
    """For faulty JSON and for a faulty record."""
    records = [record(id=f"n{k}") for k in range(3000)]
    records[1500]["conversations"][1]["from"] = "nobody"
    with pytest.raises(ValueError, match=r"record 1500 \(id 'n1500'\): turn 1 is from 'nobody'"):
        text = ("\n".join(map(json.dumps, records)), json.dumps(records))[name == "many.json"]
        load(folder, text, name)
    with pytest.raises(ValueError, match='is not valid JSON .*; the last id before it is "n1500"'):
        load(folder, text.replace('"nobody"', "nobody"), name)


def test_limit_takes_the_first_records_only(folder):
    records = [
        record("Q", " "),
        record(id=2),
        record(id=3),
        record("<image>", "faulty", image="gone.png"),
    ]
    (folder / "data.json").write_text(json.dumps(records))
    data = LlavaData(folder / "data.json", limit=3)
    assert [data[k]["id"] for k in range(len(data))] == ["2", "3"] and len(data.rejected) == 1


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = {"id": values, "image": values, "conversations": values}
roles = st.sampled_from(["human", "gpt"])
turns = st.fixed_dictionaries({}, optional={"from": values | roles, "value": values})
records = st.fixed_dictionaries({}, optional=fields)
records |= st.fixed_dictionaries({"conversations": st.lists(turns, max_size=3)})


@settings(max_examples=150, deadline=None)
@given(records=st.lists(values | records, max_size=3))
def test_any_json_is_samples_or_one_clear_line(tmp_path_factory, records):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(records))
    try:
        data = LlavaData(file, "no-such-folder")
    except ValueError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
    else:
        assert len(data) + len(data.rejected) == len(records)


# ------------------------------------------------------------------------------------- encoding


def same_pixels(arrays, tensors):
    return all(torch.equal(torch.from_numpy(x), y) for x, y in zip(arrays, tensors))


def picture_sample(*texts, n_images=1):
    images = [Image.new("RGB", (10 + k, 10), "green") for k in range(n_images)]
    return {"id": "s", "images": images, "conversations": talk(*texts)}


def test_encoded_sample_has_ids_labels_and_pixels(tokenizer):
    sample = picture_sample("<image>\nWhat?", "a cat")
    ids, labels, images, _ = encode(sample, tokenizer, "mistral_instruct", 4, 16, "square")
    assert len(ids) == len(labels) and ids.count(IMAGE_TOKEN) == 4
    assert same_pixels(images, (preprocess(sample["images"][0], 16, "square"),))
    assert tokenizer.decode([i for i in labels if i != IGNORE]) == " a cat "


words = st.text("ab <>/é\n", min_size=1, max_size=9).filter(str.strip)
asked = st.tuples(words, st.integers(0, 2), words)  # question, images in it, answer


@settings(max_examples=100, deadline=None)
@given(data=st.data(), pairs=st.lists(asked, min_size=1, max_size=5), late=st.booleans())
@pytest.mark.parametrize("template", ["mistral_instruct", "mistral_instruct_system"])
def test_long_sample_loses_its_last_turns_and_nothing_else(template, data, pairs, late, tokenizer):
    """For every row length the rest equals what `render` makes of the shorter conversation."""
    texts = [text for q, n, a in pairs for text in (q + "<image>" * n, a)] + ["and?"] * late
    sample = picture_sample(*texts, n_images=sum(n for _, n, _ in pairs))
    shorter = []
    for k in range(1, len(pairs) + 1):
        n = sum(n for _, n, _ in pairs[:k])
        shorter.append((*render(talk(*texts[: 2 * k]), tokenizer, template, 5, n), n))
    whole = render(sample["conversations"], tokenizer, template, 5, len(sample["images"]))
    length = data.draw(st.integers(1, len(whole[0]) + 2))
    fit = [short for short in shorter if len(short[0]) <= length]
    if len(whole[0]) <= length:
        ids, labels, images, dropped = encode(sample, tokenizer, template, 5, 8, max_tokens=length)
        assert (ids, labels) == whole and not dropped and len(images) == len(sample["images"])
    elif fit:
        ids, labels, images, dropped = encode(sample, tokenizer, template, 5, 8, max_tokens=length)
        assert (ids, labels, len(images)) == fit[-1]
        assert dropped == len(pairs) + late - len(fit)
        assert same_pixels(images, (preprocess(x, 8) for x in sample["images"]))
    else:
        with pytest.raises(Rejected, match=f"sample s: its first .* fit in --row-tokens {length}"):
            encode(sample, tokenizer, template, 5, 8, max_tokens=length)


def test_row_without_room_for_an_image_names_what_it_takes_and_what_would_do(tokenizer):
    for template in ("plain", "mistral_instruct", "mistral_instruct_system"):
        with pytest.raises(
            ValueError, match="--row-tokens 64 is too short: an image takes 64"
        ) as e:
            check_row(64, tokenizer, template, 64)
        enough = int(str(e.value).split("--row-tokens ")[-1].split()[0])
        check_row(enough, tokenizer, template, 64)
        encode(picture_sample("<image>", "a cat"), tokenizer, template, 64, 8, max_tokens=enough)


def test_sample_that_fits_is_not_touched(tokenizer):
    sample = picture_sample("<image> Q", "A")
    free = encode(sample, tokenizer, "mistral_instruct", 5, 8)
    bound = encode(sample, tokenizer, "mistral_instruct", 5, 8, max_tokens=len(free[0]))
    assert free[:2] == bound[:2] and len(bound[2]) == 1


def test_the_long_run_watches_the_samples_of_a_training(folder, monkeypatch):
    """tests/campaigns/long_run.py replaces two methods; they must have these names."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent / "campaigns"))
    import long_run

    monkeypatch.setattr(long_run.train.Trainer, "train_step", long_run.train.Trainer.train_step)
    monkeypatch.setattr(LlavaData, "__getitem__", LlavaData.__getitem__)
    watched = {"rows": [], "order": []}
    long_run.watch(watched)
    (folder / "two.json").write_text(json.dumps([record(), record()]))
    data = LlavaData(folder / "two.json", folder)
    assert data[1] and watched["order"] == [1]


def test_prompt_teaches_nothing_and_is_rejected_with_its_id(tokenizer):
    with pytest.raises(Rejected, match="sample s: there is no answer to learn"):
        encode(picture_sample("<image> Q"), tokenizer, "mistral_instruct", 5, 8)


def test_fault_of_a_picture_names_the_sample(tokenizer):
    sample = picture_sample("<image> Q", "A") | {"images": [Image.new("L", (20_000, 1))]}
    with pytest.raises(Unreadable, match="sample s: a picture: 20000x1 is too narrow"):
        encode(sample, tokenizer, "mistral_instruct", 5, 8)

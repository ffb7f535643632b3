"""The emoji world: every split holds out what it should, and every answer is true of its scene."""

import hashlib
import re

import numpy as np
import pytest
from refused import refusal

from data import drawings, world
from data.charts import HELD_OUT_BARS, bar_boxes
from data.signs import HELD_OUT_WORDS, LETTERS, WORDS
from data.world import COLORS, CONCEPTS, KINDS, MIDDLE, PLACES, Object, Scene, World

TRAINED = ("train", "new", "style")  # splits without what training holds out
NUMBERS = ("zero", "one", "two", "three", "four", "five")


def scenes(split, n, kind=None, seed=11):
    for i in range(n):
        rng = np.random.default_rng((seed, world.SPLITS.index(split), i))
        yield world.sample_scene(rng, split, kind), rng


def pairs_in(scene):
    names = [o.name for o in scene.objects]
    return {frozenset((x, y)) for i, x in enumerate(names) for y in names[:i]}


def is_held_out(text):
    return len(text) > 1 and int(text) % 8 == 3 if text.isdigit() else text in HELD_OUT_WORDS


@pytest.mark.parametrize("split", TRAINED)
def test_what_training_holds_out_is_in_no_scene_but_those_of_pairs(split):
    for scene, _ in scenes(split, 1500):
        assert not pairs_in(scene) & world.HELD_OUT
        assert not any(is_held_out(sign.text) for sign in scene.signs)
        assert not scene.chart or not {*scene.chart.bars} & HELD_OUT_BARS


@pytest.mark.parametrize("kind", KINDS)
def test_every_scene_of_pairs_has_what_training_holds_out(kind):
    for scene, _ in scenes("pairs", 600, kind):
        assert scene.kind == kind and (not scene.objects or pairs_in(scene) & world.HELD_OUT)
        assert all(is_held_out(sign.text) for sign in scene.signs)
        assert not scene.chart or {*scene.chart.bars} & HELD_OUT_BARS


def test_held_out_words_and_bars_are_in_no_text_of_training():
    said = [turn["value"] for task in World.tasks for i in range(250)
            for turn in World("train", task, 250)[i]["conversations"]]  # fmt: skip
    texts = re.findall(r"\b(?:[A-Z]{2,}|\d+)\b", " ".join(said))
    bars = re.findall(r"a (\w+) bar of (\w+)", " ".join(said))
    assert len({*texts}) > 200 and len({*bars}) == 24 == 6 * 5 - len(HELD_OUT_BARS)
    assert not any(map(is_held_out, texts))
    assert not {(color, NUMBERS.index(height)) for color, height in bars} & HELD_OUT_BARS


def test_an_eighth_of_words_and_numbers_and_a_fifth_of_bars_is_held_out():
    assert len({*HELD_OUT_WORDS}) == 81 and len({*WORDS, *HELD_OUT_WORDS}) == 639
    assert len(HELD_OUT_BARS) == len({color for color, _ in HELD_OUT_BARS}) == 6


def test_tenth_of_all_pairs_is_held_out_and_no_concept_is_left_alone():
    n = len(CONCEPTS)
    assert len(world.HELD_OUT) == n * (n - 1) // 2 // 10
    assert all(len(pair) == 2 for pair in world.HELD_OUT)
    assert all(1 <= len(others) < n / 2 for others in world.PARTNERS.values())


def test_only_the_split_style_is_drawn_in_fluent():
    for split in world.SPLITS:
        styles = {scene.style for scene, _ in scenes(split, 120)}
        assert styles == ({"fluent"} if split == "style" else set(drawings.TRAIN_STYLES))


def test_same_index_gives_same_sample_and_others_differ():
    one, two = (World("train", "ask", 50, seed=4, augment=True) for _ in range(2))
    assert [two[i] | {"images": 0} for i in (7, 3)] == [one[i] | {"images": 0} for i in (7, 3)]
    assert one[7]["images"][0].tobytes() == two[7]["images"][0].tobytes()
    pictures = {s["images"][0].tobytes() for s in one}
    assert len(pictures) == 50
    for other in (World("train", "ask", 50, seed=5), World("new", "ask", 50, seed=4)):
        assert pictures.isdisjoint(s["images"][0].tobytes() for s in other)


def test_seeded_samples_are_those_that_were_measured():
    digest = hashlib.sha256()
    for split in world.SPLITS:
        for task in World.tasks:
            for sample in World(split, task, 20, seed=0):
                digest.update(repr((sample["conversations"], sample["types"])).encode())
    # another digest: bench/mini.json was measured on other samples; measure it again
    assert digest.hexdigest()[:16] == "cc2498d0eac44eae"


@pytest.mark.parametrize("task", World.tasks)
def test_sample_is_a_llava_conversation_about_one_picture(task):
    for sample in World("new", task, 40):
        turns = sample["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(sample["types"])
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in turns) == len(sample["images"]) == 1
        assert sample["images"][0].size == (64, 64) and sample["images"][0].mode == "RGB"
        assert len({turn["value"] for turn in turns[::2]}) == len(sample["types"]) <= 5


# ------------------------------------------------------------------------- several pictures


def talks(n, split="train"):
    """(scenes, turns) of conversations about one, two and three pictures, questions or captions."""
    for i in range(n):
        rng = np.random.default_rng((13, i))
        scenes = world.sample_scenes(rng, split, 1 + i % 3)
        described = rng.random() < 0.3
        yield (
            scenes,
            world.descriptions(scenes, rng) if described else world.conversation(scenes, rng, 4),
        )


ORDINAL = re.compile(r"[iI]n the (first|second|third) picture|^Describe the (first|second|third) ")


def alone(question):
    """The forms of a question about one of several pictures, asked about a single picture."""
    plain = re.sub(r"^In the \w+ picture, ", "", question)
    for words in ("", " in the picture"):
        form = re.sub(r" in the (first|second|third) picture", words, plain)
        yield form[0].upper() + form[1:]


def test_every_answer_about_several_pictures_is_true_of_the_picture_it_means():
    checked = 0
    for scenes, turns in talks(900):
        shown = 0
        for kind, question, answer in turns:
            shown += question.count("<image>")
            plain = question.replace("<image>\n", "")
            named = ORDINAL.search(plain)
            if kind == "which":
                name = re.search(r"has the (.+)\?|is the (.+)\?", plain)
                name = name[1] or name[2]
                having = [
                    k for k, s in enumerate(scenes[:shown]) for o in s.objects if o.name == name
                ]
                assert {answer} == {f"the {world.ORDINALS[k]}" for k in having}, (plain, answer)
                checked += 1
                continue
            k = world.ORDINALS.index(named[1] or named[2]) if named else shown - 1
            assert k < shown, "asked about a picture before it is shown"
            if kind == "describe":
                assert answer == world.caption(scenes[k])
            else:
                right = [true_answer(form, scenes[k]) for form in alone(plain)]
                assert {*right} - {None} == {answer}, (plain, right, answer)
            checked += 1
        assert shown == len(scenes)
    assert checked > 2000


def test_pictures_of_one_conversation_hold_no_pair_that_is_held_out():
    for scenes, _ in talks(300):
        names = {o.name for scene in scenes for o in scene.objects}
        assert not any(frozenset((x, y)) in world.HELD_OUT for x in names for y in names if x != y)


@pytest.mark.parametrize("task", ["describe", "ask"])
def test_half_of_the_training_conversations_shows_two_or_three_pictures(task):
    samples = [World("train", task, 400)[i] for i in range(400)]
    numbers = np.bincount([len(sample["images"]) for sample in samples], minlength=4)
    assert 0.4 < numbers[2:].sum() / 400 < 0.6 and (numbers[1:] > 60).all()
    for sample in samples:
        asked = [turn["value"] for turn in sample["conversations"][::2]]
        assert sum(q.count("<image>") for q in asked) == len(sample["images"])
        assert asked[0].startswith("<image>\n")
    later = [any("<image>" in turn["value"] for turn in s["conversations"][1:]) for s in samples]
    assert sum(later) > 30, "pictures come later in a conversation, too"


# ------------------------------------------------------------------------------------- pictures


def test_boxes_stay_in_their_cells_and_cells_hold_one_object():
    corner = {MIDDLE: (0, 0, 64), PLACES[0]: (0, 0, 32), PLACES[1]: (32, 0, 32)}
    corner |= {PLACES[2]: (0, 32, 32), PLACES[3]: (32, 32, 32)}
    for split in world.SPLITS:
        for scene, _ in scenes(split, 300):
            places = [o.place for o in scene.objects]
            assert len(set(places)) == len(places) > 0 or scene.kind != "things"
            assert (len(places) == 1 and scene.kind == "things") == (MIDDLE in places)
            assert places == sorted(places, key=[MIDDLE, *PLACES].index)
            for o in scene.objects:
                left, top, room = corner[o.place]
                x, y, size = o.box
                assert left <= x and top <= y and x + size <= left + room and y + size <= top + room


def boxes_of(scene):
    """left, top, width, height of everything in a scene"""
    things = [(x, y, size, size) for x, y, size in (o.box for o in scene.objects)]
    return things + [sign.box for sign in scene.signs] + bars_of(scene)


def bars_of(scene):
    return bar_boxes(scene.chart) if scene.chart else []


def difference(scene, rng=None):
    """Distance of each pixel's color from the background color, [64, 64]."""
    picture = np.asarray(world.draw(scene, rng)).astype(float)
    return np.linalg.norm(picture - np.array(COLORS[scene.background]), axis=-1)


def test_picture_is_background_outside_the_boxes_and_something_else_inside():
    for scene, _ in scenes("new", 250):
        far = difference(scene)
        for left, top, width, height in boxes_of(scene):
            part = far[top : top + height, left : left + width]
            assert (part > 40).mean() > 0.1 and (part >= 0).all(), "boxes do not overlap"
            far[top : top + height, left : left + width] = -1
        if scene.kind == "charts":
            far[[61 - 11 * unit for unit in range(6)]] = -1  # the axis, and a line at each unit
        assert (far <= 0).all()


NEWER = set("giraffe parrot flamingo peacock coconut teddy kite chair".split())
RARE = NEWER | set("shark crab butterfly duck owl carrot egg cheese drum laptop".split())
LACKING = {  # concepts without a drawing
    "emojione": NEWER | {"tent"},
    "oldnoto": NEWER | {"laptop"},
    "fxemoji": RARE | {"tent", "basketball"},
    "streamline": RARE | set("spider banana pineapple eggplant lollipop tent tree football key "
                             "camera hammer lamp hat star".split()),
}  # fmt: skip


@pytest.mark.parametrize("style", [*drawings.TRAIN_STYLES, "fluent"])
def test_every_glyph_stands_out_from_every_background_it_is_put_on(style):
    assert drawings.atlas(style).shape == (len(CONCEPTS), 64, 64, 4)
    for name in CONCEPTS:
        if name in LACKING.get(style, ()):
            continue
        allowed = drawings.backgrounds(style)[name]
        assert len(allowed) >= 3
        for background in sorted(allowed):
            alone = Object(name, PLACES[0], (4, 4, 24), 10.0, False)
            assert (difference(Scene(background, (alone,), style))[4:28, 4:28] > 60).mean() > 0.1


@pytest.mark.parametrize("style", [*drawings.TRAIN_STYLES, "fluent"])
def test_concept_that_a_style_lacks_is_in_no_scene_of_that_style(style, monkeypatch):
    drawn = {name for name, glyph in zip(CONCEPTS, drawings.atlas(style)) if glyph[..., 3].any()}
    assert set(CONCEPTS) - drawn == LACKING.get(style, set())
    monkeypatch.setitem(world.STYLES, "train", (style,))
    met = {o.name for scene, _ in scenes("train", 600) for o in scene.objects}
    assert met == drawn


def test_attribution_names_every_atlas_and_its_share_alike_licence():
    text = (drawings.HERE / "ATTRIBUTION.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)\.webp` \|(.*)$", text, re.M))
    assert set(rows) == {path.stem for path in drawings.HERE.glob("*.webp")}
    assert set(rows) == {*drawings.TRAIN_STYLES, *world.STYLES["style"]}
    shared = {style for style, row in rows.items() if "CC-BY-SA-4.0" in row}
    notice = re.search(r"\*\*Share alike:\*\*(.*?)\n\n", text, re.S)[1]
    assert shared == set(re.findall(r"`(\w+)\.webp`", notice)) == {"openmoji"}


def test_augmentation_keeps_the_shape_and_changes_the_paint():
    changed = 0
    for scene, rng in scenes("train", 60):
        plain, painted = difference(scene), difference(scene, rng)
        inside = np.zeros((64, 64), bool)
        for left, top, width, height in boxes_of(scene):
            inside[top : top + height, left : left + width] = True
        assert (painted == plain)[~inside].all()
        changed += np.abs(plain - painted)[inside].mean() > 1
    assert changed > 55


# ------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    "name, article, many",
    [("owl", "an owl", "owls"), ("mouse", "a mouse", "mice"), ("tomato", "a tomato", "tomatoes"),
     ("cherry", "a cherry", "cherries"), ("sheep", "a sheep", "sheep"), ("bus", "a bus", "buses"),
     ("fish", "a fish", "fish"), ("monkey", "a monkey", "monkeys"), ("watch", "a watch", "watches"),
     ("umbrella", "an umbrella", "umbrellas"), ("dress", "a dress", "dresses"),
     ("piano", "a piano", "pianos"), ("octopus", "an octopus", "octopuses")],
)  # fmt: skip
def test_grammar(name, article, many):
    assert name in CONCEPTS
    assert (world.a(name), world.plural(name)) == (article, many)


def test_lists_are_joined_as_people_do():
    assert world.join(["a cat"]) == "a cat"
    assert world.join(["a cat", "a dog"]) == "a cat and a dog"
    assert world.join(["a cat", "a dog", "a bus"]) == "a cat, a dog and a bus"


# --------------------------------------------------------------------------- answers, re-derived


def singular(many):
    return next(name for name in CONCEPTS if world.plural(name) == many)


def true_answer(question, scene):
    """The answer to a question, derived from its words and the scene; None for unknown words."""
    names = [o.name for o in scene.objects]
    at = {o.place: o.name for o in scene.objects}
    kind_of = world.CATEGORIES
    bars = dict(scene.chart.bars) if scene.chart else {}
    if found := re.fullmatch(
        r"(?:What does|Read) the sign( (?:at|in) the (?:top|bottom|middle))?( say\?|\.)", question
    ):
        (text,) = [s.text for s in scene.signs if found[1] in (None, " " + s.place)]
        return text
    if found := re.fullmatch(r"(?:How high is|What is the value of) the (\w+) bar\?", question):
        return NUMBERS[bars[found[1]]]
    if found := re.fullmatch(r"Is the (\w+) bar higher than the (\w+) bar\?", question):
        assert bars[found[1]] != bars[found[2]]
        return "yes" if bars[found[1]] > bars[found[2]] else "no"
    if found := re.fullmatch(r"Which bar is the (tallest|shortest)\?", question):
        end = {"tallest": max, "shortest": min}[found[1]](bars.values())
        (color,) = [color for color, height in bars.items() if height == end]
        return color
    if question in ("How many bars are there?", "How many bars do you see?"):
        return NUMBERS[len(bars)]
    if question in ("What is this?", "What do you see?"):
        assert len(names) == 1
        return world.a(names[0])
    if question == "What is in the picture?":
        return world.join([world.a(name) for name in names])
    if found := re.fullmatch(r"(?:What is|What do you see) (at the \w+ \w+)\?", question):
        return world.a(at[found[1]]) if found[1] in at else "nothing"
    if found := re.fullmatch(r"(?:Is there|Do you see) an? (\w+)\?", question):
        return "yes" if found[1] in names else "no"
    if question in ("How many things are there?", "How many objects do you see?"):
        return NUMBERS[len(names)]
    if found := re.fullmatch(r"How many (\w+) are there\?", question):
        return NUMBERS[names.count(singular(found[1]))]
    if found := re.fullmatch(r"(?:Where is|Where do you see) the (\w+)\?", question):
        (place,) = [place for place, name in at.items() if name == found[1]]
        return place
    if found := re.fullmatch(r"Which color is behind .*|What color is the background\?", question):
        return scene.background
    if question in ("List all objects.", "Which objects are in the picture?"):
        return world.join([world.a(at[p]) for p in (MIDDLE, *PLACES) if p in at])
    if found := re.fullmatch(r"Which (.*?) (?:is in the picture|do you see)\?", question):
        kind = "clothing" if found[1] == "garment" else found[1]
        meant = {"animal": ("animal", "bird"), "food": ("food", "fruit", "vegetable")}
        (name,) = [name for name in names if kind_of[name] in meant.get(kind, (kind,))]
        assert kind_of[name] == kind, "a bird is asked for as a bird"
        return world.a(name)
    if found := re.fullmatch(r"Is the (\w+) left or right of the (\w+)\?", question):
        x = {o.name: o.box[0] + o.box[2] / 2 for o in scene.objects}
        return "left" if x[found[1]] < x[found[2]] else "right"


def test_every_answer_is_true_of_its_scene():
    counts = dict.fromkeys(world.QUESTION_TYPES, 0)
    for split in world.SPLITS:
        for scene, rng in scenes(split, 800):
            for kind, question, answer in world.questions(scene, rng, 6):
                counts[kind] += 1
                assert answer == true_answer(question, scene), (question, scene)
    assert min(counts.values()) > 250


def test_captions_name_every_sign_bar_and_object_and_its_place():
    for scene, _ in scenes("new", 300):
        said, short = world.caption(scene), world.short_caption(scene)
        assert said.startswith(f"on a {scene.background} background: ") and said.endswith(".")
        parts = said[:-1].split(": ")[1].split(", ")
        bars = (
            []
            if not scene.chart
            else [f"a {color} bar of {NUMBERS[height]}" for color, height in scene.chart.bars]
        )
        signs = [f"a sign {s.place} that says {s.text}" for s in scene.signs]
        objects = [f"{world.a(o.name)} {o.place}" for o in scene.objects]
        assert parts == signs + bars + objects and parts
        names = [world.a(o.name) for o in scene.objects] + [s.text for s in scene.signs]
        assert re.split(", | and ", short[:-1]) == names or scene.chart


def test_stage_1_names_one_thing_or_one_to_three_letters_that_are_nothing_held_out():
    things, texts = set(), []
    for i in range(2000):
        scene = world.sample_one(np.random.default_rng((8, i)), "train")
        assert len(scene.objects) + len(scene.signs) == 1
        things |= {o.name for o in scene.objects}
        texts += [sign.text for sign in scene.signs]
    assert things == {*CONCEPTS} and {*"".join(texts)} == {*LETTERS}
    assert {len(text) for text in texts} == {1, 2, 3} and not any(map(is_held_out, texts))
    assert 0.5 < len(texts) / 2000 < 0.7


def test_existence_is_half_no_and_half_of_those_of_the_same_category():
    said, alike, n = {"yes": 0, "no": 0}, 0, 4000
    for scene, rng in scenes("new", n, "things"):
        question, answer = world.ASK["existence"](scene, rng)
        said[answer] += 1
        name = re.search(r" an? (.*)\?", question)[1]
        alike += answer == "no" and world.CATEGORIES[name] in {
            world.CATEGORIES[o.name] for o in scene.objects
        }
    # the other half of the "no" questions may hit the same category by chance
    assert abs(said["no"] / n - 0.5) < 0.03
    assert 0.5 < alike / said["no"] < 0.68


def test_existence_can_be_asked_when_a_whole_category_is_in_the_picture():
    names = [name for name in CONCEPTS if world.CATEGORIES[name] == "building"]
    objects = tuple(Object(n, p, (0, 0, 24), 0.0, False) for n, p in zip(names, PLACES))
    for i in range(40):
        scene = Scene("white", objects[: len(names)], "noto")
        question, answer = world.ASK["existence"](scene, np.random.default_rng(i))
        assert answer == true_answer(question, scene)


# ------------------------------------------------------------------------------------- errors


def test_unknown_split_and_task_name_the_choices():
    with pytest.raises(ValueError, match="'sen' is unknown.*train, new, pairs, style"):
        World("sen", "ask", 5)
    with pytest.raises(ValueError, match="'sing' is unknown.*name, describe, ask"):
        World("new", "sing", 5)
    with pytest.raises(ValueError, match="kind 'thing' is unknown.*things, words, charts"):
        world.sample_scene(np.random.default_rng(0), "new", "thing")
    with pytest.raises(ValueError, match="'x' is unknown"):
        world.sample_scene(np.random.default_rng(0), "x")


def test_world_ends():
    data = World("new", "name", 3)
    assert len(data) == len(list(data)) == 3
    for i in (3, -1):
        with pytest.raises(IndexError, match=f"sample {i} of 3"):
            data[i]


@pytest.mark.parametrize(
    "flags, said",
    [("--out scene.foo", "--out scene.foo: unknown file extension"),
     ("--out scene", "--out scene: unknown file extension"),
     ("--out none/scene.png", "--out none/scene.png: No such file or directory")])  # fmt: skip
def test_a_picture_that_cannot_be_written_is_one_line(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refusal(world.main, flags.split(), monkeypatch, capsys)
    assert said in line and "name a picture" in line and not any(tmp_path.iterdir())

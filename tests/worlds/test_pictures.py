import io
import itertools
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modelwright.errors import UserError
from modelwright.worlds.base import Draw
from modelwright.worlds.pictures import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    WORDINGS,
    Scene,
    Thing,
    caption,
    changed,
    draw_scene,
    from_png,
    pictures,
    scene_of,
    to_png,
    with_noise,
)

SMALL = {"pool_size": 400, "reference_size": 60, "heldout_size": 50}
WORDS = {
    "shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES, "place": PLACES, "b": tuple(BACKGROUNDS),
    "n": ("one shape", "two shapes", "three shapes"),
}  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return pictures(0, **SMALL, near_share=0.25, max_objects=3)


def as_pattern(template):
    pattern = re.escape(template)
    for name, values in WORDS.items():
        # Longest first, so that "top left" is not read as "top".
        choices = "|".join(sorted(map(re.escape, values), key=len, reverse=True))
        pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>{choices})", 1)
    return pattern


def read(text):
    """Returns the scene that a caption tells of, from its words alone; it must be the only one."""
    found = set()
    text = text.replace("an orange", "a orange")
    for opening, thing, joint, ending in WORDINGS:
        for count in (1, 2, 3):
            numbered = [re.sub(r"\?P<(\w+)>", rf"?P<\g<1>_{i}>", as_pattern(thing)) for i in range(count)]
            whole = as_pattern(opening) + re.escape(joint).join(numbered) + as_pattern(ending)
            if match := re.fullmatch(whole, text):
                said = match.groupdict()
                things = [Thing(*(said[f"{a}_{i}"] for a in ATTRIBUTES[:4])) for i in range(count)]
                assert said.get("n", WORDS["n"][count - 1]) == WORDS["n"][count - 1]
                found.add(Scene(said["b"], tuple(sorted(things, key=lambda t: PLACES.index(t.place)))))
    (scene,) = found
    return scene


def look(picture):
    """Returns the scene that a picture shows, from its pixels alone, or None if there is none."""
    size = picture.width

    def name(pixel, names):
        distances = {n: sum((a - b) ** 2 for a, b in zip(pixel, c)) for n, c in names.items()}
        return min(distances, key=distances.get)

    pixels = picture.load()
    # Things cover a third of a picture at most.
    paper = Counter(picture.get_flattened_data()).most_common(1)[0][0]
    found = []
    for i, place in enumerate(PLACES):
        left, top = (k * size // 3 for k in (i % 3, i // 3))
        inside = [(x, y) for y in range(top, top + size // 3) for x in range(left, left + size // 3)]
        inside = [(x, y) for x, y in inside if pixels[x, y] != paper]
        if not inside:
            continue
        assert len({pixels[place] for place in inside}) == 1
        xs, ys = zip(*inside)
        radius = (max(ys) - min(ys)) // 2
        x0, y0 = (max(xs) + min(xs)) // 2, (max(ys) + min(ys)) // 2
        shape = _shape({(x - x0, y - y0) for x, y in inside}, radius)
        found.append(Thing(shape, name(pixels[inside[0]], COLOURS), "small" if radius < 0.1 * size else "large", place))
    return Scene(name(paper, BACKGROUNDS if found else BACKGROUNDS | COLOURS), tuple(found))


def _shape(cells, radius):
    """Names a shape by how much of its box it fills, and how."""
    rows = Counter(y for _, y in cells)
    share = len(cells) / (2 * radius + 1) ** 2
    if (0, 0) not in cells:
        return "ring"
    if share == 1:
        return "square"
    if rows[-radius] < rows[radius]:
        return "triangle"
    if len(set(rows.values())) == 2 and rows[radius - 1] == rows[radius]:
        return "cross"
    return "diamond" if rows[-radius] == 1 else "circle"


def test_fingerprints_never_change():
    assert pictures(0, **SMALL).fingerprint() == "5afc9cc377f087d98ba4667ae156a855255d1966f69727e3b86c3c15f3764384"
    odd = pictures(1, **SMALL, image_size=47, max_objects=3, near_share=0.5, heldout_wordings=1)
    assert odd.fingerprint() == "f05e1a6219222c20b4013ce3bbd8aa8ab30be32c3c01a09509b8252aa424fb09"


def test_the_fingerprint_is_of_pixels_not_of_files(world):
    packed = io.BytesIO()
    from_png(world.train[0]["image"]).save(packed, "PNG", compress_level=9)
    assert packed.getvalue() != world.train[0]["image"]
    before = world.fingerprint()
    other = type(world)(**{**vars(world), "train": [{**world.train[0], "image": packed.getvalue()}, *world.train[1:]]})
    assert other.fingerprint() == before
    picture = from_png(world.train[0]["image"])
    picture.putpixel((0, 0), (1, 2, 3))
    other = type(world)(**{**vars(world), "train": [{**world.train[0], "image": to_png(picture)}, *world.train[1:]]})
    assert other.fingerprint() != before


scenes = st.builds(
    lambda background, places, things: Scene(
        background, tuple(Thing(*t, PLACES[p]) for p, t in zip(sorted(places), things))
    ),
    st.sampled_from(sorted(BACKGROUNDS)),
    st.sets(st.integers(0, 8), min_size=1, max_size=3),
    st.lists(
        st.tuples(st.sampled_from(SHAPES), st.sampled_from(sorted(COLOURS)), st.sampled_from(SIZES)),
        min_size=3, max_size=3,
    ),
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(scene=scenes, wording=st.integers(0, len(WORDINGS) - 1), order=st.permutations(range(3)))
def test_a_caption_tells_one_scene_and_all_of_it(scene, wording, order):
    order = tuple(i for i in order if i < len(scene.things))
    assert read(caption(scene, wording, order)) == scene


@settings(deadline=None, max_examples=150)
@given(scene=scenes, size=st.sampled_from([32, 33, 48, 64, 100]), seed=st.integers(0, 10**6))
def test_a_picture_shows_its_scene(scene, size, seed):
    picture = from_png(to_png(draw_scene(scene, size, Draw(seed, "picture"))))
    assert (picture.mode, picture.size) == ("RGB", (size, size))
    assert look(picture) == scene


def test_shapes_can_be_told_apart_at_the_smallest_size():
    def drawn(shape, size):
        return draw_scene(Scene("black", (Thing(shape, "red", size, "centre"),)), 24, Draw(0, "same")).tobytes()

    for size in SIZES:
        assert len({drawn(shape, size) for shape in SHAPES}) == len(SHAPES)
    assert drawn("ring", "small") != drawn("ring", "large")


def test_kinds_have_their_shares_and_are_what_they_say(world):
    assert world.counts["train"] == {
        "rows": 400, "clean": 120, "mismatched": 160, "noisy": 40, "easy": 40, "duplicate": 40,
    }  # fmt: skip
    by_id = {row["id"]: row for row in world.train}
    assert len(by_id) == 400
    wrong = Counter()
    for row in world.train:
        scene = scene_of(row)
        told = scene if row["kind"] == "easy" else read(row["caption"])
        picture = from_png(row["image"])
        assert row["clean"] == (row["kind"] in ("clean", "easy", "duplicate"))
        assert (row["noise"] > 0) == (row["kind"] in ("noisy", "duplicate"))
        if row["kind"] == "easy":
            assert scene.things == ()
            assert scene.background in row["caption"].split()
        if row["kind"] in ("clean", "easy", "mismatched"):
            assert look(picture) == scene
        if row["kind"] == "mismatched":
            wrong[row["wrong"]] += 1
            assert told != scene
        else:
            assert row["wrong"] is None
            assert told == scene
        assert (row["duplicate_of"] is None) == (row["kind"] != "duplicate")
        if row["kind"] == "duplicate":
            original = by_id[row["duplicate_of"]]
            assert original["kind"] == "clean"
            assert scene_of(original) == scene
            pairs = list(zip(picture.get_flattened_data(), from_png(original["image"]).get_flattened_data()))
            assert 0 < sum(a != b for a, b in pairs) < 0.06 * len(pairs)
    assert wrong["picture"] == 120
    assert sum(wrong[attribute] for attribute in ATTRIBUTES) == 40
    assert len(wrong) == 6
    assert world.truth["clean_share"] == 0.5


def test_one_attribute_is_wrong_and_no_other(world):
    def differ(a, b):
        found = {"background"} if a.background != b.background else set()
        gone, new = set(a.things) - set(b.things), set(b.things) - set(a.things)
        for old, other in zip(gone, new):
            found |= {name for name, x, y in zip(ATTRIBUTES, old, other) if x != y}
        assert len(gone) == len(new) <= 1
        return found

    for row in world.train:
        if row["wrong"] not in (None, "picture"):
            assert differ(scene_of(row), read(row["caption"])) == {row["wrong"]}
    for row in (*world.heldout, *world.heldout_wordings, *world.heldout_combinations):
        assert read(row["caption"]) == scene_of(row)
        for attribute in ATTRIBUTES:
            assert differ(scene_of(row), read(row[f"near_{attribute}"])) == {attribute}


def test_what_is_held_out_stays_out(world):
    pairs = {tuple(pair) for pair in world.truth["heldout_combinations"]}
    assert len(pairs) == 6

    def shown(rows):
        return {(t.shape, t.colour) for row in rows for t in scene_of(row).things}

    seen = [*world.train, *world.reference]
    assert not shown(seen) & pairs
    assert not shown(world.heldout) & pairs
    assert all(shown([row]) & pairs for row in world.heldout_combinations)
    assert {t for pair in shown(seen) for t in pair} == {*SHAPES, *COLOURS}
    heldout = [*world.heldout, *world.heldout_combinations]
    scenes_heldout = {scene_of(row) for row in heldout}
    assert len(scenes_heldout) == len(heldout) == 100
    assert not scenes_heldout & {scene_of(row) for row in seen}
    assert not {row["caption"] for row in heldout} & {row["caption"] for row in seen}
    assert {row["wording"] for row in (*seen, *heldout)} == {0, 1, 2, 3}
    assert {row["wording"] for row in world.heldout_wordings} == {4, 5}
    assert [row["image"] for row in world.heldout_wordings] == [row["image"] for row in world.heldout]
    assert len({row["caption"] for row in world.heldout_wordings}) == 50


def test_nothing_is_shared_where_there_are_few_scenes():
    world = pictures(0, pool_size=1500, reference_size=300, heldout_size=300, max_objects=1)
    seen = {scene_of(row) for row in (*world.train, *world.reference)}
    heldout = [scene_of(row) for row in (*world.heldout, *world.heldout_combinations)]
    assert len(set(heldout)) == len(heldout) == 600
    assert not seen & set(heldout)


def test_the_reference_is_clean(world):
    assert world.counts["reference"] == {"rows": 60, "clean": 60}
    for row in world.reference:
        assert look(from_png(row["image"])) == scene_of(row) == read(row["caption"])


def test_half_of_the_combinations_leaves_every_shape_and_colour():
    pairs = pictures(3, pool_size=1, reference_size=0, heldout_size=0, combinations_share=0.5).truth[
        "heldout_combinations"
    ]
    assert len({tuple(pair) for pair in pairs}) == 24
    left = set(itertools.product(SHAPES, COLOURS)) - {tuple(pair) for pair in pairs}
    assert {value for pair in left for value in pair} == {*SHAPES, *COLOURS}


@pytest.mark.parametrize("level", [0.0, 0.25, 1.0])
def test_noise_replaces_that_share_of_the_pixels(level):
    plain = Image.new("RGB", (200, 200), (10, 20, 30))
    noisy = with_noise(plain, level, "stream")
    share = sum(pixel != (10, 20, 30) for pixel in noisy.get_flattened_data()) / 40_000
    # Six standard deviations.
    assert abs(share - level) <= 6 * (level * (1 - level) / 40_000) ** 0.5 + 1e-6
    assert plain.getpixel((0, 0)) == (10, 20, 30)


def test_numbers_of_objects_and_noise_levels_are_spread():
    world = pictures(
        5, pool_size=900, reference_size=0, heldout_size=0, max_objects=3, noisy_share=0.5, mismatched_share=0.0
    )
    counts = Counter(len(row["objects"]) for row in world.train if row["kind"] == "noisy")
    assert all(abs(counts[n] - 150) < 6 * (450 * 2 / 9) ** 0.5 for n in (1, 2, 3))
    levels = [row["noise"] for row in world.train if row["kind"] == "noisy"]
    assert min(levels) >= 0.3
    assert max(levels) <= 0.9
    assert 0.55 < sum(levels) / len(levels) < 0.65


def test_no_wrong_caption_tells_of_a_held_out_scene():
    few = {"pool_size": 300, "reference_size": 0, "max_objects": 1, "vary": ["shape", "colour", "background"]}
    world = pictures(1, **few, heldout_size=15, mismatched_share=0.6, near_share=1.0)
    heldout = {scene_of(row) for row in (*world.heldout, *world.heldout_combinations)}
    assert not heldout & {read(row["caption"]) for row in world.train if row["wrong"]}
    with pytest.raises(UserError, match="near_share: the held-out splits use up"):
        pictures(0, pool_size=9, reference_size=0, heldout_size=1, max_objects=1, vary=["size"], near_share=1.0)


def test_attributes_that_do_not_vary():
    small = {"pool_size": 200, "reference_size": 30, "max_objects": 1, "mismatched_share": 0.5, "near_share": 1.0}
    world = pictures(0, **small, heldout_size=20, vary=["background", "shape", "colour"])
    assert world.parameters["vary"] == ["shape", "colour", "background"]
    for rows in world.splits().values():
        for row in rows:
            if row["kind"] != "easy":
                assert [(t.size, t.place) for t in (*scene_of(row).things, *read(row["caption"]).things)] == [
                    ("large", "centre")
                ] * 2
    assert {row["wrong"] for row in world.train} == {None, "shape", "colour", "background"}
    assert {key for key in world.heldout[0] if key.startswith("near")} == {
        "near_shape",
        "near_colour",
        "near_background",
    }
    assert len({scene_of(row) for row in world.heldout}) == 20
    plain = pictures(0, **small, heldout_size=8, vary=["colour", "size"])
    assert plain.heldout_combinations == plain.truth["heldout_combinations"] == []
    assert {scene_of(row).background for row in plain.heldout} == {"black"}
    # The order in which they are named does not count.
    again = pictures(0, **small, heldout_size=8, vary=["size", "colour"])
    assert again.fingerprint() == plain.fingerprint()


def test_a_pool_of_one_kind():
    for kind in ("mismatched", "noisy", "easy"):
        shares = {f"{k}_share": float(k == kind) for k in ("mismatched", "noisy", "easy", "duplicate")}
        world = pictures(0, pool_size=20, reference_size=0, heldout_size=0, **shares)
        assert world.counts["train"] == {"rows": 20, kind: 20}


def test_changing_a_scene_keeps_places_apart():
    scene = Scene("black", tuple(Thing("ring", "red", "small", place) for place in PLACES[:3]))
    for i in range(50):
        other = changed(scene, "place", Draw(i, "place"))
        assert len({t.place for t in other.things}) == 3
        assert [PLACES.index(t.place) for t in other.things] == sorted(PLACES.index(t.place) for t in other.things)

"""Pictures of coloured shapes with captions, in a pool where some captions are wrong and some pictures are noise.

For contrastive training and for methods that choose pairs. A picture shows one to three shapes, each with a kind, a
colour, a size and a place, before a background. A caption says all of that in one of several wordings, so it is true
of one scene only, and a score of 1.0 can be reached in retrieval. Captions that are wrong in a single attribute are the
fine hard negatives. Some pairs of shape and colour never occur in training, and some wordings neither.

Drawn with Pillow from masks that are computed in integers, without fonts and without smoothing: the same seed gives the
same pixels on every machine, Python and Pillow. The bytes of the PNG files may differ with the version of zlib, so the
fingerprint is taken over pixels.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from modelwright.errors import UserError, did_you_mean
from modelwright.worlds.base import Draw, Row, World, check_at_least, check_share

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40), "orange": (240, 145, 30), "yellow": (240, 225, 60), "green": (50, 165, 70),
    "cyan": (70, 210, 220), "blue": (50, 80, 220), "purple": (135, 55, 180), "pink": (240, 150, 190),
}  # fmt: skip
BACKGROUNDS = {"black": (22, 22, 22), "grey": (128, 128, 128), "white": (236, 236, 236), "brown": (110, 70, 38)}
SIZES = ("small", "large")
#: Cells of a 3 x 3 grid, row by row.
PLACES = (
    "top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
ATTRIBUTES = ("shape", "colour", "size", "place", "background")
#: Values of attributes that do not vary.
FIXED = {"shape": "circle", "colour": "red", "size": "large", "place": "centre", "background": "black"}
KINDS = ("clean", "mismatched", "noisy", "easy", "duplicate")
_NUMBERS = ("no shape", "one shape", "two shapes", "three shapes")
#: Each channel of a colour is moved by at most this much, and a near copy has this share of its pixels changed.
_COLOUR_JITTER, _COPY_NOISE = 14, 0.02
_ATTEMPTS = 2000


class Thing(NamedTuple):
    """One shape of a scene."""

    shape: str
    colour: str
    size: str
    place: str


class Scene(NamedTuple):
    """What a picture shows: ``things`` in the order of their places, at most one to a place. None: a plain colour."""

    background: str
    things: tuple[Thing, ...]


#: Wordings of a caption: the opening, a thing, what stands between things, and the ending. ``{n}`` is their number in
#: words, ``{b}`` the background.
WORDINGS = (
    ("", "a {size} {colour} {shape} at the {place}", " and ", " on a {b} background"),
    ("on {b}: ", "{size} {colour} {shape} ({place})", ", ", ""),
    ("{n}, {b} background: ", "a {colour} {shape}, {size}, {place}", "; ", ""),
    ("{b} picture with ", "{place} a {size} {colour} {shape}", ", ", ""),
    ("", "in the {place} a {shape} that is {size} and {colour}", ", ", ", all before {b}"),
    ("{n} can be seen against {b}: ", "{colour} and {size}, a {shape} in the {place}", " beside ", ""),
)
#: Wordings of a picture that is one plain colour.
_EASY = ("nothing but {b}", "an empty {b} picture", "plain {b}")


def caption(scene: Scene, wording: int, order: tuple[int, ...] | None = None) -> str:
    """Returns the caption of a scene.

    Args:
        scene: The scene.
        wording: Index into :data:`WORDINGS`.
        order: In which order the things are named; None takes the order of their places.
    """
    if not scene.things:
        return _EASY[wording % len(_EASY)].format(b=scene.background)
    opening, thing, joint, ending = WORDINGS[wording]
    things = [scene.things[i] for i in order or range(len(scene.things))]
    whole = {"n": _NUMBERS[len(things)], "b": scene.background}
    said = joint.join(thing.format(**t._asdict()) for t in things).replace("a orange", "an orange")
    return opening.format(**whole) + said + ending.format(**whole)


@dataclass(frozen=True)
class PicturesWorld(World):
    """Pictures with captions. Every row has these fields.

    ``id``; ``image`` (the bytes of a PNG file); ``caption``; ``kind``; ``clean`` (the caption is true and the picture
    is not noise); ``noise`` (share of the pixels that were replaced by random colours); ``wrong`` (None, ``picture``
    for the caption of another picture, or the one attribute in which the caption is wrong); ``duplicate_of`` (the id
    of the row that this is a near copy of, or None); ``wording`` (index into :data:`WORDINGS`); ``background``;
    ``objects`` (list of ``shape``, ``colour``, ``size``, ``place``).

    The kinds are ``clean``; ``mismatched``, whose caption is wrong; ``noisy``; ``easy``, a plain colour that is named;
    ``duplicate``, a near copy of a clean row. The held-out splits also have ``near_shape``, ``near_colour``,
    ``near_size``, ``near_place``, ``near_background``: captions that are wrong in that attribute only (those of
    attributes that vary). No scene of theirs is in another split, so no caption of theirs is either.

    Attributes:
        train: The pool, shuffled.
        reference: A small curated set: clean rows only.
        heldout: Clean rows in the training wordings; no two show the same scene.
        heldout_wordings: The same pictures in the held-out wordings.
        heldout_combinations: Pictures with at least one held-out pair of shape and colour, in the training wordings.
    """

    train: list[Row]
    reference: list[Row]
    heldout: list[Row]
    heldout_wordings: list[Row]
    heldout_combinations: list[Row]

    @property
    def truth(self) -> dict[str, Any]:
        """``heldout_combinations`` (pairs of shape and colour), ``clean_share`` of the pool, ``attributes``."""
        pairs = _heldout_pairs(self.parameters["seed"], self.parameters["combinations_share"], self.parameters["vary"])
        return {
            "heldout_combinations": sorted(map(list, pairs)),
            "clean_share": sum(row["clean"] for row in self.train) / len(self.train),
            "attributes": {
                "shape": list(SHAPES), "colour": list(COLOURS), "size": list(SIZES), "place": list(PLACES),
                "background": list(BACKGROUNDS),
            },
        }  # fmt: skip


def pictures(
    seed: int = 0,
    *,
    pool_size: int = 4000,
    reference_size: int = 1000,
    heldout_size: int = 400,
    image_size: int = 32,
    max_objects: int = 2,
    vary: Sequence[str] = ATTRIBUTES,
    mismatched_share: float = 0.4,
    noisy_share: float = 0.1,
    easy_share: float = 0.1,
    duplicate_share: float = 0.1,
    near_share: float = 0.0,
    min_noise: float = 0.3,
    max_noise: float = 0.9,
    combinations_share: float = 0.125,
    heldout_wordings: int = 2,
) -> PicturesWorld:
    """Makes the world. The part of the pool that the shares leave over is clean.

    Args:
        seed: Decides everything.
        pool_size: Rows of the pool.
        reference_size: Rows of the curated set.
        heldout_size: Rows of each held-out split.
        image_size: Width and height in pixels, 24 to 512.
        max_objects: A picture shows one to this many shapes, at most 3, each number equally often.
        vary: Attributes that differ between scenes, of :data:`ATTRIBUTES`; fewer make the world easier. The others
            are as in :data:`FIXED`, and captions still tell them. Without ``place`` there is room for one shape only;
            without ``shape`` or ``colour`` no combination is held out.
        mismatched_share: Share of the pool whose caption is wrong.
        noisy_share: Share of the pool whose picture is noisy.
        easy_share: Share of the pool that is a plain colour.
        duplicate_share: Share of the pool that is a near copy of a clean row.
        near_share: Share of the wrong captions that are wrong in one attribute only. The others are the caption of
            another picture of the pool.
        min_noise: Least share of a noisy picture's pixels that is replaced.
        max_noise: Greatest such share.
        combinations_share: Share of the pairs of shape and colour that no training picture shows, at most a half.
        heldout_wordings: Number of wordings that are held out, 1 to 4 of the six; the last ones.

    Raises:
        UserError: A parameter is out of range, or there are too few scenes for the held-out splits.
    """
    parameters = {**locals(), "vary": [attribute for attribute in ATTRIBUTES if attribute in vary]}
    check_at_least(1, pool_size=pool_size, max_objects=max_objects, heldout_wordings=heldout_wordings)
    check_at_least(0, reference_size=reference_size, heldout_size=heldout_size)
    check_at_least(24, image_size=image_size)
    check_share(near_share=near_share, min_noise=min_noise, max_noise=max_noise, combinations_share=combinations_share)
    shares = {"mismatched": mismatched_share, "noisy": noisy_share, "easy": easy_share, "duplicate": duplicate_share}
    check_share(**{f"{kind}_share": share for kind, share in shares.items()})
    _check_limits(parameters, shares, vary)
    maker = _Maker(parameters)
    heldout = maker.heldout("heldout", heldout_size, new_pairs=False)
    new_pairs = maker.heldout("heldout_combinations", heldout_size if maker.pairs else 0, new_pairs=True)
    return PicturesWorld(
        parameters,
        train=maker.pool(pool_size, shares, near_share, (min_noise, max_noise)),
        reference=[maker.row("reference", i) for i in range(reference_size)],
        heldout=heldout,
        heldout_wordings=[maker.reworded(row) for row in heldout],
        heldout_combinations=new_pairs,
    )


def _check_limits(parameters: dict[str, Any], shares: dict[str, float], vary: Sequence[str]) -> None:
    for attribute in vary:
        if attribute not in ATTRIBUTES:
            raise UserError(f"There is no attribute '{attribute}' to vary: {did_you_mean(attribute, ATTRIBUTES)}")
    if not vary:
        raise UserError(f"vary is empty, so all scenes would be one: name some of {', '.join(ATTRIBUTES)}.")
    if "place" not in vary and parameters["max_objects"] > 1:
        raise UserError(f"max_objects is {parameters['max_objects']}, but without varying places only 1 has room.")
    for name, most in (("max_objects", 3), ("heldout_wordings", 4), ("image_size", 512), ("combinations_share", 0.5)):
        if parameters[name] > most:
            raise UserError(f"{name} is {parameters[name]}: give at most {most}.")
    if parameters["max_noise"] < parameters["min_noise"]:
        raise UserError(
            f"max_noise is {parameters['max_noise']}, below min_noise, which is {parameters['min_noise']}: exchange "
            f"them."
        )
    # Shares such as 0.7, 0.2 and 0.1 add up to a little more than 1.
    if sum(shares.values()) > 1 + 1e-9:
        raise UserError(
            f"The shares of the pool ({', '.join(f'{k} {v:g}' for k, v in shares.items())}) add up to "
            f"{sum(shares.values()):g}: give at most 1 together."
        )
    counts = _counts(parameters["pool_size"], shares)
    if counts["duplicate"] and not counts["clean"]:
        raise UserError("duplicate_share needs clean rows to copy: lower a share so that some rows stay clean.")


def _counts(size: int, shares: dict[str, float]) -> dict[str, int]:
    counts, left = {}, size
    for kind, share in shares.items():
        counts[kind] = min(left, round(size * share))
        left -= counts[kind]
    return {"clean": left, **counts}


def _heldout_pairs(seed: int, share: float, vary: Sequence[str]) -> set[tuple[str, str]]:
    """Returns pairs of shape and colour that spread over all shapes and colours, so that each is also seen."""
    if "shape" not in vary or "colour" not in vary:
        return set()
    draw = Draw(seed, "combinations")
    shapes, colours = draw.shuffled(SHAPES), draw.shuffled(COLOURS)
    n = round(share * len(shapes) * len(colours))
    # (i mod 6, i mod 8) comes back after 24 pairs; from there on it is shifted by one.
    return {(shapes[i % 6], colours[(i + i // 24) % 8]) for i in range(n)}


class _Maker:
    """Makes rows, and no held-out scene in the others."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.seed: int = parameters["seed"]
        self.image_size: int = parameters["image_size"]
        self.max_objects: int = parameters["max_objects"]
        self.wordings = len(WORDINGS) - parameters["heldout_wordings"]
        self.vary: list[str] = parameters["vary"]
        self.pairs = _heldout_pairs(self.seed, parameters["combinations_share"], self.vary)
        self.reserved: set[Scene] = set()

    def scene(self, draw: Draw) -> Scene:
        """Returns any scene of shapes."""
        values = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES}
        fixed = {attribute: FIXED[attribute] for attribute in ATTRIBUTES if attribute not in self.vary}
        background = fixed.pop("background", None)
        places = sorted(draw.sample(range(len(PLACES)), draw.between(1, self.max_objects)))
        things = []
        for place in places:
            # Drawn all the same, so that the others are what they are in the full world.
            drawn = {attribute: draw.choice(values[attribute]) for attribute in ("shape", "colour", "size")}
            things.append(Thing(**{**drawn, "place": PLACES[place], **fixed}))
        return Scene(background or draw.choice(tuple(BACKGROUNDS)), tuple(things))

    def new_pair(self, scene: Scene) -> bool:
        """Tells whether a scene shows a held-out pair of shape and colour."""
        return any((thing.shape, thing.colour) in self.pairs for thing in scene.things)

    def training_scene(self, draw: Draw) -> Scene:
        """Returns a scene that is not held out."""
        for _ in range(_ATTEMPTS):
            scene = self.scene(draw)
            if scene not in self.reserved and not self.new_pair(scene):
                return scene
        raise UserError("The held-out splits use up all scenes: give a smaller heldout_size or a larger max_objects.")

    def row(self, split: str, index: int, scene: Scene | None = None) -> Row:
        """Returns a clean row of a training scene, or of the given one."""
        draw = Draw(self.seed, f"{split}/{index}")
        scene = self.training_scene(draw) if scene is None else scene
        image = draw_scene(scene, self.image_size, draw)
        return {"id": f"{split}-{index}", "image": to_png(image), **self.said(scene, draw), **_truth("clean", scene)}

    def said(self, scene: Scene, draw: Draw) -> Row:
        """Returns a caption in one of the training wordings."""
        wording = draw.below(self.wordings)
        order = tuple(draw.shuffled(range(len(scene.things))))
        return {"caption": caption(scene, wording, order), "wording": wording}

    def heldout(self, split: str, n: int, new_pairs: bool) -> list[Row]:
        """Returns rows of distinct scenes, which no other split will show."""
        draw, rows = Draw(self.seed, split), []
        for i in range(n):
            for _ in range(_ATTEMPTS):
                scene = self.scene(draw)
                if scene not in self.reserved and self.new_pair(scene) == new_pairs:
                    break
            else:
                raise UserError(
                    f"heldout_size is {n}, but there are too few scenes that differ: give a smaller one, or a larger "
                    f"max_objects."
                )
            self.reserved.add(scene)
            row = self.row(split, i, scene)
            rows.append({**row, **self.near_captions(scene, row["wording"], Draw(self.seed, f"near {split}/{i}"))})
        return rows

    def near_captions(self, scene: Scene, wording: int, draw: Draw) -> Row:
        """Returns captions that are wrong in one attribute each."""
        return {f"near_{a}": caption(changed(scene, a, draw), wording) for a in self.vary}

    def reworded(self, row: Row) -> Row:
        """Returns a held-out row in a held-out wording."""
        draw = Draw(self.seed, f"reworded {row['id']}")
        scene, wording = scene_of(row), draw.between(self.wordings, len(WORDINGS) - 1)
        order = tuple(draw.shuffled(range(len(scene.things))))
        said = {"caption": caption(scene, wording, order), "wording": wording}
        identity = row["id"].replace("heldout-", "heldout_wordings-")
        return {**row, "id": identity, **said, **self.near_captions(scene, wording, draw)}

    def pool(self, n: int, shares: dict[str, float], near_share: float, noise: tuple[float, float]) -> list[Row]:
        """Returns the noisy pool, shuffled."""
        counts = _counts(n, shares)
        kinds = Draw(self.seed, "order").shuffled(kind for kind, count in counts.items() for _ in range(count))
        places = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in KINDS}
        rows = [self.easy(i) if kind == "easy" else self.row("train", i) for i, kind in enumerate(kinds)]
        for i in places["noisy"]:
            rows[i].update(self.noisy(rows[i], noise))
        for i in places["duplicate"]:
            rows[i] = self.copy(i, rows[Draw(self.seed, f"copy {i}").choice(places["clean"])])
        wrong = Draw(self.seed, "near").shuffled(places["mismatched"])
        near = round(near_share * len(wrong))
        for turn, i in enumerate(wrong):
            rows[i].update(self.mismatched(rows[i], None if turn < near else rows))
        return rows

    def noisy(self, row: Row, limits: tuple[float, float]) -> Row:
        """Returns what changes when a row's picture becomes noisy."""
        low, high = limits
        level = round(low + (high - low) * Draw(self.seed, f"noise {row['id']}").uniform(), 2)
        image = with_noise(from_png(row["image"]), level, f"{self.seed}/noise/{row['id']}")
        return {"kind": "noisy", "clean": False, "noise": level, "image": to_png(image)}

    def easy(self, index: int) -> Row:
        """Returns a row whose picture is one plain colour."""
        draw = Draw(self.seed, f"train/{index}")
        scene = Scene(draw.choice((*COLOURS, *BACKGROUNDS)), ())
        image = draw_scene(scene, self.image_size, draw)
        said = self.said(scene, draw)
        return {"id": f"train-{index}", "image": to_png(image), **said, **_truth("easy", scene)}

    def copy(self, index: int, row: Row) -> Row:
        """Returns a near copy of a clean row: a few other pixels, and the caption in any training wording."""
        image = with_noise(from_png(row["image"]), _COPY_NOISE, f"{self.seed}/copy/{index}")
        said = self.said(scene_of(row), Draw(self.seed, f"copy caption {index}"))
        identity = {"id": f"train-{index}", "kind": "duplicate", "duplicate_of": row["id"]}
        return {**row, **said, "noise": _COPY_NOISE, "image": to_png(image), **identity}

    def mismatched(self, row: Row, rows: list[Row] | None) -> Row:
        """Returns what changes when a row's caption becomes wrong: another row's, or (None) one attribute."""
        draw, scene = Draw(self.seed, f"mismatched {row['id']}"), scene_of(row)
        attribute, other = "picture", scene
        if rows is None:
            for _ in range(_ATTEMPTS):
                attribute = draw.choice(self.vary)
                other = changed(scene, attribute, draw)
                if other not in self.reserved:
                    break
            else:
                raise UserError(
                    "near_share: the held-out splits use up the scenes that a wrong caption could tell of: give a "
                    "smaller heldout_size or a larger max_objects."
                )
        else:
            for _ in range(_ATTEMPTS):
                found = draw.choice(rows)
                other = scene_of(found)
                if other != scene and found["kind"] != "easy":
                    break
            else:
                raise UserError("The pool holds no two different scenes to exchange captions: give a larger pool_size.")
        return {"kind": "mismatched", "clean": False, "wrong": attribute, **self.said(other, draw)}


def _truth(kind: str, scene: Scene) -> Row:
    return {
        "kind": kind,
        "clean": True,
        "noise": 0.0,
        "wrong": None,
        "duplicate_of": None,
        "background": scene.background,
        "objects": [thing._asdict() for thing in scene.things],
    }


def scene_of(row: Row) -> Scene:
    """Returns the scene that a row's picture shows."""
    return Scene(row["background"], tuple(Thing(**thing) for thing in row["objects"]))


def changed(scene: Scene, attribute: str, draw: Draw) -> Scene:
    """Returns a scene that differs in one attribute of one thing, or in the background."""
    if attribute == "background":
        return scene._replace(background=_another(tuple(BACKGROUNDS), scene.background, draw))
    which = draw.below(len(scene.things))
    thing = scene.things[which]
    values = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES}.get(attribute, PLACES)
    if attribute == "place":
        taken = {other.place for other in scene.things}
        values = tuple(place for place in PLACES if place not in taken)
    things = list(scene.things)
    things[which] = thing._replace(**{attribute: _another(values, getattr(thing, attribute), draw)})
    return scene._replace(things=tuple(sorted(things, key=lambda t: PLACES.index(t.place))))


def _another(values: tuple[str, ...], old: str, draw: Draw) -> str:
    return draw.choice([value for value in values if value != old])


@functools.cache
def _mask(shape: str, radius: int) -> Any:
    """Returns a shape as a picture of 0 and 255, ``2 radius + 1`` pixels wide."""
    from PIL import Image

    hole = radius - max(1, (radius + 1) // 3)
    inside = {
        "circle": lambda x, y: x * x + y * y <= radius * radius + radius,
        "square": lambda x, y: True,
        "triangle": lambda x, y: 2 * abs(x) <= y + radius,
        "diamond": lambda x, y: abs(x) + abs(y) <= radius,
        "cross": lambda x, y: min(abs(x), abs(y)) <= radius // 3,
        "ring": lambda x, y: hole * hole + hole < x * x + y * y <= radius * radius + radius,
    }[shape]
    reach = range(-radius, radius + 1)
    return Image.frombytes("L", (len(reach),) * 2, bytes(255 * inside(x, y) for y in reach for x in reach))


def _shade(colour: tuple[int, int, int], draw: Draw) -> tuple[int, ...]:
    return tuple(min(255, max(0, c + draw.between(-_COLOUR_JITTER, _COLOUR_JITTER))) for c in colour)


def draw_scene(scene: Scene, size: int, draw: Draw) -> Any:
    """Draws a scene: things anywhere in the cells of their places, colours a little off the tabled ones.

    Returns:
        A ``PIL.Image`` of mode RGB, ``size`` by ``size`` pixels.
    """
    from PIL import Image

    picture = Image.new("RGB", (size, size), _shade((BACKGROUNDS | COLOURS)[scene.background], draw))
    cell = size // 3
    for thing in scene.things:
        radius = ((7 if thing.size == "small" else 13) * size + 50) // 100
        row, column = divmod(PLACES.index(thing.place), 3)
        # Anywhere in its cell, so no two things touch.
        x, y = (i * size // 3 + draw.below(cell - 2 * radius) for i in (column, row))
        picture.paste(_shade(COLOURS[thing.colour], draw), (x, y), _mask(thing.shape, radius))
    return picture


def with_noise(picture: Any, level: float, stream: str) -> Any:
    """Returns the picture with about a share ``level`` of its pixels replaced by random colours."""
    from PIL import Image

    n = picture.width * picture.height
    noise = hashlib.shake_256(stream.encode()).digest(4 * n)
    threshold = round(256 * level)
    mask = noise[3 * n :].translate(bytes(255 if value < threshold else 0 for value in range(256)))
    colours = Image.frombytes("RGB", picture.size, noise[: 3 * n])
    return Image.composite(colours, picture, Image.frombytes("L", picture.size, mask))


def to_png(picture: Any) -> bytes:
    """Returns the bytes of a PNG file."""
    stream = io.BytesIO()
    # Level 1: the pictures are small, and making them should be quick.
    picture.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def from_png(data: bytes) -> Any:
    """Returns the ``PIL.Image`` in the bytes of a PNG file."""
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")

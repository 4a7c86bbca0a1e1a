"""Line charts with Pillow alone: a page, panels with round ticks, lines that are smooth.

Everything is drawn at three times its size and reduced at the end, which gives clean edges without
a plotting library. Coordinates are pixels of the finished page, from its upper left corner.
"""

import functools
import math
import unicodedata
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# The colours of Okabe and Ito (2008): readers with any kind of colour vision can tell them apart.
BLUE, SKY, GREEN, ORANGE, PINK = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7"
INK, GREY, LIGHT, PAPER = "#222222", "#6E6E6E", "#E6E6E6", "#FFFFFF"


class Line(NamedTuple):
    name: str  # in the legend; "" for none
    colour: str
    points: dict  # {step: value}, ascending
    thin: bool = False  # for comparison: a level, or another run


class Page:
    """A white page. `zoom` is how much larger it is while being drawn."""

    zoom = 3

    def __init__(self, width, height):
        self.size = (width, height)
        self.large = Image.new("RGB", (width * self.zoom, height * self.zoom), PAPER)
        self.draw = ImageDraw.Draw(self.large)

    def line(self, points, colour, width=1.0):
        points = [(x * self.zoom, y * self.zoom) for x, y in points]
        self.draw.line(points, colour, round(width * self.zoom), joint="curve")

    def dot(self, x, y, colour, radius=3.2):
        """A disc with a white rim, which tells it from what lies under it."""
        for radius_, hue in ((radius + 1.2, PAPER), (radius, colour)):
            corners = [(x - radius_, y - radius_), (x + radius_, y + radius_)]
            self.draw.ellipse([(a * self.zoom, b * self.zoom) for a, b in corners], hue)

    def text(self, x, y, words, size=12, colour=INK, anchor="la"):
        words, letters = in_ascii(words), font(size * self.zoom)
        self.draw.text((x * self.zoom, y * self.zoom), words, colour, letters, anchor)

    def finished(self):
        return self.large.resize(self.size, Image.Resampling.LANCZOS)


font = functools.cache(ImageFont.load_default)  # of a size in pixels


def in_ascii(words):
    """Words as Pillow's own font has them: é as e, a letter of another script as its escape."""
    letters = unicodedata.normalize("NFKD", words)  # é as e and its accent
    return ascii("".join(letter for letter in letters if not unicodedata.combining(letter)))[1:-1]


def text_width(words, size):
    return font(size).getlength(in_ascii(words))


def panel(page, box, title, lines, last, from_zero=False):
    """Title, legend, axes and lines inside box = (left, top, right, bottom).

    last       the step at which the horizontal axis ends
    from_zero  the vertical axis begins at 0
    """
    left, top, right, bottom = box
    named = any(line.name for line in lines)
    page.text(left, top, title, 15 if named else 12)
    legend(page, left, top + 32, lines)
    left, top, bottom = left + 42, top + (56 if named else 28), bottom - 24
    values = [value for line in lines for value in line.points.values()]
    if not values:
        return
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    low, high = 0 if from_zero else low - room, high + room
    last = max(last, 1)

    def at(step, value):
        height = (value - low) / (high - low)
        return left + step / last * (right - left), bottom - height * (bottom - top)

    for value, words in ticks(low, high, (bottom - top) / 45):
        _, y = at(0, value)
        page.line([(left, y), (right, y)], LIGHT)
        page.text(left - 8, y, words, 11, GREY, "rm")
    page.line([(left, bottom), (right, bottom)], GREY)
    page.text(left - 8, bottom + 7, "step", 11, GREY, "ra")
    for step, words in ticks(0, last, (right - left) / 80, least=1):
        x, _ = at(step, 0)
        page.line([(x, bottom), (x, bottom + 4)], GREY)
        page.text(x, bottom + 7, words, 11, GREY, "ma")
    for line in lines:
        draw_line(page, line, at)


def draw_line(page, line, at):
    """Few values as dots; many as a trend, over their pale noise."""
    points = [at(step, value) for step, value in line.points.items()]
    count = len(points)
    if count > 40:
        if not line.thin:
            page.line(points, mix(line.colour, PAPER, 0.7))
        values = trend(list(line.points.values()), count / 60)
        points = [at(step, value) for step, value in zip(line.points, values, strict=True)]
    page.line(points, line.colour, 1.2 if line.thin else 2)
    for x, y in points if count == 1 or (count <= 20 and not line.thin) else []:
        page.dot(x, y, line.colour)


def legend(page, x, y, lines):
    for line in [line for line in lines if line.name]:
        page.line([(x, y), (x + 18, y)], line.colour, 1.2 if line.thin else 3)
        page.text(x + 24, y, line.name, 12, INK, "lm")
        x += 44 + text_width(line.name, 12)


def ticks(low, high, count, least=0.0):
    """[(value, words)]: about `count` multiples of 1, 2 or 5 times a power of ten in low..high.

    least  the smallest distance between two
    """
    rough = max((high - low) / count * 0.7, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(n * step, f"{n * step:,.{decimals}f}") for n in range(first, last + 1)]


def trend(values, width):
    """Gaussian average over about `width` values to either side; it does not lag behind."""
    reach = min(math.ceil(3 * width), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    total, weight = (np.convolve(row, kernel, "same") for row in (values, np.ones(len(values))))
    return total / weight


def mix(colour, other, share):
    """`share` of the other colour in the first; both as #rrggbb."""
    pair = zip(bytes.fromhex(colour[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + bytes(round(a + (b - a) * share) for a, b in pair).hex()

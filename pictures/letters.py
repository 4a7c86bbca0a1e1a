"""Words in pictures: a font that has all their letters, or else letters that every font has.

Pillow's own font has little more than ASCII: not even ü. It is used where it suffices, so that
pictures look alike everywhere; else a font of the machine; and where no font has a letter, the
letter is written in ASCII: without its accent, or as Python escapes it.
"""

import contextlib
import functools
import unicodedata

from PIL import ImageFont

# Installed by default on Linux, macOS or Windows. Pillow finds them by their names.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf",
         "arial.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "PingFang.ttc",
         "msyh.ttc")  # fmt: skip


@functools.cache
def fonts(size):
    """Pillow's own font, and those of FONTS that this machine has."""
    found = [ImageFont.load_default(size)]
    for name in FONTS:
        with contextlib.suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return found


@functools.cache
def has(font, letter):
    """Whether a font has a glyph for a letter, not just the box that stands for what it lacks."""
    if not letter.isprintable():
        return False
    glyph, box = (font.getmask(c) for c in (letter, "\U0010ffff"))
    return (glyph.size, bytes(glyph)) != (box.size, bytes(box))


def lettering(words, size):
    """The words in letters that can be drawn, and the font of this size that has most of them."""
    words = unicodedata.normalize("NFC", words)  # macOS stores ü as u and a mark
    font = max(fonts(size), key=lambda font: sum(has(font, letter) for letter in words))
    return "".join(letter if has(font, letter) else in_ascii(letter) for letter in words), font


def text_width(words, size):
    words, font = lettering(words, size)
    return font.getlength(words)


def in_ascii(letter):
    """e of é; of what is no letter with an accent its escape, as \\u4e2d."""
    plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain if plain and plain.isprintable() else ascii(letter)[1:-1]

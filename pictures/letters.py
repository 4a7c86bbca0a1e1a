"""Words in pictures: a font that has all their letters, or else letters that every font has.

Pillow's own font has little more than ASCII: not even ü. It is used where it suffices, so that
pictures look alike everywhere; else a font of the machine; and where no font has a letter, the
letter is spelled in ASCII.
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
    own = ImageFont.load_default(size)
    if all(has(own, letter) for letter in set(words)):
        return words, own
    font = max(fonts(size), key=lambda font: sum(has(font, letter) for letter in words))
    return "".join(letter if has(font, letter) else spelled(letter) for letter in words), font


def text_width(words, size):
    words, font = lettering(words, size)
    return font.getlength(words)


def spelled(letter):
    """A letter in ASCII: without its accent, or by its name, as in zhe for the Cyrillic one."""
    for form in (letter, letter.casefold()):  # casefold() makes ss of ß
        plain = unicodedata.normalize("NFKD", form).encode("ascii", "ignore").decode()
        if plain and plain.isprintable():
            return plain
    if unicodedata.category(letter) in ("Cc", "Cf", "Mn", "Mc", "Me"):  # controls and marks
        return ""
    name = unicodedata.name(letter, f"U+{ord(letter):X}")
    if letter.isalpha():  # LATIN SMALL LETTER O WITH STROKE, or CJK UNIFIED IDEOGRAPH-4E2D
        name = name.partition(" WITH ")[0].split()[-1].rpartition("-")[2]
    name = name if letter.isupper() else name.lower()
    return name if name.isalpha() else f"({name})"

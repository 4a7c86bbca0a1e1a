"""The command line of every program: `key=value` words, --help, errors in one line.

    @report_errors                                      a UserError: one line, and exit code 2
    def main(argv):
        path, words = main_arguments(argv, USAGE)       CONFIG or RUN, and the words behind; or help
        o, words = take_options(words, {"k": 20})       the program's own options, and the others
        cfg = config.load(path, words)                  which are keys of the config

Programs that read no config print their own docstring as help.
"""

import functools
import json
import os
import sys
import time
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace

from config import Config, RankError, UserError, convert, documented, lookup, parsed, shown, type_of


def main_arguments(argv, usage):
    """(first word, the others) of the command line; prints the help for -h, --help and no words."""
    if not argv or "-h" in argv or "--help" in argv:
        print(help_text(usage))
        sys.exit(0 if argv else 2)
    return argv[0], argv[1:]


def help_text(usage):
    """What --help prints: usage, examples, and every key with its default and comment."""
    lines, section = [usage.strip("\n")], None
    for key, comment in documented():
        if key and key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines += ["", f"{section}:" if section else f"{'key':<28}{'default':<23}meaning"]
        default = shown(lookup(Config(), key)) if key else ""
        lines.append(f"  {key:<26}{default:<23}{comment}")
    return "\n".join(lines)


def take_options(words, defaults):
    """A program's own options, by their defaults, out of key=value words: (namespace, the rest).

    Raises UserError where a value is not of the default's type, or a word is almost an option.
    """
    options, rest = SimpleNamespace(**defaults), []
    for word in words:
        key, equals, text = word.partition("=")
        if equals and key in defaults:
            kind = type(defaults[key])
            setattr(options, key, convert(parsed(text, kind), kind, key, f"override {word}"))
        elif equals and not type_of(key) and (near := get_close_matches(key, defaults, 1, 0.8)):
            raise UserError(f"override {word}: unknown key {key}; did you mean {near[0]}?")
        else:
            rest.append(word)
    return options, rest


def report_errors(main):
    """Decorator of an entry point: a UserError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            # What all processes of a run have to say is said once, by the first.
            if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
                print("error: " + " ".join(str(error).split()), file=sys.stderr)
            tell_launcher(str(error))
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return run


def tell_launcher(text):
    """Make torchrun end its own report of a failed process with this line."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))

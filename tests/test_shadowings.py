"""No comprehension shadows a name that its function reads: Python 3.12 stumbles over that.

In 3.12.1 to 3.12.3, [fit for fit in xs] beside [fit(x) for x in xs] in one function is an
UnboundLocalError, though 3.11 and 3.13 run it.

Run: pytest tests/test_shadowings.py
"""

import ast

import pytest
from running import ROOT

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def shadowings(text):
    """(function, name) where a comprehension's variable is also a name read from outside."""
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef):
            inner = [node for node in ast.walk(function) if isinstance(node, COMPREHENSIONS)]
            bound = {name for node in inner for name in variables(node)}
            within = {part for node in inner for part in ast.walk(node)}
            own = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
            own |= assigned(node for node in ast.walk(function) if node not in within)
            for name in bound & set(read_from_outside(function, own)):
                yield function.name, name


def assigned(nodes):
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def variables(comprehension):
    return assigned(node for part in comprehension.generators for node in ast.walk(part.target))


def read_from_outside(node, known):
    """Names that are read but belong neither to the function nor to a comprehension around them."""
    if isinstance(node, COMPREHENSIONS):
        known = known | variables(node)
    if isinstance(node, ast.Name) and node.id not in known:
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from read_from_outside(child, known)


def test_no_comprehension_shadows_a_name_that_its_function_reads():
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    assert len(files) > 80
    found = {path.name: list(shadowings(path.read_text(encoding="utf-8"))) for path in files}
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    "body, faults",
    [
        ("shown = [fit for fit in xs]; return [fit(x) for x in shown]", [("f", "fit")]),
        ("return fit([y for x in xs for fit, y in x])", [("f", "fit")]),
        ("return [fit for fit in xs], [fit(2) for fit in xs]", []),
        ("fit = 2; return fit, [fit for fit in xs]", []),
    ],
)
def test_a_shadowing_is_noticed(body, faults):
    assert list(shadowings(f"def f(xs):\n    {body}")) == faults

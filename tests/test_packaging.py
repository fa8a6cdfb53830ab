"""What an installed user gets: the types of `fira`, in a stub that must not drift from the module."""

import ast
import inspect
from pathlib import Path

import fira

STUB = ast.parse((Path(__file__).parent / "fira-stubs" / "__init__.pyi").read_text(encoding="utf-8"))


def arguments(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """(name, default) of each argument but self."""
    a = function.args
    defaults = [None] * (len(a.args) - len(a.defaults)) + a.defaults + a.kw_defaults
    named = zip((*a.args, *a.kwonlyargs), defaults)
    return [(arg.arg, default and ast.unparse(default)) for arg, default in named if arg.arg != "self"]


def test_the_stub_has_the_module_s_signatures():
    source = ast.parse(inspect.getsource(fira))

    def functions(tree):
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        pairs = [(None, tree), *((node.name, node) for node in classes)]
        return {(name, f.name): arguments(f) for name, at in pairs for f in at.body if isinstance(f, ast.FunctionDef)}

    real, stub = functions(source), functions(STUB)
    assert stub and all(real.get(name) == given for name, given in stub.items()), {
        name: (real.get(name), given) for name, given in stub.items() if real.get(name) != given
    }

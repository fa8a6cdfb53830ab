"""Check your answers to the exercises.

python course/check.py 0            is this machine ready?
python course/check.py 3            check exercise 3
python course/check.py 3 --hint     the first of its three hints; then --hint 2, --hint 3
python course/check.py 4 --train    train 150 steps with your function, and draw its loss over ours (2, 4, 5, 8, 9)
python course/check.py all          check all ten
"""

import argparse
import importlib.util
import inspect
import runpy
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for fira.py and its neighbours, wherever this is called from
NUMBERS, TRAINED = range(1, 11), (2, 4, 5, 8, 9)


def path_of(number: int, folder: Path = HERE) -> Path:
    return next(folder.glob(f"ex{number:02}_*.py"), folder / f"ex{number:02}_….py")


def check_of(number: int):
    """The check of an exercise, and the names of its parameters: the functions that a student writes."""
    checks = importlib.import_module("course.checks_1_to_5" if number <= 5 else "course.checks_6_to_10")
    check = getattr(checks, f"check_{number}")
    return check, list(inspect.signature(check).parameters)


def run(number: int, its):
    """Yield what the check shows of the functions in `its`. They get copies: most may change their arguments."""

    def with_copies(function):
        return lambda *args, **options: function(*(x.clone() if hasattr(x, "clone") else x for x in args), **options)

    check, names = check_of(number)
    functions = [getattr(its, name) for name in names]
    yield from check(*(f if name == "fused_step" else with_copies(f) for f, name in zip(functions, names)))


def told(error: BaseException, number: int, path: Path) -> str:
    """A Fault, or whatever else a student's file may raise, in one line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line, names = getattr(error, "lineno", None) or (frames[-1].lineno if frames else None), check_of(number)[1]
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if type(error).__name__ == "Fault":
        return str(error)
    if isinstance(error, NotImplementedError) and not str(error):  # torch raises it, too, for R^2
        todo = names[names.index(frames[-1].name) :] if frames[-1].name in names else names
        return f"write {' and '.join(todo)}: line {line} of {path.name} is still to do"
    if line:
        return f"{path.name}, line {line}: {reason}: what did you expect there?"
    question = "is a `return` missing?" if "NoneType" in reason else "is it what the text asks for?"
    return f"{reason}, with what {' or '.join(names)} returned: {question}"


def check(number: int, folder: Path = HERE) -> SimpleNamespace | None:
    """Print what is right or wrong with an exercise; if all is right, return what the student's file defines."""
    path = path_of(number, folder)
    print(f"\n{number}. {path}")
    try:
        its = SimpleNamespace(**runpy.run_path(str(path), run_name=path.stem))
        for line in run(number, its):
            print(f"   {line}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever a student's file raises)
        return print(f"   not yet: {told(error, number, path)}")
    untrained = number in TRAINED and "--train" not in sys.argv
    print("   right" + f": now python course/check.py {number} --train" * untrained)
    return its


def ready() -> bool:
    """Exercise 0: what is there, and what is missing."""
    needs, good = ("torch", "numpy", "tqdm", "tiktoken", "matplotlib"), sys.version_info >= (3, 10)
    print(f"Python {sys.version.split()[0]}" + ", must be 3.10 or later" * (not good))
    for name in (name for name in needs if not importlib.util.find_spec(name)):
        print(f"{name} is missing: pip install -e " + ('".[plot]", for pictures' if name == "matplotlib" else "."))
        good = good and name == "matplotlib"
    print("ready: python course/check.py 1" if good else "not ready")
    return good


def main() -> bool:
    """Returns whether something is wrong, the exit status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # not every code page has a φ
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exercise", choices=[*map(str, range(11)), "all"], metavar="0 to 10, or all")
    parser.add_argument("--hint", type=int, nargs="?", const=1, choices=(1, 2, 3), help="show hint 1, 2 or 3")
    parser.add_argument("--train", action="store_true", help="train with your function (2, 4, 5, 8, 9)")
    args = parser.parse_args()
    if args.train and args.exercise not in map(str, TRAINED):
        parser.error("--train is for exercises 2, 4, 5, 8 and 9")
    if args.exercise == "0" or not importlib.util.find_spec("torch"):
        return not ready()
    if args.exercise == "all":
        right = sum([check(number) is not None for number in NUMBERS])
        print(f"\n{right} of {len(NUMBERS)} are right")
        return right < len(NUMBERS)
    number = int(args.exercise)
    if args.hint:
        hints = (HERE / "hints.md").read_text(encoding="utf-8").splitlines()
        return print(*(hint for hint in hints if hint.startswith(f"{number}.{args.hint} ")))
    its = check(number)
    if its and args.train:
        from course.training import train_with

        try:
            train_with(number, its)
        except Exception as error:  # noqa: BLE001
            sys.exit(f"error: {told(error, number, path_of(number))}")
    return its is None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

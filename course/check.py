"""Check your answers to the exercises.

python course/check.py 0            is this machine ready?
python course/check.py 3            check exercise 3
python course/check.py 3 --hint     the next of its three hints
python course/check.py 4 --train    train 150 steps with your function, and draw its loss over ours (2, 4, 5, 8, 9)
python course/check.py all          check all ten
"""

import argparse
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for fira.py and its neighbours, wherever this is called from

FUNCTIONS = {  # of each exercise, and what they return
    1: {"project": "P, R"},
    2: {"galore_step": "W, M, V"},
    3: {"fused_step": "", "counterexample": "P, R, rows"},
    4: {"scaling": "φ"},
    5: {"limit": "S, norm", "spike": "G"},
    6: {"state_numbers": "number", "break_even": "number"},
    7: {"align": "P", "rotate": "M"},
    8: {"pack": "codes, scales", "unpack": "V"},
    9: {"rank_for": "number", "ranks_within": "list"},
    10: {"similarity": "number, number"},
}
NUMBERS = ("number", "norm", "list")  # what need not be a tensor


def run(number: int, module, where: str):
    """Yield what the check of an exercise shows of a module's functions. Raises Fault."""
    from course import checks_1_to_3, checks_4_to_6, checks_7_to_10

    checks = vars(checks_1_to_3) | vars(checks_4_to_6) | vars(checks_7_to_10)
    yield from checks[f"check_{number}"](answers(number, module, where))


def answers(number: int, module, where: str) -> SimpleNamespace:
    """What the module holds, with the student's functions guarded."""
    ours = {name: guarded(module, name, where, out) for name, out in FUNCTIONS[number].items()}
    return SimpleNamespace(**vars(module) | ours)


def guarded(module, name: str, where: str, outputs: str):
    """A student's function that gets copies, and whose mistakes are told in one line, with the line of their file."""
    import torch

    from course.oracles import Fault

    function, outputs = getattr(module, name, None), outputs.split(", ") if outputs else []

    def call(*args, **options):
        if not callable(function):
            raise Fault(f"{where}: there is no function {name}; did you rename it?")
        if name != "fused_step":  # which changes its argument, as it should
            args = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        try:
            result = function(*args, **options)
        except NotImplementedError:
            raise Fault(f"{where}: write {name}({', '.join(inspect.signature(function).parameters)})") from None
        except (Exception, SystemExit) as error:
            raise Fault(crashed(error, where, function.__code__.co_filename)) from None
        results = result if len(outputs) > 1 else [result] * len(outputs)
        kinds = [type(x).__name__ for x in results] if isinstance(results, (tuple, list)) else type(result).__name__
        must_be = f"{name} must return {', '.join(outputs)}, but returned {kinds}: what stands after `return`?"
        if not isinstance(results, (tuple, list)) or len(results) != len(outputs):
            raise Fault(must_be)
        for x, kind in zip(results, outputs):
            if not isinstance(x, torch.Tensor) and kind not in NUMBERS or x is None and kind != "norm":
                raise Fault(must_be)
        return result

    return call


def crashed(error: BaseException, where: str, filename: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == filename]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
    text = (str(error).splitlines() or [""])[0]
    return f"{where}, line {line}: {type(error).__name__}: {text}"


def load(path: Path):
    """The student's file as a module. Raises Fault."""
    from course.oracles import Fault

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise Fault(f"there is no {path}: did you move it?") from None
    except (Exception, SystemExit) as error:
        raise Fault(crashed(error, str(path), str(path))) from None
    return module


def path_of(number: int, folder: Path = HERE) -> Path:
    return next(folder.glob(f"ex{number:02}_*.py"), folder / f"ex{number:02}_….py")


def check(number: int, folder: Path = HERE) -> bool:
    """Print what is right or wrong with an exercise."""
    from course.oracles import Fault

    path = path_of(number, folder)
    print(f"\n{number}. {path}")
    try:
        for line in run(number, load(path), path.name):
            print(f"   {line}")
    except Fault as fault:
        print(f"   not yet: {fault}")
        return False
    print("   right")
    return True


def ready() -> bool:
    """Exercise 0: what is there, what is missing, and what to do."""
    good = sys.version_info >= (3, 10)
    print(f"Python {sys.version.split()[0]}" + ("" if good else ": must be 3.10 or later"))
    for name, need in (("torch", True), ("numpy", True), ("tqdm", True), ("tiktoken", True), ("matplotlib", False)):
        found = importlib.util.find_spec(name)
        print(
            f"{name:12}{'there' if found else 'missing: pip install -e . needs it' if need else 'missing: no pictures'}"
        )
        good &= bool(found) or not need
    print("ready: python course/check.py 1" if good else "not ready")
    return good


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # not every code page has a φ
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exercise", choices=[*map(str, range(11)), "all"], metavar="0 to 10, or all")
    parser.add_argument("--hint", action="store_true", help="show the next hint")
    parser.add_argument("--train", action="store_true", help="train with your function (2, 4, 5, 8, 9)")
    args = parser.parse_args()
    if args.exercise == "0" or not importlib.util.find_spec("torch"):
        return not ready()
    if args.exercise == "all":
        right = sum([check(number) for number in FUNCTIONS])
        print(f"\n{right} of {len(FUNCTIONS)} are right")
        return right < len(FUNCTIONS)
    number = int(args.exercise)
    if args.hint:
        from course.hints import show

        return show(number)
    good = check(number)
    if good and args.train:
        from course.training import train_with

        path = path_of(number)
        try:
            train_with(number, answers(number, load(path), path.name))
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if type(error).__name__ not in ("Fault", "InputError"):  # of ours: the whole story
                raise
            sys.exit(f"error: {error}")
    return not good


if __name__ == "__main__":
    sys.exit(main())

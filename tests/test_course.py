"""The course: unsolved files fail, wrong answers fail with their sentence, right ones pass."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from course import check, wrong  # noqa: E402
from course.oracles import Fault  # noqa: E402

NUMBERS = list(check.FUNCTIONS)
WRONG = wrong.answers()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("number", NUMBERS)
def test_unsolved_file_names_the_function_to_write(number, capsys):
    # This fails for a solved file in the repository, too: solve the exercises on a branch.
    assert not check.check(number)
    printed = capsys.readouterr().out
    assert str(check.path_of(number)) in printed
    assert f"write {next(iter(check.FUNCTIONS[number]))}(" in printed


@pytest.mark.parametrize("number, name, sentence, answer", WRONG, ids=[f"{row[0]}: {row[1]}" for row in WRONG])
def test_wrong_answer_fails_with_its_sentence(number, name, sentence, answer):
    with pytest.raises(Fault) as fault:
        list(check.run(number, answer, "your file"))
    assert sentence in str(fault.value)
    assert "?" in str(fault.value) and "\n" not in str(fault.value)


def test_there_are_enough_wrong_answers():
    assert len(WRONG) >= 25
    assert all(sum(row[0] == number for row in WRONG) >= 2 for number in NUMBERS)


@pytest.mark.skipif(not (ROOT / "course" / "solutions.py").exists(), reason="a teacher deleted the solutions")
@pytest.mark.parametrize("number", NUMBERS)
def test_solution_passes(number):
    from course import solutions

    assert list(check.run(number, solutions, "solutions.py"))

"""Exercise 10: reproduce a central claim, then doubt it (45 minutes and more).

Fira takes φ from the subspace and uses it outside. The paper's reason (Tables 1 and 10): φ of a run with a low rank and
φ of one with the full rank are alike; Spearman's correlation is 0.997 over the matrices of a 60M model and 0.937 over
columns. Spearman's correlation is the usual (Pearson) correlation of ranks: replace each number by its place in the
order, then correlate. Write it, and the figure that it cannot see:

    rho      Spearman's correlation of two vectors (no two numbers in one of them are equal)
    level    the median of low / full: is the one as large as the other?

The check then trains a small language model for 21 steps at rank 32, on the sources of your own Python; the
subspace changes after step 20. Adam's moments of the full gradient are kept beside it, so there are φ (low) and φ
(full) for each column at each step. It asserts rho ≥ 0.93 over matrices (of their mean φ) and ≥ 0.8 over columns.

Then doubt it. Nobody knows all the answers:

    1. What becomes of rho if every φ low is multiplied by 0.4? What does Fira's update become?
    2. Look at the level before and after the change of the subspace. Why does it fall? (A fresh P sees nearly
       all of G: how large is ‖R‖ against ‖G‖ then? And how many numbers has a column of N, how many one of G?)
    3. The paper compares two runs; here it is one run, seen twice. Which is the harder test? Do the other.
    4. How much of rho is between matrices, how much within one? Compute the second, and the same with columns shuffled.
    5. Is it φ that is alike, or only ‖R‖ and ‖G‖, by which both are divided?
"""

import torch


# %% Write this
def similarity(low, full):
    """rho and level of two vectors φ (k,)."""
    raise NotImplementedError


# %% Look at it, after the check has passed: `python -m course.ex10_similarity`
if __name__ == "__main__":
    from course.training import phis

    for step, low, full in phis(steps=(5, 10, 20, 21, 30, 40)):  # each a list with a vector for each matrix
        print(f"step {step}: rho and level over columns", similarity(torch.cat(low), torch.cat(full)))

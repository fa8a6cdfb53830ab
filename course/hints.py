"""Three hints for each exercise, from a question to nearly the line. `check.py 5 --hint` shows the next one."""

import json
from pathlib import Path

SEEN = Path(__file__).resolve().parent / ".hints.json"  # how many of each were shown here

HINTS = {
    1: (
        "Which of U, σ and Vᵀ has vectors as long as the short side of G?",
        "torch.linalg.svd(G, full_matrices=False) gives U, σ and Vᵀ, the largest σ first. Vᵀ has its vectors as rows.",
        "Wide: P = U[:, :r]. Tall: P = Vt[:r].T. R is then P.T @ G or G @ P.",
    ),
    2: (
        "Write the five lines of the text in their order, and look at the shape of each result.",
        "M and V come from R, (r, n). Only P @ N is as large as W. √(1 − β₂ᵗ) is math.sqrt(1 - beta2**t).",
        "The last line: W - lr * c_t * alpha * P @ N. ε is added to √V, and c_t is nowhere else.",
    ),
    3: (
        "Multiply the formula out and collect what P is multiplied by.",
        "α P N + φ∘G − P (φ∘R) = P (α N − φ∘R) + φ∘G. A (n,) vector times an (r, n) matrix is columnwise in torch.",
        "W.addmm_(P, X, alpha=-lr) adds −lr P X. W.addcmul_(G, phi, value=-lr) adds −lr φ∘G. "
        "For the counterexample: P X lies on the line of P's one column. Leave that line.",
    ),
    4: (
        "A column of N is N[:, i]. How long is it?",
        "X.norm(dim=0) sums over the rows, so it gives a number for each column.",
        "N.norm(dim=0) / (R.norm(dim=0) + eps)",
    ),
    5: (
        "Three cases come before the formula: no step before, zeros, and the usual one. What is kept in each?",
        "factor = gamma / max(norm / (prev_norm + 1e-8), gamma) is never above 1. What has the norm S has after it?",
        "Zeros: return S, prev_norm. Otherwise keep norm * factor. "
        "spike: G is inside + outside with inside = P @ (P.T @ G).",
    ),
    6: (
        "Call the short side m. Which of P, M, V depend on the long one?",
        "P m·r (only if r < m), M and V 2·r·n, and 1. For tall matrices swap m and n first.",
        "m r + 2 n r = 2 m n, so r = 2 m n / (m + 2 n), with m the short side.",
    ),
    7: (
        "align: column i of P_new and column i of P_old have one dot product. rotate: this is a least-squares problem.",
        "The dot products are (P_new * P_old).sum(0). The pseudo-inverse of orthonormal columns is P_newᵀ.",
        "torch.where(dots < 0, -P_new, P_new), since sign(0) would be 0. M_new = P_newᵀ (P_old M).",
    ),
    8: (
        "Adam divides by √V. In what should the 255 steps be equal?",
        "code = ceil(255 √(V/scale)) is 0 for 0 only, and 255 for the largest. Back: (code/255)² scale.",
        "Keep the codes at most 255 before they become bytes (`clamp`), and divide by scale.clamp(min=1e-38). "
        "`blocks` does the padding, in both directions.",
    ),
    9: (
        "torch.linalg.svdvals and cumsum give all the energies at once. How many of them are too small?",
        "rank = number of energies below q, and 1 more, but never more than the short side; allow 1e-12 for rounding.",
        "The energies of all matrices, sorted, are all the q's worth a try: keep the ranks of the last that fits.",
    ),
    10: (
        "x.argsort() tells which number comes first, second, ... You need the place of each number.",
        "That is the inverse of this permutation, which argsort gives again: x.argsort().argsort().",
        "torch.corrcoef(torch.stack([a, b]))[0, 1] of the places, as floats; and (low / full).median().",
    ),
}


def show(number: int) -> None:
    seen = json.loads(SEEN.read_text(encoding="utf-8")) if SEEN.exists() else {}
    level = min(seen.get(str(number), 0) + 1, 3)
    for i, hint in enumerate(HINTS[number][:level], 1):
        print(f"{i}. {hint}")
    SEEN.write_text(json.dumps(seen | {str(number): level}), encoding="utf-8")

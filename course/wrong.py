"""Typical wrong answers: each is a solution with one thing changed, and a part of the sentence that its check must say.

tests/test_course.py tries them all. Found one that passes? Add a row, then mend the check.
"""

WRONG = [  # exercise, what is wrong, what is changed in solutions.py, the sentence
    (1, "the smallest vectors", {"U[:, :r], U[:, :r].T": "U[:, -r:], U[:, -r:].T"}, "which vectors did you take?"),
    (1, "the left side always", {"if G.shape[0] > G.shape[1]:": "if False:"}, "which side is the short one?"),
    (1, "vectors times values", {"U, _, Vt": "U, S, Vt", "U[:, :r], U": "(U * S)[:, :r], U"}, "of length 1"),
    (2, "no bias correction", {"lr * c_t * alpha": "lr * alpha"}, "the first step is 3.16 times as long"),
    (2, "M starts anew", {"beta1 * M + (1 - beta1) * R": "(1 - beta1**t) * R"}, "is it kept from step to step?"),
    (2, "ε after c_t", {"(V.sqrt() + eps)": "(V.sqrt() + eps * (1 - beta2**t) ** 0.5)"}, "is ε added to √V"),
    (3, "P N, P R apart", {"N - phi * R, alpha=-lr)": "N, alpha=-lr).addmm_(P, phi * R, alpha=lr)"}, "3 products"),
    (3, "a large temporary", {"W.addcmul_(G, phi, value=-lr)": "W -= lr * phi * G"}, "a new tensor of 96 numbers"),
    (3, "φ scales all of G", {"alpha * N - phi * R": "alpha * N"}, "so what P sees counts twice"),
    (3, "rows in the span", {"torch.tensor([1.0, 2.0])": "torch.tensor([2.0, 2.0])"}, "leave the span of P?"),
    (4, "norms of rows", {"N.norm(dim=0) / (R.norm(dim=0)": "N.norm(dim=1) / (R.norm(dim=1)"}, "over which dimension"),
    (4, "no ε", {"/ (R.norm(dim=0) + eps)": "/ R.norm(dim=0)"}, "columns of zeros got φ = nan"),
    (5, "the free norm is kept", {"S, norm = S * factor, norm * factor": "S = S * factor"}, "and which do you store?"),
    (5, "a zero norm is kept", {"if norm == 0:": "if False:"}, "What else could you keep?"),
    (5, "always × γ", {"max(norm / (prev_norm + 1e-8), gamma)": "(norm / (prev_norm + 1e-8))"}, "the max for?"),
    (5, "all of G spikes", {"return inside + factor * (G - inside)": "return factor * G"}, "which part of G"),
    (6, "m is not always short", {"m, n = min(m, n), max(m, n)": "pass"}, "40×24, rank 8: 705 came out"),
    (6, "the long side for P", {"(min(m, n) + 2 * max(m, n))": "(m + 2 * n)"}, "which side is the short one?"),
    (6, "rounded", {"2 * m * n / (min": "2 * m * n // (min"}, "is it rounded?"),
    (7, "sign(0)", {"torch.where(dots < 0, -P_new, P_new)": "P_new * dots.sign()"}, "what is sign(0)?"),
    (7, "M stays", {"P_new.T @ (P_old @ M)": "M"}, "what is the nearest P_new X to a matrix?"),
    (8, "V linearly", {".sqrt().mul(255).ceil()": ".mul(255).round()", "root**2": "root"}, "10.69% of V came back"),
    (8, "√V to nearest", {".ceil()": ".round()"}, "0.45% of V came back as 0"),
    (8, "V linearly, upwards", {"[:, None]).sqrt()": "[:, None])", "root**2": "root"}, "equal in V or in √V?"),
    (9, "σ, not σ²", {"(G.double()).square()": "(G.double())"}, "is the energy a sum of σ, or of σ²"),
    (9, "over the budget", {"sum(numbers(G, r)": "sum(numbers(G, r) - 1"}, "is the limiter's one number counted?"),
    (9, "q not found", {"in range(60)": "in range(3)"}, "is your q the largest?"),
    (9, "too small a budget", {'raise ValueError("not even rank 1 everywhere fits")': "return ranks"}, "would know?"),
    (10, "Pearson", {"x.argsort().argsort().double()": "x"}, "do you correlate places in the order?"),
    (10, "argsort once", {"x.argsort().argsort()": "x.argsort()"}, "gives the number of each place"),
    (10, "full / low", {"(low / full).median()": "(full / low).median()"}, "is it the median of low / full?"),
]  # fmt: skip

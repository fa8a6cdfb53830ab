"""What the functions of exercises 1 to 3 must do: properties and oracles in float64, at 1e-10.

A check takes the student's functions, `its`, and yields the lines to show. `must` ends it with one sentence.
"""

import torch

from course import naive
from course.oracles import Counter, basis, eye, must, off, randn, size, zeros


def check_1(its):
    for m, n, r in ((6, 10, 3), (10, 6, 3), (7, 30, 1)):
        G, short, tall = randn(m, n, seed=m), min(m, n), m > n
        P, R = its.project(G, r)
        where = f"for a {'tall' if tall else 'wide'} G ({m}×{n}) and r = {r}"
        must(P.shape == (short, r), f"{where} P is {size(P)}, not {short}×{r}: which side is the short one?")
        R, G = (R.T, G.T) if tall else (R, G)  # from here on G is wide
        error = (P.T @ P - eye(r)).abs().max()
        must(error < 1e-10, f"{where} PᵀP is off I by {error:.1e}: are P's columns of length 1, orthogonal, float64?")
        must(off(R, P.T @ G) < 1e-10, f"{where} R is not {'GP' if tall else 'PᵀG'}: where does your R come from?")
        total, kept = G.square().sum(), (P @ R).square().sum()
        rest = (G - P @ R).square().sum()
        must(abs(kept + rest - total) < 1e-10 * total, f"{where} ‖PR‖² + ‖G − PR‖² is not ‖G‖²: why?")
        best = torch.linalg.svdvals(G)[:r].square().sum() / total
        others = max((basis(short, r, seed).T @ G).square().sum() / total for seed in range(50))
        energy = f"{where} PR keeps {kept / total:.3f} of the energy"
        must(
            kept / total > best - 1e-10,
            f"{energy}; {best:.3f} is possible (50 random bases: at most {others:.3f}). Which vectors did you take?",
        )
        yield f"{energy}, all that is possible; the best of 50 random bases {others:.3f}"


def check_2(its):
    m, n, r, lr, alpha = 8, 12, 3, 0.01, 0.25
    Gs, P, W = randn(30, m, n, seed=3), basis(m, r, seed=1), randn(m, n, seed=3)
    R = P.T @ Gs[0]
    new, M, V = its.galore_step(W, Gs[0], P, zeros(r, n), zeros(r, n), 1)
    for name, X, want in (("M", M, 0.1 * R), ("V", V, 0.001 * R.square())):
        must(X.shape == (r, n), f"{name} is {size(X)}, should be {r}×{n}: whose moments are they, G's or R's?")
        must(off(X, want) < 1e-10, f"{name} is off by {off(X, want):.1e} after step 1: which β, which power of R?")
    must(new.shape == W.shape, f"W came out {size(new)}, should stay {m}×{n}: what brings N back to the size of W?")
    first = -lr * alpha * P @ R.sign()  # in Adam's first step N c₁ is the sign of R
    times = ((new - W) * first).sum() / first.square().sum()
    must(times > 0, "the first step goes up the gradient, should go down: which sign has the update?")
    must(
        abs(times - 1) < 1e-5,
        f"the first step is {times:.3g} times as long as η α P sign(R), should be 1 times: c₁ is 0.316, "
        "α is 0.25. Which factor is missing, or there twice?",
    )

    def run(Ps, Gs, **options):
        W, M, V = zeros(m, n), zeros(Ps[0].shape[1], n), zeros(Ps[0].shape[1], n)
        for t, (G, P) in enumerate(zip(Gs, Ps), 1):
            W, M, V = its.galore_step(W, G, P, M, V, t, **options)
        return W

    def book(Gs):
        W, Ps, state = zeros(m, n), [], {}
        for G in Gs:
            W = naive.fira_step(W, G, state, rank=r, lr=lr, T=10, scaling=None)
            Ps.append(state["P"])
        return W, Ps

    for Gs_, when, limit, question in (
        (Gs[:2], "2 steps", 1e-4, "the first was right: what must change with t?"),
        (Gs[:10], "10 steps", 1e-4, "the second was right: with which power of β is each moment corrected?"),
        (1e-6 * Gs[:10], "10 steps with gradients of 1e-6", 1e-8, "is ε added before or after the bias correction?"),
        (Gs, "30 steps with three P's", 1e-10, "is all of M and V kept, in float64?"),
    ):
        want, Ps = book(Gs_)
        error = off(run(Ps, Gs_), want)
        must(error < limit, f"after {when} W is off by {error:.1e}, should be below {limit:g}; {question}")
    yield "30 steps with three P's are those of naive.py, to 1e-10"
    w = torch.nn.Parameter(zeros(m, n))
    adam = torch.optim.Adam([w], lr=lr, eps=1e-30)
    for w.grad in Gs:
        adam.step()
    same, other = (off(run([Q] * 30, Gs, alpha=1.0, eps=1e-30), w.data) for Q in (eye(m), basis(m, m, seed=1)))
    must(same < 1e-10, "at r = m with P = I and α = 1 it is not Adam: do you use `alpha` and `eps` as they come?")
    yield f"at r = m it is Adam if P = I (off by {same:.1f}), but not for a random orthogonal P (off by {other:.2f})"


def check_3(its):
    m, n, r, lr, alpha = 8, 12, 3, 0.01, 0.25
    G, P, N, phi, W = randn(m, n, seed=1), basis(m, r), randn(r, n, seed=2), randn(n, seed=3).abs(), randn(m, n, seed=4)
    S, new, before = phi * (G - P @ (P.T @ G)), W.clone(), G.clone()
    with Counter() as counter:
        its.fused_step(new, G, P, N, phi, lr, alpha)
    must(not torch.equal(new, W), "W is as it was: do you change W itself, or a new tensor of that name?")
    must(torch.equal(G, before), "G was changed, should stay as it was: which operation with _ wrote to it?")
    error = off(new, W - lr * (alpha * P @ N + S))
    for sentence, wrong in (
        ("S is missing", alpha * P @ N),
        ("P N is missing", S),
        ("φ scales all of G, so what P sees counts twice", alpha * P @ N + phi * G),
        ("α is before S too", alpha * (P @ N + S)),
        ("α is not there", P @ N + S),
    ):
        must(off(new, W - lr * wrong) > 1e-10, f"W is off by {error:.1e}: {sentence}. What is it, multiplied out?")
    must(error < 1e-10, f"W is off by {error:.1e}, should be < 1e-10: has each term its place and sign?")
    must(counter.products <= 2, f"{counter.products} products were counted, should be 2: which of yours begin with P?")
    most = counter.largest
    must(most < m * n, f"a new tensor of {most} numbers was made, as W has {m * n}: which line makes it?")
    X = randn(r, n, seed=5)
    yield f"{counter.products} products, new tensors of at most {most} numbers (W: {m * n}), W off by {error:.0e}"
    yield f"a φ for each column: φ∘(PX) and P(φ∘X) differ by {(phi * (P @ X) - P @ (phi * X)).abs().max():.0e}"
    Q, R, rows = (x.double() for x in its.counterexample())
    must(Q.dim() == R.dim() == 2 and Q.shape[1:] == R.shape[:1], f"P is {size(Q)} and R {size(R)}: what is P R then?")
    must(rows.shape == Q.shape[:1], f"rows is {size(rows)}: how many rows has P R?")
    must((Q.T @ Q - eye(Q.shape[1])).abs().max() < 1e-6, "the columns of your P are not orthonormal: what is PᵀP?")
    left = (rows[:, None] * (Q @ R)).flatten()
    terms = torch.stack([torch.outer(Q[:, k], R[k]).flatten() for k in range(Q.shape[1])], 1)  # of P (b∘R)
    gap = (left - terms @ (torch.linalg.pinv(terms) @ left)).norm()
    must(gap > 1e-6, f"P(b∘R) can be your rows∘(PR), up to {gap:.0e}: do the columns of rows∘(PR) leave the span of P?")
    P = basis(m, r, seed=3)
    X = randn(m, 1, seed=6) * (P @ randn(r, n, seed=6))
    yield f"a φ for each row: {gap:.2g} off in yours, {(X - P @ (P.T @ X)).norm():.1f} in a random one (8×12, r = 3)"

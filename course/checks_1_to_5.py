"""What the functions of exercises 1 to 5 must do: properties and oracles in float64, at 1e-10.

A check takes the student's functions, `its`, and yields the lines to show. `must` ends it with one sentence.
"""

import math

import torch

from course import naive
from course.oracles import Counter, basis, inside, moments, must, off, randn, size


def check_1(its):
    for m, n, r in ((6, 10, 3), (10, 6, 3), (7, 30, 1)):
        G = randn(m, n, seed=m)
        P, R = its.project(G, r)
        short, tall = min(m, n), m > n
        where = f"for a {'tall' if tall else 'wide'} G ({m}×{n}) and r = {r}"
        must(P.shape == (short, r), f"{where} P came out {size(P)}, should be {short}×{r}: which side is the short one?")
        P, R, G = (P, R.T, G.T) if tall else (P, R, G)  # from here on G is wide
        error = (P.T @ P - torch.eye(r)).abs().max()
        must(error < 1e-10, f"{where} PᵀP is off the identity by {error:.1e}: are P's columns of length 1, and orthogonal?")
        must(off(R, P.T @ G) < 1e-10, f"{where} R is not {'GP' if tall else 'PᵀG'}: where does your R come from?")
        total, kept = G.square().sum(), R.square().sum()
        must(abs(kept + (G - P @ R).square().sum() - total) < 1e-10 * total, f"{where} ‖PR‖² + ‖G − PR‖² is not ‖G‖²")
        best = torch.linalg.svdvals(G)[:r].square().sum() / total
        others = max((basis(short, r, seed).T @ G).square().sum() / total for seed in range(50))
        share = kept / total
        what = f"{where} PR keeps {share:.3f} of the energy; {best:.3f} is possible"
        must(share > best - 1e-10, f"{what}, and the best of 50 random bases has {others:.3f}. Which singular vectors did you take?")
        yield f"{what}, and the best of 50 random bases has {others:.3f}"


def check_2(its):
    m, n, r, lr, alpha = 8, 12, 3, 0.01, 0.25
    Gs, Ps = randn(30, m, n, seed=3), [basis(m, r, seed) for seed in (1, 2, 3)]
    P, W, zero = Ps[0], randn(m, n, seed=3), torch.zeros(r, n, dtype=torch.float64)
    new, M, V = its.galore_step(W, Gs[0], P, zero, zero, 1)
    for name, X in (("M", M), ("V", V)):
        must(X.shape == (r, n), f"{name} came out {size(X)}, should be {r}×{n}: whose moments are they, G's or R's?")
    for name, X, want in (("M", M, 0.1 * P.T @ Gs[0]), ("V", V, 0.001 * (P.T @ Gs[0]).square())):
        must(off(X, want) < 1e-10, f"after one step {name} is off by {off(X, want):.1e}: with which β was it made, of what power of R?")
    must(new.shape == W.shape, f"W came out {size(new)}, should stay {m}×{n}: what brings N back to the size of W?")
    first = -lr * alpha * P @ (P.T @ Gs[0]).sign()  # in Adam's first step N c₁ is the sign of R
    times = ((new - W) * first).sum() / first.square().sum()
    must(times > 0, "the first step goes up the gradient, should go down: which sign has the update?")
    must(
        abs(times - 1) < 1e-5,
        f"the first step is {times:.3g} times as long as η α P sign(R), should be 1 times: c₁ is 0.316 here, α 0.25, η 0.01, "
        "and √(1 − β₂) 0.0316. Which factor is missing, or there twice?",
    )
    def run(Ps, Gs, **options):
        W = torch.zeros(m, n, dtype=torch.float64)
        M = V = torch.zeros(Ps[0].shape[1], n, dtype=torch.float64)
        for t, G in enumerate(Gs, 1):
            W, M, V = its.galore_step(W, G, Ps[(t - 1) // 10 % len(Ps)], M, V, t, **options)
        return W

    def book(scale, T):
        W, state = torch.zeros(m, n, dtype=torch.float64), {}
        for G in scale * Gs[:T]:
            W = naive.fira_step(W, G, state, rank=r, lr=lr, T=10, scaling=None)
            Ps[:] = Ps[: (state["t"] - 1) // 10] + [state["P"]] * (3 - (state["t"] - 1) // 10)
        return W

    for scale, T, when, limit, question in (
        (1, 2, "after 2 steps", 1e-4, "the first was right: what must change with t?"),
        (1, 10, "after 10 steps", 1e-4, "the second was right: with which power of β is a moment corrected?"),
        (1e-6, 10, "with gradients of 1e-6", 1e-8, "where is ε added, before or after the bias correction?"),
        (1, 30, "after 30 steps with three P's", 1e-10, "is all of M and V kept, in float64?"),
    ):
        want = book(scale, T)
        error = off(run(Ps, scale * Gs[:T]), want)
        must(error < limit, f"{when} W is off by {error:.1e}, should be below {limit:g}; {question}")
    yield "30 steps with three P's are those of naive.py, to 1e-10"
    w = torch.nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
    adam = torch.optim.Adam([w], lr=lr, eps=1e-30)
    for w.grad in Gs:
        adam.step()
    whole = [run([Q], Gs, alpha=1.0, eps=1e-30) for Q in (torch.eye(m, dtype=torch.float64), basis(m, m, seed=1))]
    must(off(whole[0], w.data) < 1e-10, "at r = m with P = I and α = 1 it is not Adam: do you use `alpha` and `eps` as they come?")
    yield f"at r = m it is Adam if P = I (off by {off(whole[0], w.data):.1f}), but not for a random orthogonal P (off by {off(whole[1], w.data):.2f}): why?"
    yield f"state at 512×512 and r = 128: {128 * 512 + 2 * 128 * 512:,} numbers; Adam's {2 * 512 * 512:,}"


def check_3(its):
    m, n, r, lr, alpha = 8, 12, 3, 0.01, 0.25
    G, P, N, phi, W = randn(m, n, seed=1), basis(m, r), randn(r, n, seed=2), randn(n, seed=3).abs(), randn(m, n, seed=4)
    outside, new, before = phi * (G - P @ (P.T @ G)), W.clone(), G.clone()
    with Counter() as counter:
        its.fused_step(new, G, P, N, phi, lr, alpha)
    must(not torch.equal(new, W), "W is as it was: do you change W itself, or a new tensor of that name?")
    must(torch.equal(G, before), "G was changed, should stay as it was: which operation with _ wrote to it?")
    error = off(new, W - lr * (alpha * P @ N + outside))
    for sentence, wrong in (
        ("S is missing", W - lr * alpha * P @ N),
        ("P N is missing", W - lr * outside),
        ("the whole G is scaled by φ, so what P sees counts twice", W - lr * (alpha * P @ N + phi * G)),
        ("α is before S too", W - lr * alpha * (P @ N + outside)),
        ("α is not there", W - lr * (P @ N + outside)),
    ):
        must(off(new, wrong) > 1e-10, f"W is off by {error:.1e}: {sentence}. What is left of the formula if you write it out?")
    must(error < 1e-10, f"W is off by {error:.1e}, should be below 1e-10: does your form have every term of the formula, with its sign?")
    must(counter.products <= 2, f"{counter.products} products were counted, should be 2: which two of yours begin with P?")
    must(counter.largest < m * n, f"a new tensor of {counter.largest} numbers was made, W has {m * n}: which line makes it?")
    X = randn(r, n, seed=5)
    yield f"{counter.products} products, the largest new tensor has {counter.largest} numbers (W: {m * n}), W is off by {error:.0e}"
    yield f"φ∘(PR) and P(φ∘R) differ by {(phi * (P @ X) - P @ (phi * X)).abs().max():.0e} with a number for each column"
    P, R, rows = its.counterexample()
    must(P.dim() == R.dim() == 2 and P.shape[1:] == R.shape[:1], f"P is {size(P)} and R {size(R)}: there is no P R")
    must(rows.shape == P.shape[:1], f"rows has shape {size(rows)}, should have one number for each of the {len(P)} rows of P R")
    P, R, rows = P.double(), R.double(), rows.double()
    must((P.T @ P - torch.eye(P.shape[1])).abs().max() < 1e-6, "the columns of your P are not orthonormal: what is PᵀP?")
    left = rows[:, None] * (P @ R)
    terms = torch.stack([torch.outer(P[:, k], R[k]).flatten() for k in range(P.shape[1])], 1)  # of P (b∘R), one for each b
    gap = (left.flatten() - terms @ (torch.linalg.pinv(terms) @ left.flatten())).norm()
    must(gap > 1e-6, f"there are numbers b with rows∘(PR) = P(b∘R) up to {gap:.0e}: do the columns of rows∘(PR) leave the span of P?")
    P, rows = basis(m, r, seed=3), randn(m, 1, seed=6)
    X = rows * (P @ randn(r, n, seed=6))
    yield f"your rows∘(PR) is {gap:.2g} away from every P(b∘R); a random one (8×12, r = 3) {(X - P @ (P.T @ X)).norm():.1f}"


def check_4(its):
    m, n, r = 8, 12, 3
    N, R = randn(r, n, seed=1), randn(r, n, seed=2)
    phi, want = its.scaling(N, R), N.norm(dim=0) / (R.norm(dim=0) + 1e-8)
    must(phi.numel() != r, f"φ has {r} numbers, one for each row, should have {n}: over which dimension is the norm of a column?")
    must(phi.numel() != 1, f"φ is one number, should be {n}: that is the paper's Fira-matrix. Which `dim` have the columns?")
    must(phi.shape in ((n,), (1, n)), f"φ has shape {size(phi)}, should be one number for each of {n} columns: is it elementwise?")
    phi = phi.flatten()
    must(off(phi, 1 / want) > 1e-6, "φ is upside down: a column that the inner optimizer doubles must get 2. What is that ratio here?")
    must(off(phi, want.square()) > 1e-6, "φ came out squared: a column that the inner optimizer triples got 9, should get 3. Is a root missing?")
    must(off(phi, want) < 1e-7, f"φ is off by {off(phi, want):.1e}: is it ‖Nᵢ‖ / (‖Rᵢ‖ + ε), with the 2-norm?")
    zero = its.scaling(0 * N, 0 * R)
    must(zero.isfinite().all(), f"columns of zeros got φ = {zero.flatten()[0]:.3g}, should get a finite number: what is ε for?")
    must(off(its.scaling(N, R, eps=1.0).flatten(), N.norm(dim=0) / (R.norm(dim=0) + 1)) < 1e-10, "with ε = 1 φ is off: where does ε stand?")

    def run(kind, P):
        W, optimizer = torch.zeros(m, n, dtype=torch.float64), inside(kind)
        for G in randn(30, m, n, seed=9):
            R = P.T @ G
            N = optimizer(R)
            W = W - 0.01 * (P @ N + its.scaling(N, R, eps=1e-30) * (G - P @ R))
        return W

    I, P = torch.eye(m, dtype=torch.float64), basis(m, 2, seed=7)
    errors = [off(run(kind, P), run(kind, I)) for kind in ("SGD", "momentum", "Adam")]
    must(errors[0] < 1e-10, f"with SGD inside it is off SGD for the full matrix by {errors[0]:.1e}: what must φ be where N = R?")
    yield f"SGD inside is SGD, for any P (off by {(run('SGD', P) - run('SGD', I)).abs().max() / 0.01:.0e})"
    yield f"momentum inside is not momentum (off by {errors[1]:.2f}): what does S lack that P N has?"
    yield f"Adam inside is Adam where P = I (S is 0 there), and off by {errors[2]:.2f} for this P"


def check_5(its):
    S = randn(8, 12, seed=1)
    norm = S.norm().item()
    new, kept = its.limit(S, None)
    must(off(new, S) < 1e-10, f"without a norm of the step before, ‖S‖ {norm:.3g} became {new.norm():.3g}, should stay: what is there to compare with?")
    must(kept is not None and abs(kept - norm) < 1e-9, f"after a first step with ‖S‖ = {norm:.4g} it kept {kept}: what does the next step compare with?")
    new, kept = its.limit(S, 10 * norm)
    must(off(new, S) < 1e-10, f"‖S‖ fell to a tenth and was multiplied by {new.norm() / norm:.3g}, should pass as it is: what is the max for?")
    new, kept = its.limit(S, norm / 57.3)
    grew, grew_kept = new.norm().item() / norm * 57.3, kept / norm * 57.3
    question = "Is it compared with the step before?" if grew > 50 else "What is γ multiplied by?"
    must(abs(grew - 1.01) < 1e-6, f"after the spike ‖S‖ grew by {grew:.4g}; the limiter allows 1.01. {question}")
    must(off(new / new.norm(), S / norm) < 1e-10, "the limited S points another way: is every number multiplied by the same factor?")
    must(abs(grew_kept - 1.01) < 1e-6, f"a spike may go on at {grew_kept * 1.01:.3g} in its second step, should be 1.02: which norm did you store?")
    new, kept = its.limit(0 * S, 3.0)
    must(new.isfinite().all() and new.norm() == 0, "zeros came out as nan, should be zeros: what is divided by what?")
    lost, steps = torch.ones(1, 1, dtype=torch.float64), 0  # how long until ‖S‖ = 1 passes again?
    while kept is not None and kept < 1 - 1e-9 and steps < 5000:
        (now, kept), steps = its.limit(lost, kept), steps + 1
    must(steps == 0, f"a gradient of zeros must not be remembered: ‖S‖ was 3 before it, and 1 passes {steps:,} steps later. What is kept?")
    must(kept == 3.0, f"after a gradient of zeros it kept {kept}, should keep 3.0: what would the next spike be compared with?")
    _, kept = its.limit(0 * S, None)
    must(kept is None, f"zeros in the very first step: it kept {kept}, should keep None. What may S be in the second?")
    new, _ = its.limit(S, norm / 3, gamma=2.0)
    must(abs(new.norm() / norm - 2 / 3) < 1e-6, "with γ = 2 ‖S‖ may double: do you use `gamma`?")
    G, P = randn(8, 12, seed=2), basis(8, 3)
    spiked, rest = its.spike(G, P, 50), G - P @ (P.T @ G)
    must(off(P.T @ spiked, P.T @ G) < 1e-9, f"the spike changed PᵀG by {off(P.T @ spiked, P.T @ G):.2g} of its size, should leave it: which part does P see?")
    must(off(spiked - P @ (P.T @ spiked), 50 * rest) < 1e-9, "the part that P cannot see is not 50 times as large: what is it, in G and P?")
    free, P, Gs = {}, basis(8, 3), randn(51, 8, 12, seed=24)
    for name, last in (("usual", Gs[50]), ("outside", its.spike(Gs[50], P, 50)), ("whole", 50 * Gs[50])):
        norms = []
        for t, G in ((50, Gs[49]), (51, last)):
            R = torch.stack([P.T @ H for H in (*Gs[: t - 1], G)])
            M, V = moments(R)
            norms.append(((M / (V.sqrt() + 1e-8)).norm(dim=0) / (R[-1].norm(dim=0) + 1e-8) * (G - P @ R[-1])))
        free[name] = (norms[1].norm() / norms[0].norm()).item()
        limited = its.limit(norms[1], norms[0].norm().item())[0].norm() / norms[0].norm()
        if name == "outside":
            yield f"the part that P cannot see times 50: ‖S‖ × {free[name]:.0f} free, × {limited:.2f} with your limiter"
    yield f"the whole gradient times 50: ‖S‖ only × {free['whole']:.1f} free (as usual, × {free['usual']:.1f}): why?"
    yield "a gradient of zeros is survived; had its norm been kept, the way back to ‖S‖ = 1 would take 1,388 steps"

"""What the functions of exercises 1 to 5 must do: properties and oracles in float64, at 1e-10.

A check takes the student's functions and yields the lines to show. `must` and `same` end it with one sentence.
"""

import torch

from course import naive
from course.oracles import Counter, basis, inner, must, off, randn, same


def check_1(project):
    for m, n, kind in ((6, 10, "wide"), (10, 6, "tall"), (6, 6, "square")):
        G, where = randn(m, n, seed=m), f"for a {kind} G ({m}×{n}) and r = 3"
        P, R = project(G, 3)
        must(P.shape == (6, 3), f"{where} P is {tuple(P.shape)}, should be (6, 3): which side is short? Is P first?")
        shape = (10, 3) if kind == "tall" else (3, n)
        side = "does P multiply G from the left (PᵀG) or from the right (GP) here?"
        must(R.shape == shape, f"{where} R is {tuple(R.shape)}, should be {shape}: {side}")
        R, G = (R.T, G.T) if kind == "tall" else (R, G)  # from here on G is wide
        same(P.T @ P, torch.eye(3).double(), f"{where} PᵀP", "are P's columns of length 1, orthogonal, float64?")
        total, kept, rest = (X.square().sum() for X in (G, P @ R, G - P @ R))
        same(kept + rest, total, f"{where} ‖PR‖² + ‖G − PR‖² = ‖G‖²", "where does your R come from?")
        best = torch.linalg.svdvals(G)[:3].square().sum() / total
        others = max((basis(6, 3, seed).T @ G).square().sum() / total for seed in range(50))
        found = f"{where} PR keeps {kept / total:.3f} of the energy (50 random bases at most {others:.3f})"
        must(kept / total > best - 1e-10, f"{found}, should keep {best:.3f}: which vectors did you take?")
        yield f"{found}: all that is possible"


def check_2(galore_step):
    (m, n, r), state = (8, 12, 3), {}
    Gs, W, start = randn(30, m, n, seed=3), randn(m, n), randn(m, n)
    mine = W, 0 * W[:r], 0 * W[:r]
    for t, G in enumerate(Gs, 1):
        W = naive.fira_step(W, G, state, rank=r, lr=0.01, T=10, scaling=None)
        mine = galore_step(mine[0], G, state["P"], *mine[1:], t)
        own = "is it kept from step to step, without a bias correction in it?"
        same(mine[1], state["M"], f"after step {t} M", f"is the order W, M, V, is it of R, with β₁, and {own}")
        same(mine[2], state["V"], f"after step {t} V", f"is it of R², with β₂, and {own}")
        must(mine[0].norm() > 0.1 * start.norm(), "W is the step alone: does it go on from the W that was given?")
        times = ((mine[0] - start) * (W - start)).sum() / (W - start).square().sum()
        first = f"the first step is {times:.3g} times as long as it should be; c₁ is 0.316 and α 0.25"
        factor = any(abs(times / f - 1) < 1e-3 for f in (0.1**0.5, 10**0.5, 0.25, 4))
        question = (
            "which factor is missing, or there twice?"
            if factor
            else "what is your c_t at t = 1, and what is the root of?"
        )
        question = "which sign has a descent?" if times < 0 else question
        must(t > 1 or abs(times - 1) < 0.01, f"{first}: {question}")
        same(mine[0], W, f"after step {t} W", "is ε added to √V alone, does c_t change with t, is all in float64?")
    yield "30 steps with three P's are those of naive.py, to 1e-10"
    w, options = torch.nn.Parameter(0 * W), {"lr": 0.02, "alpha": 1.0, "beta1": 0.8, "beta2": 0.99, "eps": 1e-30}
    adam, mine, turned = torch.optim.Adam([w], lr=0.02, betas=(0.8, 0.99), eps=1e-30), [0 * W] * 3, [0 * W] * 3
    for t, w.grad in enumerate(Gs, 1):
        adam.step()
        mine = galore_step(mine[0], w.grad, torch.eye(m).double(), *mine[1:], t, **options)
        turned = galore_step(turned[0], w.grad, basis(m, m, seed=1), *turned[1:], t, **options)
    same(mine[0], w.data, "Adam's W, with P = I and α = 1,", "do you use `lr`, `alpha`, the betas and `eps`?")
    turned = f"{off(turned[0], w.data):.2f}): what in Adam depends on the basis?"
    yield f"at r = m it is Adam if P = I (off by 0.0), but not for a random P (off by {turned}"


def check_3(fused_step, counterexample):
    m, n, r = 8, 12, 3
    G, P, N, phi, W = randn(m, n, seed=1), basis(m, r), randn(r, n, seed=2), randn(n, seed=3), randn(m, n, seed=4)
    new, given = W.clone(), {"G": G, "P": P, "N": N, "φ": phi}
    copies = [x.clone() for x in given.values()]
    with Counter() as counter:
        fused_step(new, *copies, 0.01, 0.25)
    must(not torch.equal(new, W), "W is as it was: do you change W itself, or a new tensor of that name?")
    for name, copy in zip(given, copies):
        must(torch.equal(copy, given[name]), f"{name} was changed, should stay: which operation with _ wrote to it?")
    twice = off(new, W - 0.01 * (0.25 * P @ N + phi * G))
    must(twice > 1e-10, "φ scales all of G, so what P sees counts twice: what is α P N + S, multiplied out?")
    same(new, W - 0.01 * (0.25 * P @ N + phi * (G - P @ (P.T @ G))), "W", "has each term its place, sign and factor?")
    found, most = f"{counter.products} products with matrices", counter.largest
    must(counter.products <= 2, f"{found} were counted, should be 2: which of yours begin with P?")
    must(most < m * n, f"a new tensor of {most} numbers was made, as W has {m * n}: which line makes it?")
    yield f"{found}, new tensors of at most {most} numbers (W: {m * n})"
    Q, R, rows = (x.double() for x in counterexample())
    shapes = f"P, R and rows are {tuple(Q.shape)}, {tuple(R.shape)} and {tuple(rows.shape)}"
    fit = (Q.ndim, R.ndim, rows.ndim) == (2, 2, 1) and Q.shape == (len(rows), len(R))
    must(fit, f"{shapes}, should be (m, r), (r, n) and (m,): which sides must be equal?")
    same(Q.T @ Q, torch.eye(Q.shape[1]).double(), "PᵀP of your P", "are its columns orthonormal?", limit=1e-6)
    left = (rows[:, None] * (Q @ R)).flatten()
    terms = torch.stack([torch.outer(Q[:, k], R[k]).flatten() for k in range(Q.shape[1])], 1)  # of P (b∘R)
    gap = (left - terms @ (torch.linalg.pinv(terms) @ left)).norm()
    must(gap > 1e-6, "some b gives P(b∘R) = rows∘(PR) for yours: which column of rows∘(PR) leaves the span of P?")
    P, X, rows = basis(m, r, seed=3), randn(r, n, seed=6), randn(m, 1, seed=6)
    left = rows * (P @ X)
    yield f"a φ for each column: φ∘(PX) and P(φ∘X) differ by {(phi * (P @ X) - P @ (phi * X)).abs().max():.0e}"
    yield f"a φ for each row: by {gap:.2g} in yours, by {(left - P @ (P.T @ left)).norm():.1f} in a random one (8×12)"


def check_4(scaling):
    m, n, r = 8, 12, 3
    N, R = randn(r, n, seed=1), randn(r, n, seed=2)
    phi, want = scaling(N, R).flatten(), N.norm(dim=0) / (R.norm(dim=0) + 1e-8)
    question = "over which dimension is the norm? (One for the whole matrix is a variant of the paper's.)"
    must(len(phi) == n, f"φ has {len(phi)} numbers, should have {n}, one for each column: {question}")
    same(phi, want, "φ", "is it ‖Nᵢ‖ / (‖Rᵢ‖ + ε), with the 2-norm?", limit=1e-7)
    zero = scaling(0 * N, 0 * R).flatten()[0]
    must(zero.isfinite(), f"columns of zeros got φ = {zero:.3g}, should be finite: what is ε for?")
    large = N.norm(dim=0) / (R.norm(dim=0) + 1)
    same(scaling(N, R, eps=1.0).flatten(), large, "φ with eps = 1", "is it `eps` that you add, and to ‖Rᵢ‖ itself?")

    def run(kind, P):
        W, Gs = 0 * randn(m, n), randn(30, m, n, seed=9)
        for t, G in enumerate(Gs, 1):
            N, c_t = inner(kind, P.T @ Gs[:t]), (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) if kind == "Adam" else 1
            W = W - 0.01 * c_t * (P @ N + scaling(N, P.T @ G, eps=1e-30) * (G - P @ P.T @ G))
        return W

    P = basis(m, 2, seed=7)
    sgd, momentum, adam = (off(run(kind, P), run(kind, torch.eye(m).double())) for kind in ("SGD", "momentum", "Adam"))
    must(sgd < 1e-10, f"with SGD inside it is off SGD for the full matrix by {sgd:.1e}: what must φ be where N = R?")
    yield f"SGD inside is SGD, for any P (off by {sgd:.0e})"
    yield f"momentum inside is not momentum (off by {momentum:.2f}): what does S lack that P N has?"
    yield f"Adam inside is Adam where P = I, for then S = 0; for this P (8×2) it is off by {adam:.2f}"


def check_5(limit, spike):
    S = randn(8, 12, seed=1)
    S /= S.norm()
    for prev, norm, gamma, out, store, question in (
        (None, 2.0, 1.01, 2.0, 2.0, "what could limit the first step, and with what will the second compare?"),
        (3.0, 2.0, 1.01, 2.0, 2.0, "‖S‖ fell, so S should stay: what is γ / max(2/3, γ), and what is your factor?"),
        (1.0, 57.3, 1.01, 1.01, 1.01, "which norm do you compare with, and which do you store?"),
        (1.0, 57.3, 2.0, 2.0, 2.0, "do you use `gamma`?"),
        (3.0, 0.0, 1.01, 0.0, 3.0, "with which norm should the step after the zeros compare?"),
    ):
        new, kept = limit(norm * S, prev, gamma)
        numbers = 1 if kept is None else torch.as_tensor(kept).numel()
        must(numbers == 1, f"{numbers} numbers were stored, should be one for the matrix: is S returned first?")
        came = f"‖S_prev‖ {prev}, ‖S‖ {norm}, γ {gamma}: S came out with norm {new.norm():.3g}, {kept} was kept"
        limited, right = off(new, out * S) < 1e-6, kept is not None and abs(kept - store) < 1e-6
        if store == 1.01 and not limited:
            question = "how far may ‖S‖ grow from 1.0 with this γ?"
        elif prev == 3.0 and norm == 2.0 and limited:
            question = "S is right; with which norm should the next step compare?"
        elif norm == 0 and kept == 0:
            question = "from 0 it takes 1,388 steps until ‖S‖ = 1 may pass. What else could you keep?"
        elif norm == 0 and kept is None:
            question = "how large may S be in the next step, if that one is a spike?"
        must(limited and right, f"{came}; should be {out}, in S's direction, and {store}: {question}")
    kept = limit(0 * S, None)[1]
    free = limit(5 * S, kept)[0].norm()
    must(abs(free - 5) < 1e-6, f"at first S = 0: {kept} was kept, and then ‖S‖ = 5 became {free:.3g}: what limits it?")
    yield "a step of zeros keeps the norm before it; from 0 it would take 1,388 steps until ‖S‖ = 1 may pass"
    P, Gs = basis(8, 3), randn(51, 8, 12, seed=24)
    inside, spiked = P @ (P.T @ Gs[50]), spike(Gs[50], P, 50)
    same(P.T @ spiked, P.T @ inside, "PᵀG after the spike", "which part of G does P see?")
    same(
        spiked - inside,
        50 * (Gs[50] - inside),
        "what P cannot see, times 50,",
        "what is that part in G and P, and is it in G already?",
    )

    def scaled_rest(*Gs):
        Rs = P.T @ torch.stack(Gs)
        return inner("Adam", Rs).norm(dim=0) / Rs[-1].norm(dim=0) * (Gs[-1] - P @ Rs[-1])

    before = scaled_rest(*Gs[:50]).norm().item()
    Ss = [scaled_rest(*Gs[:50], last) for last in (spiked, 50 * Gs[50], Gs[50])]
    outside, whole, usual, limited = (S.norm().item() / before for S in (*Ss, limit(Ss[0], before)[0]))
    free = f"× {outside:.0f} free (× {usual:.1f} in this step without a spike)"
    yield f"what P cannot see times 50: ‖S‖ {free}, × {limited:.2f} with your limiter"
    yield f"the whole gradient times 50: ‖S‖ × {whole:.1f} free. Why not 50, why not 1? (Hint 5.3 has the answer.)"
